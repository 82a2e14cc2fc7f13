"""Images in a tar: every member in order, and no damage passed over in silence.

Python's tarfile takes a damaged header for the end of the archive and does not miss the last member's data; here
both are errors. So are the headers that a hostile tar would keep it busy with.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

from cbir.collection.names import is_image
from cbir.collection.shard import Place, RawImage
from cbir.errors import DataError
from cbir.storage import ObjectInfo, Store

__all__ = ["read_tar"]

EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
LONGEST_EXTENSION = 1 << 20
"""Bytes of a header that only describes the next member (long name, PAX record); more is taken for damage."""
MANY_DIGITS = re.compile(rb"[0-9]{256}")
"""More digits in a row than a file name has characters."""


def read_tar(store: Store, info: ObjectInfo, max_bytes: int) -> Iterator[RawImage]:
    """Every image of the tar, in its order. DataError if the tar is cut or damaged."""
    with store.open(info.key) as stream:
        yield from _TarReader(stream, store, info, max_bytes).images()


class _Header(tarfile.TarInfo):
    """A header whose damage is an error instead of the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf.strip(b"\0"):  # the end of the file, or an end block: TarFile.next knows what to do
            return super().frombuf(buf, encoding, errors)
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0 or (header.type in EXTENSIONS and header.size > LONGEST_EXTENSION):
            raise tarfile.ReadError(f"a header says that it has {header.size} bytes")
        return header

    def _proc_pax(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        """tarfile's own method, whose pattern takes a time that grows with the square of digits (CVE-2024-6232)."""
        stream = tarfile_.fileobj
        assert stream is not None
        start = stream.tell()
        if MANY_DIGITS.search(stream.read(self.size)):
            raise tarfile.ReadError("a PAX record has more than 255 digits in a row")
        stream.seek(start)
        found: tarfile.TarInfo = super()._proc_pax(tarfile_)  # type: ignore[misc]
        return found


class _TarReader:
    """One pass over one tar; knows where members lie, for hard links, and how far it came, for error messages."""

    def __init__(self, stream: BinaryIO, store: Store, info: ObjectInfo, max_bytes: int) -> None:
        self._stream, self._store, self._info, self._max_bytes = stream, store, info, max_bytes
        self._places: dict[str, Place] = {}
        self._offset, self._last = 0, "no member"

    def images(self) -> Iterator[RawImage]:
        """The images in order; folders, symbolic links, devices, hidden members and sidecars are passed over."""
        for member in self._members():
            name = _key_of(member.name)
            if not name and member.isreg():
                raise self._broken(f"the member at byte {member.offset} has no name")
            if is_image(name) and (member.isreg() or member.islnk()):
                place = self._places[name] = self._place(member)
                yield RawImage(name, place.describe(self._store.uri, name), place, self._read(place))

    def _members(self) -> Iterator[tarfile.TarInfo]:
        try:
            # ignore_zeros: whatever follows an end block is read too (joined archives) or found to be damage
            archive = tarfile.TarFile(fileobj=self._stream, ignore_zeros=True, tarinfo=_Header, encoding="utf-8")
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset > self._info.size:
                    raise tarfile.ReadError(
                        f"member {member.name!r} begins at byte {member.offset} and says that it has {member.size} "
                        f"bytes, the tar has {self._info.size}"
                    )
                yield member
                self._offset, self._last = archive.offset, f"member {member.name!r}"
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        except (tarfile.TarError, ValueError) as error:
            raise self._broken(str(error)) from error
        except RecursionError:
            raise self._broken("headers describe one another without end") from None

    def _place(self, member: tarfile.TarInfo) -> Place:
        if member.issparse():
            raise self._broken(f"member {member.name!r} is stored with holes (tar --sparse)")
        if not member.islnk():
            return Place("tar", self._info.key, member.offset_data, member.size)
        target = self._places.get(_key_of(member.linkname))
        if target is None:
            raise self._broken(f"{member.name!r} is a hard link to {member.linkname!r}, which is no image before it")
        return target

    def _read(self, place: Place) -> bytes | None:
        if place.size > self._max_bytes:
            return None
        if self._stream.tell() != place.start:  # only for hard links
            self._stream.seek(place.start)
        data = self._stream.read(place.size)
        if len(data) < place.size:
            raise self._broken(f"the data of the next member end after {len(data)} of {place.size} bytes")
        self._stream.read(-place.size % tarfile.BLOCKSIZE)  # up to the next header, so that TarFile need not seek
        return data

    def _broken(self, found: str) -> DataError:
        return DataError(
            f"{self._store.place(self._info.key)} is cut or damaged at byte {self._offset}, after {self._last}: "
            f"{found}; copy the tar again from its origin, repack it, or take it out of `images`"
        )


def _key_of(name: str) -> str:
    """The name as stored, without a leading `./`; bytes that are not UTF-8 are written as `\\xe9`."""
    while name.startswith("./"):
        name = name[2:]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
