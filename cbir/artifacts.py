"""What a store holds, and the commit protocol that keeps it true.

    stages/<stage>/<fingerprint>/part-<sha256>.<suffix>   content-addressed outputs of one piece of work
    stages/<stage>/<fingerprint>/DONE.json                the record that names them; written last, if absent
    versions/<20 digits>.json                             immutable manifests; creating one is the commit point
    CURRENT                                               readers follow it and nothing else; see `cbir.versions`
    WRITER                                                which run may publish and delete; see `cbir.lease`

A piece of work is a pure function of what its fingerprint covers. Doing it twice gives the same bytes, so late,
duplicated and killed workers are harmless: whoever creates DONE first has done it, the others take that record.
"""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cbir.errors import ArtifactError, ObjectMissing
from cbir.storage import Store

__all__ = [
    "Done",
    "StoredFile",
    "as_record",
    "create_done",
    "dump_json",
    "failpoint",
    "find_done",
    "load_json",
    "put_part",
    "read_part",
    "sha256_of",
    "stage_prefix",
]


def failpoint(name: str) -> None:
    """Die here, as by a power cut, if CBIR_FAILPOINT names this place; the way to test every step of the protocol.

    CBIR_FAILPOINT holds names, separated by commas. `name=file` kills only the process that creates the file first.
    """
    for wanted in os.environ.get("CBIR_FAILPOINT", "").split(","):
        place, _, token = wanted.partition("=")
        if place == name and (not token or _created(token)):
            os.kill(os.getpid(), signal.SIGKILL)


def _created(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def sha256_of(data: bytes | Path) -> str:
    """Hex sha256 of bytes or of a local file."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(data).hexdigest()


def dump_json(record: Mapping[str, Any]) -> bytes:
    """Canonical JSON: equal records, equal bytes."""
    return json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"


def load_json(data: bytes, place: str) -> dict[str, Any]:
    """A record back from its bytes; ArtifactError if they are not the JSON of one."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(place, str(error)) from None
    if not isinstance(record, dict):
        raise _damaged(place, "no JSON object")
    return record


@contextlib.contextmanager
def as_record(place: str) -> Iterator[None]:
    """ArtifactError that names the place of a record whose fields turn out in the block to be others than its own."""
    try:
        yield
    except (TypeError, KeyError) as error:
        raise _damaged(place, f"{type(error).__name__}: {error}") from None


def _damaged(place: str, how: str) -> ArtifactError:
    return ArtifactError(f"{place} is damaged ({how}); delete it and run `cbir index` again")


@dataclass(frozen=True)
class StoredFile:
    """One immutable file of the store."""

    role: str
    key: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Done:
    """The record of one finished piece of work; equal work gives an equal record, so it names no time and no host."""

    stage: str
    fingerprint: str
    files: tuple[StoredFile, ...]
    counts: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def file(self, role: str) -> StoredFile:
        """The file with this role."""
        for file in self.files:
            if file.role == role:
                return file
        raise ArtifactError(f"{stage_prefix(self.stage, self.fingerprint)}DONE.json names no file of role {role!r}")

    @classmethod
    def from_json(cls, data: bytes, place: str) -> "Done":
        """Back from the bytes of a DONE.json; ArtifactError if it is damaged."""
        record = load_json(data, place)
        with as_record(place):
            return cls(**{**record, "files": tuple(StoredFile(**file) for file in record["files"])})


def stage_prefix(stage: str, fingerprint: str) -> str:
    """Where the outputs of one piece of work lie."""
    return f"stages/{stage}/{fingerprint}/"


def put_part(store: Store, stage: str, fingerprint: str, role: str, data: bytes | Path, suffix: str) -> StoredFile:
    """Write one output under a name that holds its sha256."""
    digest = sha256_of(data)
    key = f"{stage_prefix(stage, fingerprint)}part-{digest}.{suffix}"
    failpoint(f"{stage}.part.before")
    store.write(key, data)
    failpoint(f"{stage}.part.after")
    return StoredFile(role, key, data.stat().st_size if isinstance(data, Path) else len(data), digest)


def create_done(store: Store, done: Done) -> Done:
    """Commit a piece of work: create DONE.json, or take the record of the attempt that was faster."""
    failpoint(f"{done.stage}.done.before")
    won = store.create(f"{stage_prefix(done.stage, done.fingerprint)}DONE.json", dump_json(asdict(done)))
    failpoint(f"{done.stage}.done.after")
    if won:
        return done
    other = find_done(store, done.stage, done.fingerprint)
    if other is None:
        raise ArtifactError(f"DONE.json of {done.stage} {done.fingerprint} vanished while it was read; run again")
    return other


def find_done(store: Store, stage: str, fingerprint: str) -> Done | None:
    """The record of this piece of work, or None if it is still to be done."""
    try:
        key = f"{stage_prefix(stage, fingerprint)}DONE.json"
        return Done.from_json(store.read(key), store.place(key))
    except ObjectMissing:
        return None


def read_part(store: Store, file: StoredFile) -> bytes:
    """An output whole and as its record says; ArtifactError if it is missing, StorageError if it is damaged."""
    try:
        return store.read(file.key, sha256=file.sha256)
    except ObjectMissing:
        raise ArtifactError(
            f"{store.place(file.key)} is missing, but the record DONE.json beside it says that it was made; "
            "delete that record and run again, so that it is made anew"
        ) from None
