"""The scheduler: dead, stuck and failing workers, and what is left behind."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cbir.artifacts import Done
from cbir.config import Config, Pool, parse_config
from cbir.errors import CbirError, DataError, StorageError
from cbir.spec import fingerprint
from pipelines.executor import Executor, InlineExecutor, RayExecutor
from pipelines.work import Report, Task, Worker

pytestmark = pytest.mark.service

POOL = Pool(cpus=0)
"""Of no processors, so that Ray makes several executors' actors at once on two of them."""


@dataclass(frozen=True)
class Trial(Task):
    """Does what it is told."""

    stage: ClassVar[str] = "trial"
    deed: str = "succeed"
    place: str = ""
    size: int = 0

    @property
    def weight(self) -> int:
        return self.size

    def run(self, worker: Worker) -> Done:
        if self.place:
            Path(self.place).write_text(str(os.getpid()))
        if self.deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deed == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.deed == "hang":
            time.sleep(600)
        if self.deed == "refuse":
            raise StorageError("s3://bucket/x: access denied")
        if self.deed == "stumble":
            raise KeyError("a mistake in the code")
        facts = {"pid": os.getpid(), "scratch": str(worker.scratch("x").parent)}
        return self.finish(worker, [], {"images": 1}, facts)


def trial(name: str, deed: str = "succeed", **fields: Any) -> Trial:
    return Trial(name, fingerprint("trial", name, time.time_ns()), deed, **fields)


class Watcher:
    """Keeps the reports by task name."""

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}
        self.ticks = 0

    def on_report(self, task: Task, report: Report) -> None:
        self.reports[task.name] = report

    def on_tick(self) -> None:
        self.ticks += 1


def run(executor: Executor, tasks: list[Task], pool: Pool = POOL) -> Watcher:
    watcher = Watcher()
    executor.run(tasks, pool, watcher.on_report, watcher.on_tick)
    return watcher


@pytest.fixture(scope="module")
def ray_config(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Config:
    return parse_config(settings(store=str(tmp_path_factory.mktemp("store")), workers=2), "the test")


@pytest.fixture(scope="module")
def on_ray(ray_config: Config) -> Iterator[RayExecutor]:
    executor = RayExecutor(ray_config)
    yield executor
    executor.close()


@pytest.fixture
def inline(tmp_path: Path) -> Iterator[InlineExecutor]:
    executor = InlineExecutor(str(tmp_path / "store"))
    yield executor
    executor.close()


@pytest.fixture(params=["inline", "on_ray"])
def executor(request: pytest.FixtureRequest) -> Executor:
    chosen: Executor = request.getfixturevalue(request.param)
    return chosen


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_every_task_is_reported_once(executor: Executor) -> None:
    watcher = run(executor, [trial(f"shard {number}") for number in range(7)])
    assert sorted(watcher.reports) == [f"shard {number}" for number in range(7)]
    assert all(report.done.counts == {"images": 1} for report in watcher.reports.values())
    assert watcher.ticks > 0


def test_no_tasks_are_done_at_once(executor: Executor) -> None:
    assert run(executor, []).reports == {}


def test_an_expected_error_comes_with_its_class_and_the_task(executor: Executor) -> None:
    with pytest.raises(StorageError, match=r"^trial shard 3: s3://bucket/x: access denied$"):
        run(executor, [trial("shard 3", "refuse")])
    assert len(run(executor, [trial("afterwards")]).reports) == 1


def test_a_mistake_shows_where_it_happened(on_ray: RayExecutor, inline: InlineExecutor) -> None:
    with pytest.raises(KeyError, match="a mistake in the code") as caught:
        run(on_ray, [trial("shard 4", "stumble")])
    assert not isinstance(caught.value, CbirError)
    assert "test_executor.py" in str(caught.value), "the traceback of the worker"
    with pytest.raises(KeyError):
        run(inline, [trial("shard 4", "stumble")])


def test_a_task_that_kills_its_worker_does_not_stop_the_others(on_ray: RayExecutor) -> None:
    watcher = Watcher()
    tasks: list[Task] = [trial("hostile", "die"), *(trial(f"shard {number}") for number in range(6))]
    with pytest.raises(DataError, match=r"(?s)1 task\(s\) killed their worker 3 times.*trial hostile: .*run"):
        on_ray.run(tasks, POOL, watcher.on_report, watcher.on_tick)
    assert sorted(watcher.reports) == [f"shard {number}" for number in range(6)]


def test_a_run_in_which_every_task_kills_its_worker_stops(on_ray: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.executor.MAX_DEATHS", 1)
    monkeypatch.setattr("pipelines.executor.MAX_LOST", 2)
    watcher = Watcher()
    with pytest.raises(DataError, match=r"the run stops, because so many point to the machine"):
        on_ray.run([trial(f"{number}", "die", size=9 - number) for number in range(9)], POOL, watcher.on_report, int)
    assert watcher.reports == {}


def test_a_stuck_worker_is_killed_at_the_deadline(
    ray_config: Config, on_ray: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.executor.MAX_DEATHS", 1)
    impatient, watcher = RayExecutor(ray_config, deadline_s=600.0), Watcher()
    run(impatient, [trial("warm up"), trial("both")])
    impatient._deadline_s = 3.0
    tasks: list[Task] = [trial("stuck", "stop", place=str(tmp_path / "pid")), trial("shard 1"), trial("shard 2")]
    with pytest.raises(DataError, match=r"trial stuck: not done after 3 s, the worker was killed"):
        impatient.run(tasks, POOL, watcher.on_report, watcher.on_tick)
    assert sorted(watcher.reports) == ["shard 1", "shard 2"]
    assert ends(int((tmp_path / "pid").read_text()))
    impatient.close()
    assert (
        len(run(on_ray, [trial("Ray is still there: it is not the one who started it that was closed")]).reports) == 1
    )


def test_a_cluster_with_room_for_fewer_actors_does_all_tasks(
    on_ray: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is left by a node that is lost: the second of two actors never starts."""
    monkeypatch.setattr("pipelines.executor.PLACE_S", 0.5)
    watcher = run(on_ray, [trial(f"{number}") for number in range(5)], Pool(workers=2, cpus=2))
    assert len(watcher.reports) == 5
    assert len({report.done.facts["pid"] for report in watcher.reports.values()}) == 1


def test_an_interrupted_run_leaves_no_worker_at_work(on_ray: RayExecutor, tmp_path: Path) -> None:
    def interrupt(task: Task, report: Report) -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    tasks: list[Task] = [trial("long", "hang", place=str(tmp_path / "pid")), trial("short")]
    with pytest.raises(KeyboardInterrupt):
        on_ray.run(tasks, POOL, interrupt, int)
    assert ends(int((tmp_path / "pid").read_text()))


def test_the_longest_tasks_are_begun_first(on_ray: RayExecutor) -> None:
    alone = Pool(workers=1, cpus=0)
    watcher = run(on_ray, [trial(f"{size}", size=size) for size in (2, 9, 4, 7)], alone)
    assert list(watcher.reports) == ["9", "7", "4", "2"]
    assert len({report.done.facts["pid"] for report in watcher.reports.values()}) == 1


def test_a_closed_run_leaves_neither_processes_nor_files(ray_config: Config, on_ray: RayExecutor) -> None:
    executor = RayExecutor(ray_config)
    watcher = run(executor, [trial(f"shard {number}") for number in range(4)])
    facts = [report.done.facts for report in watcher.reports.values()]
    assert all(is_alive(fact["pid"]) for fact in facts)
    executor.close()
    assert all(ends(fact["pid"]) for fact in facts)
    assert not any(Path(fact["scratch"]).exists() for fact in facts)
