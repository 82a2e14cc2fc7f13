"""The promises of every store."""

import hashlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cbir.errors import StorageError, UnsafeStore
from cbir.storage.disk import HIDDEN, disk_errors, staged, sync_folder

__all__ = ["ObjectInfo", "Store"]

_COPY_BYTES = 4 << 20
_TRANSFERS = 3  # a byte that was flipped on the way is right the next time


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing. `tag` changes whenever the content does."""

    key: str
    size: int
    tag: str


class Store(ABC):
    """Objects by key below one URI.

    A key is a relative path with "/" between its parts, without "." and "..". Names whose last part begins with
    ".cbir-" belong to the store and are not listed. A store may be used by several threads at once and may be pickled.
    Every method raises StorageError, with the URI and a remedy in its message, where it cannot do as it says, and
    ObjectMissing where an object is needed but none is there.
    """

    uri: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def place(self, key: str) -> str:
        """The object's own URI, for messages."""
        return f"{self.uri}/{key}"

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with the prefix, in byte order of the keys, as a stream."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and tag of one object."""

    def read(self, key: str, *, start: int = 0, length: int | None = None, sha256: str | None = None) -> bytes:
        """The object or a range of it; a range beyond the end is cut, as in a file.

        With a `sha256`, what is returned has it; StorageError if it has not after several transfers.
        """
        if start < 0 or (length is not None and length < 0):
            raise ValueError(f"a range begins at {start} and is {length} bytes long")
        if sha256 is None:
            return self._read(key, start, length)
        for _ in range(_TRANSFERS):
            data = self._read(key, start, length)
            if (found := hashlib.sha256(data).hexdigest()) == sha256:
                return data
        raise _damaged(self.place(key), sha256, found)

    @abstractmethod
    def _read(self, key: str, start: int, length: int | None) -> bytes:
        """The bytes as they arrive, of the right number."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable reader for large objects, for one thread; all of it comes from one state of the object."""

    @abstractmethod
    def write(self, key: str, data: bytes | Path) -> None:
        """Put bytes, or the content of a file, whatever lies there; atomic. For names that follow from the content."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put if nothing lies there: True if the key now holds exactly these bytes, False if it holds others.

        Bytes that only this writer can have written (a write_id) make True mean "this writer won".
        """

    @abstractmethod
    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The object and the tag that `swap` wants; this tag need not be the one of `stat` and `list`."""

    @abstractmethod
    def swap(self, key: str, data: bytes, tag: str) -> bool:
        """Replace if the tag is still the same: True if the key now holds exactly these bytes, False if it was changed.

        A missing object counts as changed. The bytes must be unique, like those of `create`.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if it is there."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object lies as a local file, if it does."""

    def fetch(self, key: str, path: Path, sha256: str) -> Path:
        """Copy the object to a local file, which appears whole and with the right sha256 or not at all."""
        with disk_errors(str(path)):
            with staged(path.parent, lambda file: self._copy(key, file, sha256)) as temporary:
                temporary.replace(path)
            sync_folder(path.parent)
        return path

    def _copy(self, key: str, file: BinaryIO, sha256: str) -> None:
        for _ in range(_TRANSFERS):
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()
            with self.open(key) as source:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() == sha256:
                return
        raise _damaged(self.place(key), sha256, digest.hexdigest())

    def probe(self) -> None:
        """Prove on a passing object that conditional writes are honoured; UnsafeStore where they are not.

        Publishing rests on them: a store that ignores them would lose versions.
        """
        key = f"{HIDDEN}probe-{uuid.uuid4().hex}"
        try:
            self._prove_create(key)
            self._prove_swap(key)
        finally:
            self.delete(key)

    def _prove_create(self, key: str) -> None:
        if not self.create(key, f"1 {key}".encode()):
            raise self._unsafe("If-None-Match is refused although no object lies there")
        if self.create(key, f"2 {key}".encode()):
            raise self._unsafe("If-None-Match is ignored: an existing object was overwritten")

    def _prove_swap(self, key: str) -> None:
        _, tag = self.read_tagged(key)
        if not self.swap(key, f"3 {key}".encode(), tag):
            raise self._unsafe("If-Match is refused although the object was not changed")
        if self.swap(key, f"4 {key}".encode(), tag):
            raise self._unsafe("If-Match is ignored: an object that had changed was overwritten")

    def _unsafe(self, what: str) -> UnsafeStore:
        return UnsafeStore(
            f"{self.uri}: {what}; versions published here could be lost. Use an S3 server with conditional PUT, "
            "or a local file system with hard links"
        )


def _damaged(place: str, expected: str, found: str) -> StorageError:
    return StorageError(
        f"{place}: the bytes have sha256 {found}, recorded is {expected}; the object was damaged or overwritten. "
        "Delete it, and the DONE.json beside it if there is one, and run again, so that it is made anew"
    )
