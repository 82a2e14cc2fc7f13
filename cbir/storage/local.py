"""A local folder as a store."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cbir.errors import ObjectMissing, StorageError
from cbir.storage.disk import HIDDEN, disk_errors, staged, sync_folder
from cbir.storage.listing import info, walk
from cbir.storage.store import ObjectInfo, Store

__all__ = ["LocalStore"]

_LOCK_S = 30.0
_LINK_ATTEMPTS = 8
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LocalStore(Store):
    """Objects as files below a folder, which is made by the first write.

    Atomic and durable by temporary file, fsync and rename; `create` by hard link; `swap` under a lock file, with the
    content's sha256 as the tag. `write` and `delete` do not ask for the lock: an object is either swapped or written.
    """

    def __init__(self, folder: Path) -> None:
        self._root = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 - takes ".." away without following links
        self.uri = self._root.as_uri()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._root,)

    def _path(self, key: str) -> Path:
        # a key may come from a record that somebody else wrote, so it must not lead out of the folder
        if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
            raise StorageError(
                f'{self.uri}: {key!r} is no key, which is a relative path without "", "." and ".." in it'
            )
        return self._root / key

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Follows links; leaves out what is no regular file, dangling links and folders that contain themselves."""
        if "/" in prefix:
            self._path(prefix.rpartition("/")[0])
        return walk(self._root, prefix)

    def stat(self, key: str) -> ObjectInfo:
        """The tag is the time of change in nanoseconds and the size."""
        found = info(self._path(key), key)
        if found is None:
            raise ObjectMissing(f"{self.place(key)}: no such object")
        return found

    def _read(self, key: str, start: int, length: int | None) -> bytes:
        with self.open(key) as file, disk_errors(self.place(key)):
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def open(self, key: str) -> BinaryIO:
        """The file itself; a file that is replaced meanwhile stays readable in its old state."""
        path = self._path(key)
        with disk_errors(self.place(key)):
            return path.open("rb")

    def write(self, key: str, data: bytes | Path) -> None:
        """By temporary file and rename."""
        path = self._path(key)
        with disk_errors(self.place(key)):
            with staged(path.parent, _filler(data)) as temporary:
                temporary.replace(path)
            sync_folder(path.parent)

    def create(self, key: str, data: bytes) -> bool:
        """By hard link, which fails if the name is taken; UnsafeStore where the file system has no hard links."""
        path = self._path(key)
        with disk_errors(self.place(key)):
            with staged(path.parent, _filler(data)) as temporary:
                created = self._link(temporary, path, data)
            sync_folder(path.parent)
        return created

    def _link(self, temporary: Path, path: Path, data: bytes) -> bool:
        for _ in range(_LINK_ATTEMPTS):
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                found = _content(path)
                if found is not None:
                    return found == data
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise self._unsafe(f"the file system makes no hard links ({error.strerror})") from error
                raise
            else:
                return True
        raise StorageError(f"{path}: the name is taken but leads to no file; remove it and run again")

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The tag is the content's sha256."""
        data = self.read(key)
        return data, hashlib.sha256(data).hexdigest()

    def swap(self, key: str, data: bytes, tag: str) -> bool:
        """Under the lock file of the folder; the system frees the lock of a process that dies."""
        path = self._path(key)
        with disk_errors(self.place(key)):
            if not path.parent.is_dir():
                return False
            with _locked(path.parent):
                found = _content(path)
                if found is None or (found != data and hashlib.sha256(found).hexdigest() != tag):
                    return False
                with staged(path.parent, _filler(data)) as temporary:
                    temporary.replace(path)
                sync_folder(path.parent)
        return True

    def delete(self, key: str) -> None:
        """Folders stay."""
        path = self._path(key)
        with disk_errors(self.place(key)):
            if path.parent.is_dir():
                path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        """The file, if there is one."""
        path = self._path(key)
        return path if path.is_file() else None


def _filler(data: bytes | Path) -> Callable[[BinaryIO], object]:
    def fill(file: BinaryIO) -> None:
        if isinstance(data, Path):
            with disk_errors(str(data)), data.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        else:
            file.write(data)

    return fill


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # flock, not lockf: it also keeps the threads of one process apart
    with (folder / f"{HIDDEN}lock").open("ab") as file:
        deadline = time.monotonic() + _LOCK_S
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise StorageError(f"{folder}: locked by another process for {_LOCK_S:.0f} s; see what it is doing")
            time.sleep(0.005)
        yield


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
