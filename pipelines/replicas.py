"""Actors that hold the same partitions, and the one queue that they all take their calls from.

A call to an actor costs far more than a search in it, so an actor that is free takes everything that waits as one call.
What a lost actor was asked goes back to the head of the queue at once, what a slow one was asked after `slow_s` (a
hedged request, Dean and Barroso, The tail at scale, CACM 2013): another actor takes it, and the first outcome counts.
"""

import contextlib
import pickle
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from cbir.errors import CbirError
from pipelines.cluster import ray
from pipelines.query_actor import Call, Opening, Outcome

__all__ = ["CARE", "Replicas", "in_care"]

CARE = "care"
"""The concurrency group, of one thread, in which an actor opens and closes versions while it answers queries."""

_CALLS_JOINED = 64
_TRIES = 8
_RETRY_S = 0.1
_BEHIND_S = 30.0
_JOIN_S = 10.0


@dataclass(eq=False)
class _Waiting:
    """A call on its way, and how many actors it was given to."""

    call: Call
    future: Future[Any] = field(default_factory=Future)
    given: int = 0

    def settle(self, outcome: Outcome) -> None:
        """The first outcome counts; a caller that has given up wants none."""
        with contextlib.suppress(InvalidStateError):
            if outcome.error is None:
                self.future.set_result(outcome.value)
            else:
                self.future.set_exception(outcome.error)


class Replicas:
    """Actors that hold the same partitions; a thread for each gives it what waits. Ray starts again what dies.

    A call fails only by an error of its own. While all actors are lost, calls wait until one is back.
    """

    def __init__(self, actors: Sequence[Any], slow_s: float) -> None:
        self.actors = list(actors)
        self._slow_s = slow_s
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._in_use: dict[Opening, Sequence[int]] = {}
        self._num_lost = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(actor,), daemon=True) for actor in self.actors]
        for thread in self._threads:
            thread.start()

    def submit(self, calls: Sequence[Call]) -> list[Future[Any]]:
        """Calls that wait together, so that they can go to an actor as one."""
        waiting = [_Waiting(call) for call in calls]
        with self._changed:
            if self._ended.is_set():
                raise CbirError("the query pool is closed")
            self._queue.extend(waiting)
            self._changed.notify()
        return [one.future for one in waiting]

    def _serve(self, actor: Any) -> None:
        while batch := self._take():
            try:
                calls = [waiting.call for waiting in batch]
                self._settle(batch, actor.call.remote(pickle.dumps(calls, pickle.HIGHEST_PROTOCOL)))
            except ray.exceptions.RayTaskError as error:
                _settle_all(batch, own_error(error))
            except ray.exceptions.RayError:
                self._give_back(_worth_another_try(batch))
                self._await_revival(actor)
            except Exception as error:  # noqa: BLE001 - such as that Ray was shut down: those who wait must learn it
                _settle_all(batch, error)

    def _take(self) -> list[_Waiting]:
        """What waits, once something does; nothing when the pool is closed."""
        with self._changed:
            while not self._ended.is_set():
                batch: list[_Waiting] = []
                while self._queue and len(batch) < _CALLS_JOINED:
                    waiting = self._queue.popleft()
                    if not waiting.future.done():
                        waiting.given += 1
                        batch.append(waiting)
                if batch:
                    if self._queue:
                        self._changed.notify()
                    return batch
                self._changed.wait()
        return []

    def _settle(self, batch: Sequence[_Waiting], reference: Any) -> None:
        """Wait for the outcomes, however long; others may take the calls when that is too long."""
        try:
            outcomes = ray.get(reference, timeout=self._slow_s)
        except ray.exceptions.GetTimeoutError:
            self._give_back([waiting for waiting in batch if waiting.given < len(self.actors)])
            outcomes = ray.get(reference)
        for waiting, outcome in zip(batch, pickle.loads(outcomes), strict=True):
            waiting.settle(outcome)

    def _give_back(self, batch: Sequence[_Waiting]) -> None:
        with self._changed:
            self._queue.extendleft(reversed(batch))
            self._changed.notify_all()

    def _await_revival(self, actor: Any) -> None:
        """Until the actor is there again and holds what is in use.

        If it cannot open that, others answer; if there are no others, queries have to meet the error.
        """
        with self._changed:
            self._num_lost += 1
        while not self._ended.wait(_RETRY_S):
            try:
                ray.get([in_care(actor.open).remote(*some) for some in self._openings()])
                break
            except ray.exceptions.RayTaskError:
                if self._num_lost == len(self.actors):
                    break
            except ray.exceptions.RayError:
                continue
        with self._changed:
            self._num_lost -= 1

    def _openings(self) -> list[tuple[Opening, Sequence[int]]]:
        with self._changed:
            return list(self._in_use.items())

    def begin_open(self, opening: Opening, numbers: Sequence[int]) -> list[Any]:
        """Begin to open these partitions of a version in all actors: references for `await_open`."""
        with self._changed:
            self._in_use[opening] = numbers
        return self._open_everywhere(opening)

    def _open_everywhere(self, opening: Opening) -> list[Any]:
        return [in_care(actor.open).remote(opening, self._in_use[opening]) for actor in self.actors]

    def await_open(self, opening: Opening, begun: Sequence[Any], end: float) -> None:
        """Wait until actors have opened a version, at most until `end` by `time.monotonic`.

        One is enough if the others are lost or far slower; they will have it when they are back. The error is that of
        an actor which could not open the version, or a CbirError if none did in time.
        """
        while not _opened(begun, end):
            if time.monotonic() > end or self._ended.wait(_RETRY_S):
                raise CbirError(f"no query actor could open version {opening.version} in time; try again")
            begun = self._open_everywhere(opening)

    def close(self, opening: Opening) -> None:
        """Let all actors go of a version that no query uses any more."""
        with self._changed:
            self._in_use.pop(opening, None)
        for actor in self.actors:
            in_care(actor.close).remote(opening)

    def end(self) -> None:
        """End the actors and the threads; calls that are under way fail."""
        self._ended.set()
        with self._changed:
            self._changed.notify_all()
        for actor in self.actors:
            ray.kill(actor)
        for thread in self._threads:
            thread.join(_JOIN_S)
        _settle_all(self._queue, CbirError("the query pool was closed before this query was answered"))


def _settle_all(batch: Iterable[_Waiting], error: Exception) -> None:
    for waiting in batch:
        waiting.settle(Outcome(error=error))


def _worth_another_try(batch: Sequence[_Waiting]) -> list[_Waiting]:
    """The calls of a lost actor that may be tried again: one that ends every process it meets must not meet all."""
    ended = CbirError(f"query actors died {_TRIES} times while they had this query")
    _settle_all([waiting for waiting in batch if waiting.given >= _TRIES], ended)
    return [waiting for waiting in batch if waiting.given < _TRIES]


def _opened(begun: Sequence[Any], end: float) -> int:
    """How many actors have opened a version, until `end` or shortly after the first. Raises the own error of one."""
    opened, waiting = 0, list(begun)
    while waiting and (left_s := end - time.monotonic()) > 0:
        ready, waiting = ray.wait(waiting, timeout=left_s)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.RayError:
            continue
        opened, end = opened + len(ready), min(end, time.monotonic() + _BEHIND_S)
    return opened


def in_care(method: Any) -> Any:
    """A method of an actor that does not wait for the queries before it."""
    return method.options(concurrency_group=CARE)


def own_error(error: Any) -> Exception:
    """An expected error as the actor raised it; any other with the actor's traceback."""
    own: Exception = error.cause if isinstance(error.cause, CbirError) else error
    return own
