"""Published versions: immutable manifests, the one pointer CURRENT, roll-back, pins and garbage."""

import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cbir.artifacts import LEASE_SECONDS, StoredFile, dump_json, failpoint, live_leases, load_json, sha256_of
from cbir.errors import ArtifactError, ObjectMissing
from cbir.storage import Store

__all__ = ["Current", "Manifest", "Versions", "unique_files"]

CURRENT = "CURRENT"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """One version of an index: every file with size and hash, the settings that made it, its counts and its quality.

    `content` identifies what is searched and how; two runs that come to the same content publish one version.
    `layout` says which file plays which part (partitions by channel, encoders, id maps); see `cbir.search`.
    """

    version: int
    content: str
    config: Mapping[str, Any]
    files: tuple[StoredFile, ...]
    layout: Mapping[str, Any]
    counts: Mapping[str, int]
    work: tuple[str, ...]
    quality: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None
    created: str = ""
    write_id: str = ""
    format: int = FORMAT

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        return dump_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, place: str) -> "Manifest":
        """Back from `to_json`; ArtifactError if it was written by a newer cbir."""
        record = load_json(data, place)
        if record.get("format") != FORMAT:
            raise ArtifactError(f"{place} has format {record.get('format')}, this cbir reads {FORMAT}: update cbir")
        record["files"] = tuple(StoredFile(**file) for file in record["files"])
        return cls(**{**record, "work": tuple(record["work"])})


@dataclass(frozen=True)
class Current:
    """The content of CURRENT."""

    version: int
    manifest_sha256: str
    epoch: int
    write_id: str


class Versions:
    """The published versions of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @staticmethod
    def key(version: int) -> str:
        """Where the manifest of a version lies."""
        return f"versions/{version:020d}.json"

    def current(self) -> Current | None:
        """What CURRENT says, or None if nothing was ever published."""
        return self._current()[0]

    def _current(self) -> tuple[Current | None, str]:
        try:
            data, tag = self.store.read_tagged(CURRENT)
        except ObjectMissing:
            return None, ""
        return Current(**load_json(data, self.store.place(CURRENT))), tag

    def numbers(self) -> list[int]:
        """All committed versions, oldest first."""
        keys = (re.fullmatch(r"versions/(\d{20})\.json", info.key) for info in self.store.list("versions/"))
        return sorted(int(match[1]) for match in keys if match)

    def load(self, version: int | None = None, sha256: str | None = None) -> Manifest:
        """The manifest of a version; without a number, of the one that CURRENT names."""
        if version is None:
            current = self.current()
            if current is None:
                raise ArtifactError(f"{self.store.uri} has no published version; run `cbir index` first")
            version, sha256 = current.version, current.manifest_sha256
        key = self.key(version)
        try:
            return Manifest.from_json(self.store.read(key, sha256=sha256), f"{self.store.uri}/{key}")
        except ObjectMissing:
            known = ", ".join(map(str, self.numbers())) or "none"
            raise ArtifactError(f"{self.store.uri} has no version {version}; published are: {known}") from None

    def publish(self, manifest: Manifest) -> Manifest:
        """Commit the manifest as the next version and point CURRENT at it; a repeated call changes nothing.

        A run that died between commit and swap left a version with this content behind CURRENT: it is taken up.
        """
        current = self.current()
        if current is not None:
            published = self.load(current.version, current.manifest_sha256)
            if published.content == manifest.content:
                return published
        committed = self._orphan(manifest.content, current.version if current else 0) or self._commit(manifest, current)
        self._point_at(committed)
        return committed

    def _orphan(self, content: str, after: int) -> Manifest | None:
        newer = (self.load(number) for number in reversed(self.numbers()) if number > after)
        return next((manifest for manifest in newer if manifest.content == content), None)

    def _commit(self, manifest: Manifest, current: Current | None) -> Manifest:
        number = max([*self.numbers(), current.version if current else 0])
        while True:
            number += 1
            numbered = replace(
                manifest,
                version=number,
                parent=current.version if current else None,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                write_id=uuid.uuid4().hex,
            )
            failpoint("publish.manifest.before")
            won = self.store.create(self.key(number), numbered.to_json())
            failpoint("publish.manifest.after")
            if won:
                return numbered

    def _point_at(self, manifest: Manifest) -> None:
        """Swap CURRENT to the manifest, unless another publisher has come further in the meantime."""
        while True:
            current, tag = self._current()
            if (current is not None and current.version >= manifest.version) or self._swap(manifest, current, tag):
                return

    def _swap(self, manifest: Manifest, current: Current | None, tag: str) -> bool:
        pointer = Current(
            manifest.version, sha256_of(manifest.to_json()), (current.epoch if current else 0) + 1, uuid.uuid4().hex
        )
        failpoint("publish.current.before")
        data = dump_json(asdict(pointer))
        won = self.store.swap(CURRENT, data, tag) if current else self.store.create(CURRENT, data)
        failpoint("publish.current.after")
        return won

    def rollback(self, version: int) -> Manifest:
        """Point CURRENT at an older (or newer) committed version."""
        manifest = self.load(version)
        while True:
            current, tag = self._current()
            if current is None:
                raise ArtifactError(f"{self.store.uri} has no published version to roll back from")
            if current.version == version or self._swap(manifest, current, tag):
                return manifest

    def pin(self, version: int) -> None:
        """Keep a version through every gc."""
        self.load(version)
        self.store.write(f"pins/{version:020d}", b"")

    def unpin(self, version: int) -> None:
        """Let gc take the version again."""
        self.store.delete(f"pins/{version:020d}")

    def pinned(self) -> list[int]:
        """The pinned versions."""
        return sorted(int(info.key.removeprefix("pins/")) for info in self.store.list("pins/"))

    def garbage(self, keep: int) -> Iterator[tuple[str, int]]:
        """(key, bytes) of all that CURRENT, the last `keep` versions and the pinned ones do not need.

        Manifests come before the files that they name, so that a deletion in this order leaves no torn version.
        ArtifactError while a run is alive: its unpublished work would look like garbage.
        """
        alive = live_leases(self.store)
        if alive:
            raise ArtifactError(
                f"{self.store.uri} is being written by {', '.join(alive)}; gc waits until that run has ended "
                f"(the lease of a killed run ends by itself after {LEASE_SECONDS // 60} minutes)"
            )
        kept = {number: self.load(number) for number in self._kept(keep)}
        needed = {self.key(number) for number in kept} | {f.key for m in kept.values() for f in m.files}
        work = {prefix for manifest in kept.values() for prefix in manifest.work}
        for area in ("versions/", "candidates/", "stages/", "assets/"):
            for info in self.store.list(area):
                if info.key not in needed and info.key.rsplit("/", 1)[0] + "/" not in work:
                    yield info.key, info.size

    def _kept(self, keep: int) -> set[int]:
        current = self.current()
        last = self.numbers()[-keep:] if keep else []
        return {*last, *self.pinned(), *([current.version] if current else [])}


def unique_files(files: Iterable[StoredFile]) -> tuple[StoredFile, ...]:
    """Files sorted by key, each once."""
    return tuple(sorted({file.key: file for file in files}.values(), key=lambda file: file.key))
