"""The right to write to a store: one holder at a time, each with a token that is one higher than the last.

    WRITER   {token, owner, process, holder, beat, deleting, doomed}: who writes, and a sign of life

Safety rests on conditional writes alone: every change of WRITER is a swap, and CURRENT refuses older tokens
(`cbir.versions`), so a holder that slept through the loss of its lease changes nothing. Clocks only end the waiting: a
holder whose sign of life stands still for LEASE_SECONDS by the watcher's own monotonic clock is taken over, one of this
machine that is seen to be dead at once. The time of day is never compared.

Deletions cannot be conditional. So a holder announces in WRITER what it is about to delete, a few keys at a time. One
that was taken over in the middle of that may still delete those keys whenever it wakes, and no others: they are
`doomed`, and no version that needs one of them is published until a person says that it has ended (`unlock`). What a
holder that has certainly ended left undone, the next one does. That asks one thing more of a store: when a deletion was
answered, an earlier request to delete the same object has no effect any more.
"""

import collections
import contextlib
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cbir.artifacts import as_record, dump_json, load_json
from cbir.errors import LeaseError, ObjectMissing, StorageError
from cbir.storage import Store

__all__ = ["BEAT_SECONDS", "LEASE_SECONDS", "Lease", "Writer", "acquire", "lease", "unlock", "writer_of"]

WRITER = "WRITER"
BEAT_SECONDS = 15.0
LEASE_SECONDS = 180.0
_ANNOUNCED = 100
"""Keys that are announced at a time: one swap more for so many deletions."""

_held: set[str] = set()
"""The leases that live in this process: one that it lost without noticing (an answer never came) is not among them."""


@dataclass(frozen=True)
class Process:
    """A process, by what tells it from all others that this kernel ever ran; empty where the system does not say."""

    host: str
    pid: int
    space: str
    """Boot and process-number space of the kernel."""
    started: str

    @classmethod
    def this(cls) -> "Process":
        """The one that asks."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        except OSError:
            space = ""
        return cls(socket.gethostname(), os.getpid(), space, _started(os.getpid()))

    def is_alive(self) -> bool | None:
        """Whether it still runs, or None where that cannot be seen from here."""
        if not self.space or self.space != Process.this().space:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it exists, and belongs to somebody else
            pass
        return _started(self.pid) in ("", self.started)


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" if that cannot be seen."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


@dataclass(frozen=True)
class Writer:
    """The content of WRITER; no two states of it are ever equal."""

    token: int
    owner: str
    """What runs where, for messages; "" if nobody holds the lease."""
    process: Process
    holder: str
    """One acquisition of the lease."""
    beat: int = 0
    """Rises with every sign of life."""
    deleting: tuple[str, ...] = ()
    """What the holder deletes at this moment."""
    doomed: tuple[str, ...] = ()
    """What former holders that may still be alive were deleting when they were taken over."""

    def has_ended(self) -> bool:
        """Whether it is certain that its holder will never send another request."""
        if not self.owner:
            return True
        if self.process == Process.this():
            return self.holder not in _held
        return self.process.is_alive() is False

    def is_alive(self) -> bool:
        """Whether its holder certainly runs."""
        return not self.has_ended() and self.process.is_alive() is True


def writer_of(store: Store) -> Writer | None:
    """Who holds the lease of a store or held it last, or None if nobody ever did."""
    return _read(store)[0]


def _read(store: Store) -> tuple[Writer | None, str]:
    try:
        data, tag = store.read_tagged(WRITER)
    except ObjectMissing:
        return None, ""
    record = load_json(data, store.place(WRITER))
    with as_record(store.place(WRITER)):
        fields = {name: tuple(record[name]) for name in ("deleting", "doomed")}
        return Writer(**{**record, **fields, "process": Process(**record["process"])}), tag


def _swap(store: Store, writer: Writer, tag: str) -> bool:
    data = dump_json(asdict(writer))
    return store.swap(WRITER, data, tag) if tag else store.create(WRITER, data)


class Lease:
    """The right to write to a store, for as long as nobody takes it over; several threads may use it."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self.store = store
        self.token = writer.token
        self.doomed = frozenset(writer.doomed)
        self.holder = writer.holder

    def renew(self) -> None:
        """Give a sign of life; LeaseError if the lease was taken over."""
        self._change(lambda writer: writer)

    def delete(self, keys: Iterable[str]) -> Iterator[str]:
        """Delete objects, each announced before; yields what is gone. LeaseError if the lease was taken over."""
        remaining = iter(keys)
        while batch := tuple(itertools.islice(remaining, _ANNOUNCED)):
            self._announce(batch)
            for key in batch:
                self.store.delete(key)
                yield key
        self._announce(())

    def _announce(self, keys: tuple[str, ...]) -> None:
        self._change(lambda writer: replace(writer, deleting=keys))

    def release(self) -> None:
        """Let the next one write."""
        self._change(lambda writer: replace(writer, owner=""))

    def _change(self, change: Callable[[Writer], Writer]) -> None:
        """Swap WRITER; read before, because what became of the swap before may be unknown."""
        while True:
            writer, tag = _read(self.store)
            if writer is None or writer.holder != self.holder:
                raise self.lost(writer)
            if _swap(self.store, replace(change(writer), beat=writer.beat + 1), tag):
                return

    def lost(self, writer: Writer | None) -> LeaseError:
        """The error of a holder that was taken over."""
        by = f"{writer.owner or 'another run'} (token {writer.token})" if writer else "nobody: WRITER was deleted"
        return LeaseError(
            f"{self.store.uri}: the lease of this run (token {self.token}) was taken over by {by}, because no sign of "
            "life was seen; this run may not publish or delete any more. Run again once the other has ended: finished "
            "work is reused"
        )


def acquire(store: Store, owner: str, least: int = 1, say: Callable[[str], None] = lambda _: None) -> Lease:
    """Take the lease, with a token of at least `least`; LeaseError if another holder is alive.

    `say` is told if it takes a while to see that.
    """
    while True:
        writer, tag = _read(store)
        ended = writer is None or writer.has_ended()
        if writer is not None and not ended and not _stands_still(store, writer, say):
            continue
        if (held := _taken(store, _next(writer, owner, least, ended=ended), tag)) is not None:
            return held


def _taken(store: Store, writer: Writer, tag: str) -> Lease | None:
    """The lease, once what its last holder left undone is done; None if somebody else was faster."""
    with contextlib.ExitStack() as undo:
        _held.add(writer.holder)
        undo.callback(_held.discard, writer.holder)
        if not _swap(store, writer, tag):
            return None
        held = Lease(store, writer)
        if writer.deleting:
            collections.deque(held.delete(writer.deleting), maxlen=0)
        undo.pop_all()
        return held


def _next(last: Writer | None, owner: str, least: int, *, ended: bool) -> Writer:
    """The holder after this one. It ends the deletions of a holder that has ended, and keeps off those of one that may
    be alive."""
    process = Process.this()
    token = max(least, last.token + 1 if last else 1)
    writer = Writer(token, f"{owner} (process {process.pid} on {process.host})", process, uuid.uuid4().hex)
    if last is None:
        return writer
    if ended:
        return replace(writer, deleting=last.deleting, doomed=last.doomed)
    return replace(writer, doomed=tuple(sorted({*last.doomed, *last.deleting})))


def _stands_still(store: Store, writer: Writer, say: Callable[[str], None]) -> bool:
    """Whether the holder gives no sign of life for the time of a lease; False if the lease is free now."""
    if writer.is_alive():
        raise _busy(store, writer)
    say(
        f"waiting up to {LEASE_SECONDS:.0f} s for a sign of life of {writer.owner}, which writes to {store.uri} or "
        "died; if it certainly has ended, `cbir unlock` spares the wait"
    )
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 3)
        now, _ = _read(store)
        if now is None or now.has_ended():
            return False
        if now != writer:
            raise _busy(store, now)
    return True


def _busy(store: Store, writer: Writer) -> LeaseError:
    return LeaseError(
        f"{store.uri} is being written by {writer.owner}, and only one run at a time may write to a store. Wait until "
        "it has ended, or end it, and run again"
    )


@contextlib.contextmanager
def lease(store: Store, owner: str, least: int = 1, say: Callable[[str], None] = lambda _: None) -> Iterator[Lease]:
    """Hold the lease until the block ends; a thread gives signs of life, however long a piece of work takes."""
    held, ended = acquire(store, owner, least, say), threading.Event()

    def keep_renewing() -> None:
        with contextlib.suppress(LeaseError):
            while not ended.wait(BEAT_SECONDS):
                with contextlib.suppress(StorageError):  # the lease outlives several more attempts
                    held.renew()

    thread = threading.Thread(target=keep_renewing, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()
        _held.discard(held.holder)
        with contextlib.suppress(StorageError, LeaseError):  # who comes next sees that this one has ended
            held.release()


def unlock(store: Store) -> Writer | None:
    """Free the lease of a holder that certainly has ended; returns that holder, or None if the lease was free.

    Whoever calls this vouches for it: also for the former holders that were taken over while they were deleting.
    """
    while True:
        writer, tag = _read(store)
        if writer is None or not (writer.owner or writer.doomed):
            return None
        if writer.is_alive():
            raise _busy(store, writer)
        deleting = tuple(sorted({*writer.deleting, *writer.doomed}))
        if _swap(store, replace(writer, owner="", holder=uuid.uuid4().hex, deleting=deleting, doomed=()), tag):
            return writer
