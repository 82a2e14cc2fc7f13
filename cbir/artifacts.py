"""What a store holds, and the commit protocol that keeps it true.

    stages/<stage>/<fingerprint>/part-<sha256>.<suffix>   content-addressed outputs of one piece of work
    stages/<stage>/<fingerprint>/DONE.json                the record that names them; written last, if absent
    versions/<20 digits>.json                             immutable manifests; creating one is the commit point
    CURRENT                                               the one mutable object; readers follow it and nothing else
    leases/<write id>.json                                runs that are alive, so that gc leaves their work alone
    pins/<20 digits>                                      versions that gc must keep

A piece of work is a pure function of what its fingerprint covers. Doing it twice gives the same bytes, so late,
duplicated and killed workers are harmless: whoever creates DONE first has done it, the others take that record.
"""

import contextlib
import hashlib
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cbir.errors import ArtifactError, ObjectMissing
from cbir.storage import Store

__all__ = [
    "LEASE_SECONDS",
    "Done",
    "Lease",
    "StoredFile",
    "create_done",
    "dump_json",
    "failpoint",
    "find_done",
    "lease",
    "live_leases",
    "put_part",
    "sha256_of",
    "stage_prefix",
]

LEASE_SECONDS = 600


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
    def from_json(cls, data: bytes) -> "Done":
        """Back from the bytes of a DONE.json."""
        record = json.loads(data)
        record["files"] = tuple(StoredFile(**file) for file in record["files"])
        return cls(**record)


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
        return Done.from_json(store.read(f"{stage_prefix(stage, fingerprint)}DONE.json"))
    except ObjectMissing:
        return None


@contextlib.contextmanager
def lease(store: Store, owner: str) -> Iterator["Lease"]:
    """Hold a lease while a run is alive; `Lease.renew` is to be called more often than every LEASE_SECONDS."""
    held = Lease(store, owner)
    held.renew()
    try:
        yield held
    finally:
        store.delete(held.key)


class Lease:
    """A sign of life of one run."""

    def __init__(self, store: Store, owner: str) -> None:
        self.store, self.owner = store, owner
        self.key = f"leases/{uuid.uuid4().hex}.json"
        self._renewed = 0.0

    def renew(self) -> None:
        """Extend the lease if a third of it has passed."""
        if time.monotonic() - self._renewed > LEASE_SECONDS / 3 or not self._renewed:
            self.store.write(self.key, dump_json({"owner": self.owner, "expires": time.time() + LEASE_SECONDS}))
            self._renewed = time.monotonic()


def live_leases(store: Store, now: float | None = None) -> list[str]:
    """The owners of the leases that have not ended."""
    alive = []
    for info in store.list("leases/"):
        with contextlib.suppress(ObjectMissing):
            record = json.loads(store.read(info.key))
            if record["expires"] > (time.time() if now is None else now):
                alive.append(str(record["owner"]))
    return alive
