"""Who does the tasks: this process, or Ray actors under a small scheduler of ours.

The unit of work, of retry and of resume is a task. A failing task stops the run with its own error; a task that kills
its worker is tried again on a fresh one, and after a few deaths it is reported while the others go on to their end.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from cbir.artifacts import find_done
from cbir.config import Config, Pool
from cbir.errors import CbirError, DataError
from cbir.storage import Store
from pipelines.work import Report, Task, Worker

__all__ = ["Executor", "InlineExecutor", "OnReport", "RayExecutor", "executor_for", "pending"]

OnReport = Callable[[Task, Report], None]
"""Called for every finished task; `on_tick` is called about once a second while tasks run."""

MAX_DEATHS = 3
"""So many workers may die of one task before it is given up."""

MAX_LOST = 20
"""So many tasks may be given up before the run is."""

TICK_S = 1.0
CLOSE_S = 10.0

PLACE_S = 20.0
"""So long a task waits for an actor for which the cluster has no room, while others are idle."""


class Executor(Protocol):
    """Runs the tasks of one stage to their end, on workers that come when they are first needed."""

    num_workers: int
    is_ready: bool

    def start(self) -> None:
        """Get what the workers need, such as a cluster; `run` does it too."""
        ...

    def run(self, tasks: Sequence[Task], pool: Pool, on_report: OnReport, on_tick: Callable[[], None]) -> None:
        """Do all tasks on the workers of a pool; raises the first error of a task."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class InlineExecutor:
    """Every task in this process, one after the other."""

    num_workers = 1
    is_ready = False

    def __init__(self, store_uri: str, device: str = "cpu") -> None:
        self._worker = Worker(store_uri, device)

    def start(self) -> None:
        """It is here."""
        self.is_ready = True

    def run(self, tasks: Sequence[Task], pool: Pool, on_report: OnReport, on_tick: Callable[[], None]) -> None:  # noqa: ARG002
        """Do all tasks in their order."""
        for task in tasks:
            on_report(task, self._worker.do(task))
            on_tick()

    def close(self) -> None:
        """End the worker's child processes."""
        self._worker.close()


@dataclass
class _Running:
    """A task on its actor; `there` is the answer of an actor that may not have started yet."""

    task: Task
    actor: Any
    there: Any
    started: float
    is_overdue: bool = False


@dataclass
class _Stage:
    """The state of one call of `RayExecutor.run`; deaths and lost tasks by fingerprint."""

    waiting: deque[Task]
    running: dict[Any, _Running] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    lost: dict[str, str] = field(default_factory=dict)


class RayExecutor:
    """Actors of one pool at a time; in-flight work is bounded to one task an actor, and every task has a deadline."""

    def __init__(self, config: Config, deadline_s: float = 6 * 3600.0) -> None:
        self.num_workers, self.is_ready = config.pools.extract.workers or config.workers, False
        self._config = config
        self._deadline_s = deadline_s
        self._idle: list[Any] = []
        self._pool: Pool | None = None
        self._ray: Any = None
        self._started_ray = False

    def start(self) -> None:
        """Join the cluster, or start one on this machine."""
        # Imported here, because a run that has nothing to do, or `workers: 0`, needs no Ray.
        from pipelines.cluster import ray, start_ray

        self._started_ray = start_ray(self._config)
        self._ray, self.is_ready = ray, True

    def run(self, tasks: Sequence[Task], pool: Pool, on_report: OnReport, on_tick: Callable[[], None]) -> None:
        """Do all tasks, each on the next free actor, the longest first so that none is left alone at the end."""
        if tasks and not self.is_ready:
            self.start()
        self._use(pool)
        num_actors = pool.workers or self._config.workers
        stage = _Stage(deque(sorted(tasks, key=lambda task: task.weight, reverse=True)))
        try:
            while stage.waiting or stage.running:
                while stage.waiting and len(stage.running) < num_actors:
                    self._start(stage)
                ready, _ = self._ray.wait(list(stage.running), timeout=TICK_S)
                for reference in ready:
                    self._finish(reference, stage, on_report)
                self._take_back(stage)
                self._kill_overdue(stage)
                on_tick()
        finally:
            for running in stage.running.values():
                self._ray.kill(running.actor)
        if stage.lost:
            raise _lost_error(stage.lost)

    def _use(self, pool: Pool) -> None:
        """From now on, actors are those of this pool; idle ones of another make room."""
        if pool != self._pool:
            self._release()
            self._pool = pool

    def _new_actor(self) -> Any:
        from pipelines.cluster import new_worker

        assert self._pool is not None
        return new_worker(self._config.store, self._pool)

    def _release(self) -> None:
        """End the idle actors, which first delete their temporary files."""
        closing = [actor.close.remote() for actor in self._idle]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for actor in self._idle:
            self._ray.kill(actor)
        self._idle.clear()

    def _start(self, stage: _Stage) -> None:
        task = stage.waiting.popleft()
        actor = self._idle.pop() if self._idle else self._new_actor()
        there = actor.is_there.remote()
        stage.running[actor.do.remote(task)] = _Running(task, actor, there, time.monotonic())

    def _finish(self, reference: Any, stage: _Stage, on_report: OnReport) -> None:
        running = stage.running.pop(reference)
        try:
            report = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(running.actor)
            # An error of ours says all; of any other one, Ray's message holds the worker's traceback.
            raise (error.cause if isinstance(error.cause, CbirError) else error) from None
        except self._ray.exceptions.RayError as error:
            self._ray.kill(running.actor)
            overdue = f"not done after {self._deadline_s:g} s, the worker was killed"
            self._bury(running.task, overdue if running.is_overdue else str(error), stage)
            return
        self._idle.append(running.actor)
        on_report(running.task, report)

    def _take_back(self, stage: _Stage) -> None:
        """Give tasks whose actors have no place, as when a node was lost, to idle ones, which may be in that place."""
        for reference, running in list(stage.running.items()):
            if len(self._idle) <= len(stage.waiting) or time.monotonic() - running.started < PLACE_S:
                continue
            if not self._ray.wait([running.there], timeout=0)[0]:
                self._ray.kill(running.actor)
                del stage.running[reference]
                stage.waiting.append(running.task)

    def _bury(self, task: Task, reason: str, stage: _Stage) -> None:
        stage.deaths[task.fingerprint] += 1
        if stage.deaths[task.fingerprint] < MAX_DEATHS:
            stage.waiting.append(task)
            return
        stage.lost[f"{task.stage} {task.name}"] = reason
        if len(stage.lost) >= MAX_LOST:
            raise _lost_error(stage.lost)

    def _kill_overdue(self, stage: _Stage) -> None:
        for running in stage.running.values():
            if time.monotonic() - running.started > self._deadline_s and not running.is_overdue:
                running.is_overdue = True
                self._ray.kill(running.actor)

    def close(self) -> None:
        """End the actors, and the connection to Ray or the local cluster if this run made it."""
        self._release()
        if self._started_ray:
            self._ray.shutdown()


def _lost_error(lost: dict[str, str]) -> DataError:
    lines = "\n".join(f"  {name}: {_in_one_line(reason)}" for name, reason in lost.items())
    rest = (
        "the run stops, because so many point to the machine (memory? the device?) rather than to a shard"
        if len(lost) >= MAX_LOST
        else "all others are done and are not repeated"
    )
    return DataError(
        f"{len(lost)} task(s) killed their worker {MAX_DEATHS} times; {rest}:\n"
        f"{lines}\nLook at these shards (memory? a hostile file?), remove or repair them, and run the command again."
    )


def _in_one_line(reason: str) -> str:
    """Of a worker that was killed for memory, Ray says so first and then much else; of others, what it was last."""
    lines = reason.strip().split("\n")
    if "low on memory" in lines[0]:
        return f"{lines[0]}; ask for fewer workers, or for `pools.<pool>.memory_gb`, so that fewer share a machine"
    return lines[-1]


def executor_for(config: Config) -> Executor:
    """This process for `workers: 0`, else Ray."""
    return RayExecutor(config) if config.workers else InlineExecutor(config.store)


def pending(store: Store, tasks: Sequence[Task], on_report: OnReport) -> Iterator[Task]:
    """The tasks without a DONE record; the others are reported as they are."""
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda task: find_done(store, task.stage, task.fingerprint), tasks)
        for task, done in zip(tasks, found, strict=True):
            if done is None:
                yield task
            else:
                on_report(task, Report(done, {}))
