"""One schedule: what runs, what goes wrong, and what has to hold at every moment.

Runs, gc, roll-backs, pins and readers are the real ones (`cbir.artifacts`, `cbir.lease`, `cbir.versions`,
`cbir.garbage`) over the real S3 client; simulated are what lies below it, clocks, threads and processes.
"""

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

import cbir.artifacts
import cbir.lease
import cbir.storage.retry
import cbir.storage.s3
import cbir.versions
from cbir.artifacts import (
    Done,
    StoredFile,
    create_done,
    dump_json,
    find_done,
    put_part,
    read_part,
    sha256_of,
    stage_prefix,
)
from cbir.errors import ArtifactError, CbirError, LeaseError, StorageError
from cbir.garbage import sweep
from cbir.lease import Process, unlock
from cbir.storage import S3Settings
from cbir.storage.s3 import S3Store
from cbir.versions import Manifest, Versions
from tests.simulation.server import Client, Faults, Server
from tests.simulation.world import Actor, Machine, World

__all__ = ["Schedule", "in_simulation"]

PIECES = 5
DAY_S = 86_400.0
SETTINGS = S3Settings(attempts=4, patience_s=0.01)


class Schedule:
    """A store and all that happens to it, by a seed."""

    current: "Schedule"
    """The one that runs, for what is put in place of the operating system."""

    def __init__(self, seed: int, server: Callable[..., Server] = Server) -> None:
        self.world = World(seed)
        self.happened: Counter[str] = Counter()
        self.log: list[str] = []
        self.server = server(self.world, self._draw_faults(), self._on_change, self.happened)
        self.pointer = cbir.versions.Current()
        self._needs: dict[int, dict[str, str]] = {}
        self._needed: dict[str, str] = {}
        self._given_up: set[int] = set()
        self._gained: defaultdict[int, set[int]] = defaultdict(set)
        self._tokens: set[int] = set()
        self._holders: set[Machine] = set()

    def _draw_faults(self) -> Faults:
        draw = self.world.random
        begin = draw.choice((0.0, 0.0, draw.uniform(0, 100)))
        return Faults(
            fault=draw.choice((0.0, 0.03, 0.15)),
            crash=draw.choice((0.0, 0.01, 0.04)),
            stall=draw.choice((0.0, 0.01, 0.04)),
            away=(begin, begin + draw.uniform(0, 90) if begin else begin),
        )

    def run(self) -> None:
        """Everything at once; afterwards the store must be of use, and gc must find all that is not needed."""
        Schedule.current = self
        cbir.lease._held.clear()
        draw = self.world.random
        if draw.random() < 0.7:
            self._leave_unfinished_work()
        for _ in range(draw.choice((1, 2, 2, 2, 3, 8))):
            self._start("run", self._build, times=draw.choice((1, 1, 2)))
        for _ in range(draw.choice((0, 1, 1, 2))):
            self._start("gc", self._collect, times=1)
        for _ in range(draw.choice((0, 1, 1))):
            self._start("reader", self._read, times=1)
        for _ in range(draw.choice((0, 0, 1))):
            self._start("operator", self._operate, times=1)
        self.world.run()
        self.server.settle()
        self._start("the last", self._end_well, times=1)
        self.world.run()

    def _leave_unfinished_work(self) -> None:
        """Every piece of work as a run that died left it: for gc it is garbage, for the next run it is done."""
        for piece in range(PIECES):
            data, folder = f"the piece {piece:064x}".encode(), stage_prefix("merge", f"{piece:064x}")
            part = StoredFile("index", f"{folder}part-{sha256_of(data)}.faiss", len(data), sha256_of(data))
            self.server.put(part.key, data)
            self.server.put(f"{folder}DONE.json", dump_json(asdict(Done("merge", f"{piece:064x}", (part,), {}))))

    def store(self) -> S3Store:
        """A client of the store, as every process has its own."""
        return S3Store("s3://bucket", SETTINGS)

    def _start(self, name: str, what: Callable[[], None], times: int) -> None:
        """A process, which is started again a while after it has ended, as cron does."""
        draw, number = self.world.random, self.world.number()
        host = f"host {draw.randrange(2)}"
        machine = Machine(f"{name} {number}", host, number, draw.uniform(-DAY_S, DAY_S), collects=name == "gc")

        def live() -> None:
            try:
                what()
            except (ArtifactError, LeaseError, StorageError) as error:
                self.happened[type(error).__name__] += 1
                self.happened["refused because taken over"] += "taken over" in str(error)
                self.happened["refused because another is alive"] += "being written by" in str(error)
                self.happened["refused because doomed"] += "cbir unlock" in str(error)
            finally:
                machine.ended = True
                if times > 1:
                    self._start(name, what, times - 1)

        self.world.spawn(machine, live, draw.choice((0.0, 1.0, 30.0, 1000.0)) * draw.random())

    # what processes do

    @contextlib.contextmanager
    def _writing(self, versions: Versions, owner: str) -> Iterator[cbir.lease.Lease]:
        self._holders.add(self.world.machine)
        with versions.writing(owner) as held:
            assert held.token not in self._tokens, f"token {held.token} was given twice"
            self._tokens.add(held.token)
            self.world.machine.token = held.token
            self.happened["leases"] += 1
            yield held

    def _build(self) -> None:
        """A run: shared pieces of work and a file beside them, then publish."""
        self._publish(self.world.random.randrange(PIECES))

    def _publish(self, content: int) -> Manifest:
        versions = Versions(self.store())
        with self._writing(versions, "cbir index") as held:
            candidate = self._candidate(versions.store, content)
            published = versions.publish(candidate, held)
        assert published.version in {*self.pointer.live, *self._given_up}, "acknowledged, but not published"
        self.happened["publications"] += 1
        return published

    def _candidate(self, store: S3Store, content: int) -> Manifest:
        files, work = [self._asset(store, content % 2)], []
        for piece in (content, (content + 1) % PIECES):
            files += self._work(store, f"{piece:064x}").files
            work.append(stage_prefix("merge", f"{piece:064x}"))
        return Manifest(0, str(content), {}, tuple(files), {}, {"indexed": 1}, tuple(work))

    def _work(self, store: S3Store, fingerprint: str) -> Done:
        if (done := find_done(store, "merge", fingerprint)) is not None:
            self.happened["pieces reused"] += 1
            return done
        part = put_part(store, "merge", fingerprint, "index", f"the piece {fingerprint}".encode(), "faiss")
        return create_done(store, Done("merge", fingerprint, (part,), {}))

    def _asset(self, store: S3Store, number: int) -> StoredFile:
        data = f"weights {number}".encode()
        file = StoredFile("asset", f"assets/{sha256_of(data)}", len(data), sha256_of(data))
        store.create(file.key, data)
        return file

    def _collect(self) -> None:
        versions = Versions(self.store())
        with self._writing(versions, "cbir gc") as held:
            for _ in sweep(versions, self.world.random.randrange(3), held):
                self.happened["deletions"] += 1

    def _operate(self) -> None:
        """Roll-backs and pins."""
        versions, draw = Versions(self.store()), self.world.random
        for _ in range(4):
            self.world.sleep(draw.uniform(0, 60))
            number = draw.choice(versions.numbers() or [1])
            draw.choice((versions.rollback, versions.pin, versions.unpin))(number)
            self.happened["operations"] += 1

    def _read(self) -> None:
        versions, draw = Versions(self.store()), self.world.random
        for _ in range(4):
            self.world.sleep(draw.uniform(0, 60))
            if (current := versions.current()) is not None:
                self._read_version(versions, current)

    def _read_version(self, versions: Versions, current: cbir.versions.Current) -> None:
        """All files of a version are there and belong together, as long as gc has not given it up."""
        try:
            manifest = versions.load(current.version, current.manifest_sha256)
            for file in manifest.files:
                read_part(versions.store, file)
        except ArtifactError:
            assert current.version in self._given_up, f"version {current.version} cannot be read"
            return
        content = int(manifest.content)
        wanted = {f"the piece {piece % PIECES:064x}".encode() for piece in (content, content + 1)}
        wanted.add(f"weights {content % 2}".encode())
        assert {file.sha256 for file in manifest.files} == {sha256_of(data) for data in wanted}, "a mixture"
        self.happened["reads"] += 1

    def _end_well(self) -> None:
        """The store is of use after all that: publish, collect, read; and nothing is left that nobody needs."""
        try:
            self._end()
        except CbirError as error:
            raise AssertionError(f"the store is of no use any more: {error}") from error

    def _end(self) -> None:
        assert all(machine.crashed or machine.ended for machine in self._holders)
        for _ in range(2):  # the first may find that a piece is gone, and forgets its record
            with contextlib.suppress(ArtifactError):
                self._publish(0)
                break
            unlock(self.store())
        else:
            self._publish(0)
        versions = Versions(self.store())
        assert versions.load().content == "0"
        self.world.machine.collects = True
        with self._writing(versions, "cbir gc") as held:
            list(sweep(versions, 1, held))
        self._read_version(versions, self.pointer)
        records = {f"{file.rpartition('/')[0]}/DONE.json" for file in self._needed if file.startswith("stages/")}
        assert set(self.server.objects) <= {*self._needed, *records, "CURRENT", "WRITER"}, "gc left something"

    # what has to hold

    def _on_change(self, machine: Machine, token: int, key: str, data: bytes | None) -> None:
        digest = None if data is None else sha256_of(data)
        self.log.append(f"{self.world.now:.6f} {machine.name}, token {token}: {key} = {digest}")
        if key == "CURRENT":
            assert data is not None, "CURRENT was deleted"
            self._point(machine, token, json.loads(data))
        elif key in self._needed:
            assert digest == self._needed[key], f"{machine.name} changed or deleted {key}, which a version needs"

    def _point(self, machine: Machine, token: int, record: dict[str, Any]) -> None:
        now = cbir.versions.Current(**{**record, "live": tuple(record["live"]), "pins": tuple(record["pins"])})
        before, self.pointer = self.pointer, now
        moved = now.version != before.version
        assert now.epoch == before.epoch + moved, "epochs rise by one with each move"
        assert now.fence >= before.fence, "fences rise"
        assert now.newest >= max(before.newest, *now.live, 0), "no number is used again"
        assert not self._given_up.intersection(now.live), "what was given up is never live again"
        lost, gained = set(before.live) - set(now.live), set(now.live) - set(before.live)
        newest = max(self._tokens, default=0)
        if lost:
            assert machine.collects, f"versions {lost} were lost"
            assert not lost.intersection((before.version, *before.pins)), "gc leaves the current and the pinned ones"
        if lost or gained:
            assert token == newest, f"{machine.name} wrote with token {token}, the lease was at {newest}"
        assert not (moved and token and now.version in self._gained[token]), "a roll-back was undone"
        self._gained[token] |= gained
        self._given_up |= lost
        self._needs |= {number: self._whole(number) for number in gained}
        self._needed = {key: digest for number in now.live for key, digest in self._needs[number].items()}
        if now.version:
            assert self._needed[Versions.key(now.version)] == now.manifest_sha256, "CURRENT names another manifest"

    def _whole(self, number: int) -> dict[str, str]:
        """sha256 by key of the objects of a version that is published now; all are there."""
        key = Versions.key(number)
        assert key in self.server.objects, f"version {number} is published, but its manifest is not there"
        data = self.server.objects[key]
        needs = {key: sha256_of(data)}
        for file in Manifest.from_json(data, key).files:
            found = self.server.objects.get(file.key)
            assert found is not None, f"version {number} is published without {file.key}"
            assert sha256_of(found) == file.sha256, f"version {number} is published with a damaged {file.key}"
            needs[file.key] = file.sha256
        return needs


# what stands in place of the operating system, the network and chance


class _Event:
    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Actor] = []

    def set(self) -> None:
        self._is_set = True
        for actor in self._waiting:
            Schedule.current.world.wake(actor)

    def wait(self, seconds: float) -> bool:
        world = Schedule.current.world
        self._waiting.append(world.actor)
        if not self._is_set:
            world.sleep(seconds)
        self._waiting.remove(world.actor)
        return self._is_set


class _Thread:
    def __init__(self, target: Callable[[], None], **_: Any) -> None:
        self._target = target

    def start(self) -> None:
        world = Schedule.current.world
        self._actor = world.spawn(world.machine, self._target)

    def join(self) -> None:
        Schedule.current.world.join(self._actor)


class _InThisThread:
    def __init__(self, _: int) -> None:
        pass

    def __enter__(self) -> "_InThisThread":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


def _this() -> Process:
    machine = Schedule.current.world.machine
    return Process(machine.host, machine.pid, machine.host, str(machine.pid))


@pytest.fixture(scope="module")
def in_simulation() -> Iterator[None]:
    """Simulated clocks, threads, processes and network under the real code."""

    def sleep(seconds: float) -> None:
        Schedule.current.world.sleep(seconds)

    def monotonic() -> float:
        """Every process counts from another moment."""
        world = Schedule.current.world
        return world.now + world.machine.pid * 1e4

    def wall() -> float:
        world = Schedule.current.world
        return world.now + world.machine.wall_skew_s

    def is_alive(process: Process) -> bool | None:
        schedule = Schedule.current
        if process.host != schedule.world.machine.host:
            return None
        return not any(m.pid == process.pid and (m.crashed or m.ended) for m in schedule._holders)

    def dumps(record: Mapping[str, Any], indent: int, sort_keys: bool) -> str:
        """In one line, which takes a fifth of the time."""
        return json.dumps(record, sort_keys=sort_keys)

    def number() -> SimpleNamespace:
        return SimpleNamespace(hex=f"{Schedule.current.world.number():032x}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cbir.artifacts, "json", SimpleNamespace(dumps=dumps, loads=json.loads))
        patch.setattr(cbir.storage.s3, "_client", lambda *_: Client(Schedule.current.server))
        patch.setattr(cbir.storage.retry, "time", SimpleNamespace(sleep=sleep, monotonic=monotonic))
        patch.setattr(cbir.storage.retry, "_jitter", SimpleNamespace(uniform=lambda low, high: (low + high) / 2))
        patch.setattr(cbir.lease, "time", SimpleNamespace(sleep=sleep, monotonic=monotonic, time=wall))
        patch.setattr(cbir.lease, "threading", SimpleNamespace(Event=_Event, Thread=_Thread))
        patch.setattr(cbir.lease, "uuid", SimpleNamespace(uuid4=number))
        patch.setattr(cbir.lease.Process, "this", staticmethod(_this))
        patch.setattr(cbir.lease.Process, "is_alive", is_alive)
        patch.setattr(cbir.versions, "uuid", SimpleNamespace(uuid4=number))
        patch.setattr(cbir.versions, "time", SimpleNamespace(gmtime=wall, strftime=lambda form, now: f"{form} {now}"))
        patch.setattr(cbir.versions, "ThreadPoolExecutor", _InThisThread)
        yield
