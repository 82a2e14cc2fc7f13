"""Calls that wait for a store, several at a time and in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cbir.storage import Store

__all__ = ["calls_in_flight", "look_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")

REMOTE_CALLS = 8


def calls_in_flight(store: Store, key: str) -> int:
    """How many calls to keep ahead: none on a local disk, several where each waits for a round trip."""
    return 0 if store.local_path(key) is not None else REMOTE_CALLS


def look_ahead(function: Callable[[Item], Result], items: Iterable[Item], calls: int) -> Iterator[Result]:
    """`map` with up to `calls` calls running in threads ahead of the one awaited; 0 is the plain `map`."""
    if calls == 0:
        yield from map(function, items)
        return
    pool, running = ThreadPoolExecutor(calls, "look-ahead"), deque[Future[Result]]()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > calls:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
