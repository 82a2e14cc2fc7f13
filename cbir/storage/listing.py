"""A folder's files as a stream of objects, in the order in which S3 would list them."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cbir.errors import StorageError
from cbir.storage.disk import HIDDEN, disk_errors
from cbir.storage.store import ObjectInfo

__all__ = ["info", "walk"]

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class _Folder(NamedTuple):
    """A folder that is being listed: device and inode, its key with a slash at the end, and the names still to come."""

    identity: tuple[int, int]
    base: str
    names: Iterator[bytes]


def walk(root: Path, prefix: str) -> Iterator[ObjectInfo]:
    """The regular files whose key starts with the prefix, in byte order of the keys.

    Links are followed; a link back to a folder that is being listed is not. What vanishes meanwhile is left out. Only
    the names of the folders on the way are held in memory.
    """
    base = prefix[: prefix.rfind("/") + 1]
    folders = [folder for folder in [_enter(root, base)] if folder]
    while folders:
        name = next(folders[-1].names, None)
        if name is None:
            folders.pop()
            continue
        key = folders[-1].base + _decoded(name, root / folders[-1].base)
        if not key.startswith(prefix):
            continue
        if not key.endswith("/"):
            if found := info(root / key, key):
                yield found
        elif (inner := _enter(root, key)) and all(inner.identity != outer.identity for outer in folders):
            folders.append(inner)


def info(path: Path, key: str) -> ObjectInfo | None:
    """Size and tag of a regular file, None where there is none."""
    with disk_errors(str(path)):
        try:
            found = path.stat()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise
    if not stat.S_ISREG(found.st_mode):
        return None
    return ObjectInfo(key, found.st_size, f"{found.st_mtime_ns}-{found.st_size}")


def _enter(root: Path, base: str) -> _Folder | None:
    folder = root / base
    with disk_errors(str(folder)):
        try:
            status = folder.stat()
            return _Folder((status.st_dev, status.st_ino), base, iter(_names(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return None


def _names(folder: Path) -> list[bytes]:
    # a folder sorts as its name with a slash, because that is what its files' keys go on with
    with os.scandir(folder) as entries:
        return sorted(
            os.fsencode(entry.name) + (b"/" if _is_folder(entry) else b"")
            for entry in entries
            if not entry.name.startswith(HIDDEN)
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself or to where we may not look
        return False


def _decoded(name: bytes, folder: Path) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"{folder}: the file name {name!r} is not UTF-8, so it can be no key; rename it") from error
