"""Files that appear whole or not at all, and what the operating system's errors mean."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cbir.errors import ObjectMissing, StorageError

__all__ = ["DISK_FULL", "HIDDEN", "disk_errors", "staged", "sync_folder"]

HIDDEN = ".cbir-"
"""The names that begin so are the store's own: temporary files, locks and probes."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISSING = {errno.ENOENT, errno.EISDIR}
_BLOCKED = {errno.ENOTDIR, errno.EEXIST}


@contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Turn the operating system's errors into StorageError or ObjectMissing that name the place."""
    try:
        yield
    except OSError as error:
        raise _explained(error, place) from error


def _explained(error: OSError, place: str) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno in _MISSING:
        return ObjectMissing(f"{place}: no such object")
    if error.errno in DISK_FULL:
        return StorageError(f"{place}: no space is left ({reason}); free some or choose another folder, and run again")
    if error.errno in _FORBIDDEN:
        return StorageError(f"{place}: not permitted ({reason}); see its owner and mode (we are user {os.getuid()})")
    if error.errno in _BLOCKED:
        return StorageError(f"{place}: a file lies where a folder is needed ({reason}); move it or choose another")
    return StorageError(f"{place}: {reason}; see whether the disk is mounted and healthy")


@contextmanager
def staged(folder: Path, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A temporary file of the folder with its content safely on the disk; what is not renamed is removed again."""
    _make_folder(folder)
    temporary = folder / f"{HIDDEN}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
