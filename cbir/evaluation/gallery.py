"""The queries that tell most about an index: its worst and its best answers, with their first results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery
from cbir.evaluation.metrics import Quality, QueryQuality

__all__ = ["Gallery", "QueryCase", "Relevance", "choose_cases"]

Relevance = Literal["positive", "junk", "wrong"]


@dataclass(frozen=True)
class QueryCase:
    """One query with its first results, best first: key and relevance."""

    quality: QueryQuality
    results: tuple[tuple[str, Relevance], ...]

    def to_json(self) -> dict[str, Any]:
        """The query's figures and its first results."""
        return {**self.quality.to_json(), "results": [{"key": key, "relevance": what} for key, what in self.results]}


@dataclass(frozen=True)
class Gallery:
    """Cases to show and where their pictures come from: JPEG bytes of small, upright pictures, None if there is none.

    `query_picture` gets the query, so that it can draw or crop the box.
    """

    worst: tuple[QueryCase, ...]
    best: tuple[QueryCase, ...]
    picture: Callable[[str], bytes | None]
    query_picture: Callable[[GroundTruthQuery], bytes | None]


def choose_cases(
    quality: Quality, rankings: Sequence[Sequence[str]], truth: GroundTruth, count: int = 6, depth: int = 8
) -> tuple[tuple[QueryCase, ...], tuple[QueryCase, ...]]:
    """The `count` worst and the `count` best queries by average precision, each with its first `depth` results.

    Of equally good queries the one with more positives is worse or better; no query is in both lists, and the worst
    come first when there are few.
    """
    by_precision = sorted(quality.queries, key=lambda q: (q.average_precision, -q.num_positives, q.position))
    worst, rest = by_precision[:count], by_precision[count:]
    best = sorted(rest, key=lambda q: (-q.average_precision, -q.num_positives, q.position))[:count]

    def case(judged: QueryQuality) -> QueryCase:
        query = truth.queries[judged.position]
        first = rankings[judged.position][:depth]
        return QueryCase(judged, tuple((key, _relevance(key, query)) for key in first))

    return tuple(map(case, worst)), tuple(map(case, best))


def _relevance(key: str, query: GroundTruthQuery) -> Relevance:
    if key in query.junk:
        return "junk"
    return "positive" if key in query.positives else "wrong"
