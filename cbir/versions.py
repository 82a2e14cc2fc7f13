"""Published versions: immutable manifests, and the one pointer CURRENT with all that is decided about them."""

import contextlib
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cbir.artifacts import StoredFile, as_record, dump_json, failpoint, load_json, sha256_of
from cbir.errors import ArtifactError, LeaseError, ObjectMissing
from cbir.lease import Lease, lease
from cbir.storage import Store

__all__ = ["Current", "Manifest", "Versions", "unique_files"]

CURRENT = "CURRENT"
FORMAT = 1
_THREADS = 16


@dataclass(frozen=True)
class Manifest:
    """One version of an index: every file with size and hash, the settings that made it, its counts and its quality.

    `content` identifies what is searched and how; two runs that come to the same content publish one version.
    `layout` says which file plays which part (partitions by channel, encoders, id maps); see `cbir.search`. `plan` is
    the key of the list of the shards that it was made of.
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
    plan: str = ""
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
        with as_record(place):
            files = tuple(StoredFile(**file) for file in record["files"])
            return cls(**{**record, "files": files, "work": tuple(record["work"])})


@dataclass(frozen=True)
class Current:
    """The content of CURRENT, which is only ever swapped: all decisions about versions have one order."""

    version: int = 0
    """0 as long as none is published."""
    manifest_sha256: str = ""
    epoch: int = 0
    """Rises whenever another version becomes the current one."""
    write_id: str = ""
    fence: int = 0
    """The token of the last lease; who has an older one is refused."""
    live: tuple[int, ...] = ()
    """The versions that were published and not given up by gc since."""
    pins: tuple[int, ...] = ()
    """Those that gc must keep."""
    newest: int = 0
    """The highest number that was ever published or given up; it is never used again."""


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
        current, _ = self._current()
        return current if current.version else None

    def _current(self) -> tuple[Current, str]:
        try:
            data, tag = self.store.read_tagged(CURRENT)
        except ObjectMissing:
            return Current(live=tuple(self._committed())), ""
        place = self.store.place(CURRENT)
        record = load_json(data, place)
        if "live" not in record:  # of a store that was written before CURRENT named them
            record["live"] = self._committed()
        with as_record(place):
            return Current(**{**record, **{name: tuple(record.get(name, ())) for name in ("live", "pins")}}), tag

    def _swap(self, current: Current, tag: str, **changes: Any) -> bool:
        """Replace what CURRENT said under this tag."""
        data = dump_json(asdict(replace(current, write_id=uuid.uuid4().hex, **changes)))
        return self.store.swap(CURRENT, data, tag) if tag else self.store.create(CURRENT, data)

    def numbers(self) -> list[int]:
        """All published versions, oldest first."""
        return sorted(self._current()[0].live)

    def _committed(self) -> list[int]:
        """All versions that have a manifest, published or not, oldest first."""
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
            raise self._unpublished(version, self.numbers()) from None

    def _unpublished(self, version: int, live: Iterable[int]) -> ArtifactError:
        known = ", ".join(map(str, sorted(live))) or "none"
        return ArtifactError(f"{self.store.uri} has no version {version}; published are: {known}")

    @contextlib.contextmanager
    def writing(self, owner: str, say: Callable[[str], None] = lambda _: None) -> Iterator[Lease]:
        """Hold the lease of the store, with which one may publish and delete, until the block ends.

        Once the block begins, no run with an older lease can change what CURRENT names. LeaseError while another run
        is alive; `say` is told if it takes a while to see that.
        """
        with lease(self.store, owner, self._current()[0].fence + 1, say) as held:
            while True:
                current, tag = self._current()
                if current.fence > held.token:
                    raise self._fenced(current, held)
                if self._swap(current, tag, fence=held.token):
                    break
            yield held

    def _refuse_fenced(self, current: Current, held: Lease) -> None:
        if current.fence != held.token:
            raise self._fenced(current, held)

    def _fenced(self, current: Current, held: Lease) -> LeaseError:
        return LeaseError(
            f"{self.store.uri}: another run has taken over (fence {current.fence} in CURRENT, the token of this run is "
            f"{held.token}), because no sign of life was seen; this run may not publish or delete any more. Run again "
            "once the other has ended: finished work is reused"
        )

    def publish(self, manifest: Manifest, held: Lease, *, hold: bool = False) -> Manifest:
        """Commit the manifest as the next version and point CURRENT at it; a repeated call changes nothing.

        With `hold`, the version is published as one to roll to, and readers stay where they are. A run that died
        between commit and swap left a version with this content behind CURRENT: it is taken up, as a held one is.
        LeaseError if the lease was taken over; ArtifactError if a file of the version is not there.
        """
        current, _ = self._current()
        if current.version:
            published = self.load(current.version, current.manifest_sha256)
            if published.content == manifest.content:
                return published
        self._refuse_fenced(current, held)
        committed = self._left_behind(manifest.content, current) or self._commit(manifest, current)
        self._refuse_doomed(committed, held)
        self._point_at(committed, held, current.live, hold=hold)
        return committed

    def _refuse_doomed(self, manifest: Manifest, held: Lease) -> None:
        doomed = sorted(held.doomed.intersection(file.key for file in manifest.files))
        if doomed:
            raise ArtifactError(
                f"{self.store.uri}: a `cbir gc` that gave no sign of life was taken over while it deleted {doomed[0]}, "
                "which this version needs; should it still be alive, it could delete it again. See that it has ended, "
                "then run `cbir unlock` and `cbir index`"
            )

    def _left_behind(self, content: str, current: Current) -> Manifest | None:
        """A version with this content that is newer than the current one: unpublished, or left by a roll-back."""
        numbers = (n for n in reversed(self._committed()) if n > current.version)
        newer = (self.load(number) for number in numbers if number > current.newest or number in current.live)
        return next((manifest for manifest in newer if manifest.content == content), None)

    def _commit(self, manifest: Manifest, current: Current) -> Manifest:
        number = max([*self._committed(), current.version, current.newest])
        while True:
            number += 1
            numbered = replace(
                manifest,
                version=number,
                parent=current.version or None,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                write_id=uuid.uuid4().hex,
            )
            failpoint("publish.manifest.before")
            won = self.store.create(self.key(number), numbered.to_json())
            failpoint("publish.manifest.after")
            if won:
                return numbered

    def _point_at(self, manifest: Manifest, held: Lease, live: Collection[int], *, hold: bool) -> None:
        """Swap CURRENT to the manifest, or on `hold` only name it there, once.

        A roll-back that follows is not undone by a swap whose answer was lost: `live` are the versions from before. Its
        files are looked for after CURRENT was read: what is deleted later is deleted under a later lease, whose holder
        has changed CURRENT before, so that the swap fails.
        """
        while True:
            current, tag = self._current()
            if manifest.version == current.version or manifest.version in set(current.live).difference(live):
                return
            self._refuse_fenced(current, held)
            self._check_presence(manifest)
            if self._named(manifest, current, tag) if hold else self._pointed(manifest, current, tag):
                return

    def _named(self, manifest: Manifest, current: Current, tag: str) -> bool:
        live = tuple(sorted({*current.live, manifest.version}))
        return self._swap(current, tag, live=live, newest=max(current.newest, manifest.version))

    def _check_presence(self, manifest: Manifest) -> None:
        """ArtifactError if a file is not there; the record that says so is forgotten, so that it is made again."""
        with ThreadPoolExecutor(_THREADS) as threads:
            found = list(threads.map(self._is_there, manifest.files))
        missing = [file.key for file, there in zip(manifest.files, found, strict=True) if not there]
        for folder in {key.rpartition("/")[0] + "/" for key in missing}.intersection(manifest.work):
            self.store.delete(f"{folder}DONE.json")
        if missing:
            raise ArtifactError(
                f"{self.store.uri}: {missing[0]}, which this version needs, was deleted after it was made; its record "
                "was forgotten, and the same command makes it again"
            )

    def _is_there(self, file: StoredFile) -> bool:
        try:
            return self.store.stat(file.key).size == file.num_bytes
        except ObjectMissing:
            return False

    def _pointed(self, manifest: Manifest, current: Current, tag: str) -> bool:
        failpoint("publish.current.before")
        won = self._swap(
            current,
            tag,
            version=manifest.version,
            manifest_sha256=sha256_of(manifest.to_json()),
            epoch=current.epoch + 1,
            live=tuple(sorted({*current.live, manifest.version})),
            newest=max(current.newest, manifest.version),
        )
        failpoint("publish.current.after")
        return won

    def rollback(self, version: int) -> Manifest:
        """Point CURRENT at another published version; no lease is needed for it."""
        while True:
            current, tag = self._current()
            self._check_live(version, current)
            manifest = self.load(version)
            if current.version == version or self._pointed(manifest, current, tag):
                return manifest

    def _check_live(self, version: int, current: Current) -> None:
        if version not in current.live:
            raise self._unpublished(version, current.live)

    def pin(self, version: int) -> None:
        """Keep a version through every gc."""
        while True:
            current, tag = self._current()
            self._check_live(version, current)
            if version in current.pins or self._swap(current, tag, pins=tuple(sorted({*current.pins, version}))):
                return

    def unpin(self, version: int) -> None:
        """Let gc take the version again."""
        while True:
            current, tag = self._current()
            if version not in current.pins:
                return
            if self._swap(current, tag, pins=tuple(number for number in current.pins if number != version)):
                return

    def pinned(self) -> list[int]:
        """The pinned versions."""
        return list(self._current()[0].pins)

    def kept(self, keep: int) -> list[int]:
        """What stays if all but the last `keep` versions, the pinned ones and the current one are given up."""
        return _kept(self._current()[0], keep)

    def give_up(self, keep: int, held: Lease) -> list[int]:
        """Give up all other versions than `kept` for ever, also those that were never published; returns the kept ones.

        From then on nobody can publish, pin or roll back to them, so that their files may be deleted.
        """
        while True:
            newest = max(self._committed(), default=0)
            current, tag = self._current()
            self._refuse_fenced(current, held)
            kept = _kept(current, keep)
            if self._swap(current, tag, live=tuple(kept), newest=max(current.newest, newest)):
                return kept


def _kept(current: Current, keep: int) -> list[int]:
    last = sorted(current.live)[-keep:] if keep else []
    named = (current.version, *current.pins)
    return sorted({*last, *(number for number in named if number in current.live)})


def unique_files(files: Iterable[StoredFile]) -> tuple[StoredFile, ...]:
    """Files sorted by key, each once."""
    return tuple(sorted({file.key: file for file in files}.values(), key=lambda file: file.key))
