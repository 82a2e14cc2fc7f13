"""Open-loop load on a search: queries arrive when chance says, however long the answers before them take.

A closed loop, which asks again once it has its answer, sends least when the service is slowest and so hides what its
users wait (Schroeder et al., Open versus closed: a cautionary tale, NSDI 2006). Here the time of a query runs from the
moment at which it was due.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cbir.errors import CbirError
from cbir.types import Float64s, Int64s
from pipelines.recall import others, recalls

__all__ = ["Ask", "Figures", "Reply", "Sent", "Truth", "figures", "poisson_arrivals", "send"]

_AT_ONCE = 128


@dataclass(frozen=True)
class Reply:
    """The answer to a query: the ids found (R,), best first, the version, and whether partitions were missing."""

    image_ids: Int64s
    version: int
    partial: bool = False


@dataclass(frozen=True)
class Sent:
    """A query that was sent: its number among the queries, seconds from when it was due to its end, and what came."""

    query: int
    seconds: float
    ended: float
    reply: Reply | None
    error: str = ""


Ask = Callable[[int], Reply]
"""Ask one query by its number; a CbirError or OSError if it fails."""


def poisson_arrivals(rate: float, seconds: float, seed: int) -> Float64s:
    """Times at which queries are due, in seconds from the beginning: a Poisson process of `rate` queries per second."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, max(1, int(2 * rate * seconds) + 50)))
    due = times[times < seconds]
    return due if len(due) else times[:1]


def send(ask: Ask, arrivals: Float64s, num_queries: int, threads: int = _AT_ONCE) -> list[Sent]:
    """Ask queries 0, 1 .. in turn, each when it is due; those that find no thread free wait, and that counts."""
    begun = time.perf_counter()

    def one(number: int) -> Sent:
        query, reply, error = number % num_queries, None, ""
        try:
            reply = ask(query)
        except (CbirError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        ended = time.perf_counter() - begun
        return Sent(query, ended - float(arrivals[number]), ended, reply, error)

    with ThreadPoolExecutor(threads) as pool:
        futures = []
        for number, due in enumerate(arrivals):
            if (early_s := begun + due - time.perf_counter()) > 0:
                time.sleep(early_s)
            futures.append(pool.submit(one, number))
        return [future.result() for future in futures]


@dataclass(frozen=True)
class Figures:
    """What a load came to; times in milliseconds, of answered queries."""

    queries: int
    errors: int
    partial: int
    offered_qps: float
    achieved_qps: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    recall: dict[str, float]
    versions: list[int]
    first_error: str


@dataclass(frozen=True)
class Truth:
    """What queries should find: their exact neighbours (Q, R), of which an indexed query is itself one, `own` (Q,)."""

    exact: Int64s
    own: Int64s


def figures(sent: Sequence[Sent], arrivals: Float64s, truth: Truth | None, depth: int) -> Figures:
    """Latency, rate, errors, and where the truth is known recall@k up to `depth`: of other images than the query, so
    that one more has to be asked for."""
    answered = [one for one in sent if one.reply is not None]
    replies = [one.reply for one in answered if one.reply is not None]
    times = np.array([one.seconds for one in answered]) * 1e3
    return Figures(
        queries=len(sent),
        errors=len(sent) - len(answered),
        partial=sum(reply.partial for reply in replies),
        offered_qps=len(arrivals) / float(arrivals[-1]),
        achieved_qps=len(answered) / max(one.ended for one in sent),
        p50_ms=_percentile(times, 50),
        p90_ms=_percentile(times, 90),
        p99_ms=_percentile(times, 99),
        max_ms=_percentile(times, 100),
        recall=_recall([one.query for one in answered], replies, truth, depth),
        versions=sorted({reply.version for reply in replies}),
        first_error=next((one.error for one in sent if one.error), ""),
    )


def _percentile(times: Float64s, share: float) -> float | None:
    return float(np.percentile(times, share)) if len(times) else None


def _recall(queries: Sequence[int], replies: Sequence[Reply], truth: Truth | None, depth: int) -> dict[str, float]:
    if truth is None or not replies:
        return {}
    found = np.full((len(replies), depth + 1), -1, np.int64)
    for row, reply in zip(found, replies, strict=True):
        row[: len(reply.image_ids)] = reply.image_ids[: depth + 1]
    found, wanted = (others(ids, truth.own[queries]) for ids in (found, truth.exact[queries]))
    return {str(k): value for k, value in recalls(found, wanted, depth).items()}
