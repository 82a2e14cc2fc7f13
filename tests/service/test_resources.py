"""Workers that run out of memory, stop, or wake when their work was done by others; and a disk that fills late."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from cbir.artifacts import Done, find_done
from cbir.spec import fingerprint
from cbir.storage import open_store
from pipelines.executor import _lost_error
from pipelines.work import Task, Worker
from tests.service.runs import spawned

pytestmark = pytest.mark.service


@dataclass(frozen=True)
class Stopping(Task):
    """Writes an output and a record; the process that does it first is stopped in between, and says so in a file."""

    stage: ClassVar[str] = "stopping"
    place: str = ""

    def run(self, worker: Worker) -> Done:
        parts = [self.put(worker, "part", b"the same bytes", "bin")]
        if not Path(self.place).exists():
            Path(self.place).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.finish(worker, parts, {"images": 1})


def do(store: str, task: Task) -> None:
    Worker(store).do(task)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


OUT_OF_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 22GB / 23GB
OOM kill reason: Memory usage 2391195648B exceeded threshold
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""


def test_a_worker_that_was_killed_for_memory_says_so_and_what_to_do() -> None:
    said = str(_lost_error({"extract a.tar": OUT_OF_MEMORY, "extract b.tar": "The actor died.\nIts process is gone."}))
    assert "  extract a.tar: 1 worker(s) were killed due to the node running low on memory. Memory on the node" in said
    assert "22GB / 23GB; ask for fewer workers, or for `pools.<pool>.memory_gb`" in said
    assert "documentation" not in said
    assert "  extract b.tar: Its process is gone.\n" in said


def test_a_worker_that_wakes_when_its_work_was_done_by_another_changes_nothing(tmp_path: Path) -> None:
    """That a stopped worker is killed at its deadline, where it can be reached, is tested with the scheduler."""
    uri = str(tmp_path / "store")
    task = Stopping("a shard", fingerprint("stopping", uri), str(tmp_path / "stopped"))
    child = spawned.Process(target=do, args=(uri, task))
    child.start()
    try:
        wait_until(lambda: child.pid is not None and (tmp_path / "stopped").exists() and is_stopped(child.pid))
        done, store = Worker(uri).do(task).done, open_store(uri)
        before = {info.key: (info.tag, store.read(info.key)) for info in store.list()}
    finally:
        os.kill(child.pid or 0, signal.SIGCONT)
        child.join(60)
    assert child.exitcode == 0
    assert find_done(store, task.stage, task.fingerprint) == done
    after = {info.key: (info.tag, store.read(info.key)) for info in store.list()}
    assert {key: data for key, (_, data) in after.items()} == {key: data for key, (_, data) in before.items()}
    assert after[f"{task.prefix}DONE.json"] == before[f"{task.prefix}DONE.json"], "the record was written once"
