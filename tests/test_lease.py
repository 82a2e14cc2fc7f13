"""One writer at a time: taking the lease, losing it, and what the next holder may not trust."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import cbir.lease
from cbir.artifacts import dump_json
from cbir.errors import LeaseError, StorageError
from cbir.lease import BEAT_SECONDS, LEASE_SECONDS, WRITER, Lease, Process, Writer, acquire, lease, unlock, writer_of
from cbir.storage import Store, open_store

ELSEWHERE = Process("node-7", 71, "another machine", "1")
HOLDS = """
import sys, time
from cbir.lease import lease
from cbir.storage import open_store
with lease(open_store(sys.argv[1]), "cbir index"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


class Clock:
    """A monotonic clock that moves when somebody sleeps; `at_sleep` is what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at_sleep = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_sleep()

    def time(self) -> float:
        raise AssertionError("the time of day is no evidence")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cbir.lease, "time", clock)
    return clock


def held_elsewhere(store: Store, **changes: object) -> Lease:
    """A lease of a process on another machine."""
    writer = replace(Writer(5, "cbir index (process 71 on node-7)", ELSEWHERE, "its holder"), **changes)  # type: ignore[arg-type]
    store.write(WRITER, dump_json(asdict(writer)))
    return Lease(store, writer)


@pytest.fixture
def other_process(store: Store) -> Iterator["subprocess.Popen[str]"]:
    """A process of this machine that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, store.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_each_holder_has_a_token_that_is_one_higher(store: Store) -> None:
    assert writer_of(store) is None
    for token in (1, 2, 3):
        with lease(store, "cbir index") as held:
            assert held.token == token
    with lease(store, "cbir index", least=9) as held:
        assert held.token == 9


def test_a_second_run_in_the_same_process_is_told_who_writes(store: Store) -> None:
    with (
        lease(store, "cbir index of somebody"),
        pytest.raises(LeaseError, match=rf"being written by cbir index of somebody \(process {os.getpid()} on .*Wait"),
    ):
        acquire(store, "cbir gc")
    acquire(store, "cbir gc")


def test_a_process_that_lives_keeps_its_lease_and_one_that_was_killed_loses_it_at_once(
    store: Store, other_process: "subprocess.Popen[str]", clock: Clock
) -> None:
    with pytest.raises(LeaseError, match=f"process {other_process.pid} on"):
        acquire(store, "cbir index")
    with pytest.raises(LeaseError, match="being written by"):
        unlock(store)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert acquire(store, "cbir index").token == 2
    assert clock.now == 0, "nobody waited"


def test_a_number_that_now_belongs_to_another_process_is_no_sign_of_life(store: Store) -> None:
    reused = replace(Process.this(), started="0")
    assert reused.is_alive() is False
    assert Process.this().is_alive() is True
    assert ELSEWHERE.is_alive() is None
    assert replace(Process.this(), space="").is_alive() is None


def test_a_holder_elsewhere_that_gives_a_sign_of_life_is_left_alone(store: Store, clock: Clock) -> None:
    theirs, said = held_elsewhere(store), list[str]()
    clock.at_sleep = lambda: theirs.renew() if clock.now > 40 else None
    with pytest.raises(LeaseError, match=r"being written by cbir index \(process 71 on node-7\)"):
        acquire(store, "cbir index", say=said.append)
    assert clock.now < 60
    assert len(said) == 1
    assert "180 s for a sign of life of cbir index (process 71 on node-7), which writes to file://" in said[0]


def test_a_silent_holder_elsewhere_is_taken_over_and_told_so(store: Store, clock: Clock) -> None:
    theirs = held_elsewhere(store)
    ours = acquire(store, "cbir index")
    assert ours.token == theirs.token + 1
    assert LEASE_SECONDS <= clock.now < LEASE_SECONDS + BEAT_SECONDS
    for act in (theirs.renew, theirs.release, lambda: list(theirs.delete(["key"]))):
        with pytest.raises(
            LeaseError, match=r"\(token 5\) was taken over by cbir index .*token 6.*finished work is reus"
        ):
            act()
    ours.renew()


def test_a_holder_that_releases_while_it_is_watched_makes_room(store: Store, clock: Clock) -> None:
    theirs = held_elsewhere(store)
    clock.at_sleep = lambda: theirs.release() if clock.now < 10 else None
    assert acquire(store, "cbir index").token == 6
    assert clock.now < 10


def test_of_two_that_take_over_one_wins(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    held_elsewhere(store)
    swap = type(store).swap

    def overtaken(self: Store, key: str, data: bytes, tag: str) -> bool:
        monkeypatch.setattr(type(store), "swap", swap)
        acquire(store, "cbir gc")
        return swap(self, key, data, tag)

    monkeypatch.setattr(type(store), "swap", overtaken)
    with pytest.raises(LeaseError, match="being written by cbir gc"):
        acquire(store, "cbir index")


def test_a_lease_whose_renewal_has_an_unknown_outcome_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = type(store).swap

    def unknown(self: Store, key: str, data: bytes, tag: str) -> bool:
        monkeypatch.setattr(type(store), "swap", swap)
        swap(self, key, data, tag)
        raise StorageError("no answer")

    held = acquire(store, "cbir index")
    monkeypatch.setattr(type(store), "swap", unknown)
    with pytest.raises(StorageError):
        held.renew()
    held.renew()


def test_an_acquisition_of_unknown_outcome_does_not_lock_its_own_process_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = type(store).create

    def unknown(self: Store, key: str, data: bytes) -> bool:
        monkeypatch.setattr(type(store), "create", create)
        create(self, key, data)
        raise StorageError("no answer")

    monkeypatch.setattr(type(store), "create", unknown)
    with pytest.raises(StorageError):
        acquire(store, "cbir index")
    assert acquire(store, "cbir index").token == 2


def test_signs_of_life_are_given_while_the_block_lasts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cbir.lease, "BEAT_SECONDS", 0.01)
    with lease(store, "cbir index"):
        first, deadline = writer_of(store), time.monotonic() + 20
        while writer_of(store) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writer_of(store) != first
    assert [thread for thread in threading.enumerate() if thread.name == "lease"] == []
    last = writer_of(store)
    assert last is not None
    assert last.has_ended()
    assert LEASE_SECONDS >= 10 * BEAT_SECONDS, "a busy machine, or a store that fails for a while, must not end a lease"


def test_deletions_are_announced_and_then_not(store: Store) -> None:
    for number in range(150):
        store.write(f"old/{number:03}", b"")
    keys = [info.key for info in store.list("old/")]
    with lease(store, "cbir gc") as held:
        deletions = held.delete(iter(keys))
        assert next(deletions) == keys[0]
        writer = writer_of(store)
        assert writer is not None
        assert writer.deleting == tuple(keys[:100])
        assert list(deletions) == keys[1:]
        writer = writer_of(store)
        assert writer is not None
        assert writer.deleting == ()
    assert list(store.list("old/")) == []


def test_what_a_dead_holder_was_deleting_is_deleted_by_the_next(store: Store) -> None:
    store.write("old/a", b"")
    with lease(store, "cbir gc") as held:
        next(held.delete(["old/b", "old/a"]))
    with lease(store, "cbir index") as held:
        assert list(store.list("old/")) == []
        assert held.doomed == frozenset()


def test_what_a_silent_holder_was_deleting_is_doomed_until_somebody_vouches_for_its_end(
    store: Store, clock: Clock
) -> None:
    store.write("old/a", b"")
    held_elsewhere(store, deleting=("old/a",))
    for _ in range(2):
        with lease(store, "cbir index") as held:
            assert held.doomed == {"old/a"}
            assert [info.key for info in store.list("old/")] == ["old/a"], "it is not ours to delete"
    assert unlock(store) is not None
    with lease(store, "cbir index") as held:
        assert held.doomed == frozenset()
        assert list(store.list("old/")) == []


def test_unlock_frees_a_lease_without_waiting(store: Store, clock: Clock) -> None:
    assert unlock(store) is None
    theirs = held_elsewhere(store)
    freed = unlock(store)
    assert freed is not None
    assert freed.owner == "cbir index (process 71 on node-7)"
    with pytest.raises(LeaseError, match="taken over by another run"):
        theirs.renew()
    assert acquire(store, "cbir index").token == 6
    assert clock.now == 0


def test_a_damaged_writer_is_named(store: Store) -> None:
    store.write(WRITER, b"{}")
    with pytest.raises(Exception, match=rf"{store.uri}/WRITER is damaged"):
        acquire(store, "cbir index")
