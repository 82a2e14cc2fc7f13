"""Metrics of instance retrieval: pure functions of the places at which the positives of a query were ranked.

`ranks` are the 0-based places of the found positives, rising, counted after junk and repeated keys were removed.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cbir.errors import DataError
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery

__all__ = [
    "Form",
    "Quality",
    "QueryQuality",
    "Ranks",
    "ann_recall",
    "average_precision",
    "evaluate",
    "first_hit_rank",
    "first_neighbour_recall",
    "interpolated_precision",
    "mean_precision_at",
    "ns_score",
    "positive_ranks",
    "precision_at",
    "recall_at",
]

Form = Literal["rectangle", "trapezoid"]
Ranks = Sequence[int]
DEPTHS = (1, 5, 10)


def positive_ranks(
    ranking: Sequence[str], positives: AbstractSet[str], junk: AbstractSet[str] = frozenset()
) -> tuple[int, ...]:
    """The 0-based places of the positives in a ranking without its junk; a repeated key counts once, at its best."""
    counted = (key for key in dict.fromkeys(ranking) if key not in junk)
    return tuple(rank for rank, key in enumerate(counted) if key in positives)


def average_precision(ranks: Ranks, num_positives: int, form: Form = "rectangle", at: int | None = None) -> float:
    """Average precision of one query, from 0 to 1; positives that were not found count as 0.

    `rectangle` is the mean of the precision at each positive (M-03, as in TREC and Google Landmarks). `trapezoid` is
    the area under the precision-recall curve with straight lines between its points (M-02), the form of the Oxford
    buildings (Philbin et al. 2007). `at` looks at the first results only and divides by min(positives, at).
    """
    _check_positives(num_positives)
    places = np.asarray([rank for rank in ranks if at is None or rank < at], np.float64)
    before = np.arange(len(places))
    precision = (before + 1) / (places + 1)
    if form == "trapezoid":
        # The precision just before a positive; there is nothing before the first place, where it is 1 by definition.
        precision = (precision + np.where(places == 0, 1.0, before / np.maximum(places, 1))) / 2
    return float(precision.sum() / (num_positives if at is None else min(num_positives, at)))


def precision_at(ranks: Ranks, k: int) -> float:
    """The share of positives among the first k results (M-01)."""
    return sum(rank < k for rank in ranks) / k


def recall_at(ranks: Ranks, num_positives: int, k: int) -> float:
    """The share of the positives that are among the first k results (M-01)."""
    _check_positives(num_positives)
    return sum(rank < k for rank in ranks) / num_positives


def mean_precision_at(ranks: Ranks, num_positives: int, k: int) -> float:
    """One query's part of mP@k (Radenovic et al. 2018): precision at the place of the last positive, at most k.

    A positive that was not found lies beyond every result, so that the precision is then taken at k.
    """
    _check_positives(num_positives)
    found_all = len(ranks) == num_positives
    return precision_at(ranks, min(ranks[-1] + 1, k) if found_all else k)


def first_hit_rank(ranks: Ranks, depth: int) -> int:
    """The 1-based place of the first positive; depth + 1 if none was found (M-07)."""
    return ranks[0] + 1 if ranks else depth + 1


def ns_score(ranks: Sequence[Ranks]) -> float:
    """N-S score (Nister and Stewenius 2006): the mean number of positives among the first four, at most 4.

    UKBench has the query itself in the database and counts it, so these ranks must include it.
    """
    return float(np.mean([4 * precision_at(places, 4) for places in ranks]))


def interpolated_precision(
    ranks: Ranks, num_positives: int, levels: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The precision-recall curve: the best precision at a recall of at least each level, levels from 0 to 1."""
    _check_positives(num_positives)
    hits = np.arange(1, len(ranks) + 1)
    precision = hits / (np.asarray(ranks, np.float64) + 1)
    best_from_here = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best_from_here[np.searchsorted(hits / num_positives, levels - 1e-9)]


def ann_recall(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64], k: int) -> float:
    """k-recall@k: the share of the k exact neighbours (Q, R) that are among the first k found (Q, R); -1 pads."""
    return _neighbours_found(found[:, :k], exact[:, :k])


def first_neighbour_recall(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64], depth: int) -> float:
    """1-recall@R (Jegou et al. 2011): how often the nearest neighbour is among the first `depth` found."""
    return _neighbours_found(found[:, :depth], exact[:, :1])


def _neighbours_found(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64]) -> float:
    if len(found) != len(exact):
        raise ValueError(f"{len(found)} rows were found for {len(exact)} queries")
    wanted = int((exact >= 0).sum())
    if not wanted:
        raise ValueError("there are no exact neighbours to find")
    hits = sum(int(np.isin(right[right >= 0], row).sum()) for row, right in zip(found, exact, strict=True))
    return hits / wanted


def _check_positives(num_positives: int) -> None:
    if num_positives < 1:
        raise ValueError(f"a query without positives has no precision or recall, found {num_positives} positives")


@dataclass(frozen=True)
class QueryQuality:
    """How one query was answered. `position` is its place among the ground truth's queries."""

    query: GroundTruthQuery
    position: int
    ranks: tuple[int, ...]
    num_positives: int
    depth: int

    @property
    def average_precision(self) -> float:
        """The rectangle form."""
        return average_precision(self.ranks, self.num_positives)

    @property
    def first_hit_rank(self) -> int:
        """1-based; depth + 1 if nothing was found."""
        return first_hit_rank(self.ranks, self.depth)

    def to_json(self) -> dict[str, Any]:
        """What the report writes about this query."""
        return {
            "image": self.query.image,
            "box": self.query.box,
            "average_precision": self.average_precision,
            "first_hit_rank": self.first_hit_rank,
            "positives": self.num_positives,
            "found": len(self.ranks),
        }


@dataclass(frozen=True)
class Quality:
    """How good the rankings of all queries are; `depth` is the length of the longest ranking that was judged."""

    queries: tuple[QueryQuality, ...]
    skipped_queries: int
    missing_positives: int
    depth: int

    def mean_average_precision(self, form: Form = "rectangle", at: int | None = None) -> float:
        """The mean over the queries that have positives."""
        return self._mean([average_precision(q.ranks, q.num_positives, form, at) for q in self.queries])

    def recall_at(self, n: int) -> float:
        """The share of queries with any positive among the first n results (M-06)."""
        return self._mean([float(q.first_hit_rank <= n and bool(q.ranks)) for q in self.queries])

    def mean_precision_at(self, k: int) -> float:
        """mP@k (M-05)."""
        return self._mean([mean_precision_at(q.ranks, q.num_positives, k) for q in self.queries])

    def precision_recall(self, levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The precision at each level of recall, averaged over the queries."""
        curves = [interpolated_precision(q.ranks, q.num_positives, levels) for q in self.queries]
        return np.asarray(np.mean(curves, axis=0), np.float64)

    def to_json(self, per_query: bool = False) -> dict[str, Any]:
        """The totals by name; `map` is the rectangle form, and `map_form` says so."""
        first_hits = [query.first_hit_rank for query in self.queries]
        rectangle = self.mean_average_precision()
        totals: dict[str, Any] = {
            "map": rectangle,
            "map_form": "rectangle: the mean of the precision at each positive",
            "map_rectangle": rectangle,
            "map_trapezoid": self.mean_average_precision("trapezoid"),
            "map_at_100": self.mean_average_precision(at=100),
            **{f"recall_at_{n}": self.recall_at(n) for n in DEPTHS},
            **{f"mp_at_{k}": self.mean_precision_at(k) for k in DEPTHS},
            "mean_first_hit_rank": self._mean(first_hits),
            "median_first_hit_rank": float(np.median(first_hits)),
            "queries": len(self.queries),
            "skipped_queries": self.skipped_queries,
            "missing_positives": self.missing_positives,
            "depth": self.depth,
        }
        return {**totals, "per_query": [query.to_json() for query in self.queries]} if per_query else totals

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return float(np.mean(values))


def evaluate(rankings: Sequence[Sequence[str]], truth: GroundTruth) -> Quality:
    """Judge one ranking of keys per query of a ground truth, best first, junk and the query itself still in.

    Queries without positives are skipped and counted. Positives that the index does not hold count as misses.
    DataError if no query has a positive.
    """
    if len(rankings) != len(truth.queries):
        raise ValueError(f"{len(rankings)} rankings for {len(truth.queries)} queries")
    depth = max(map(len, rankings), default=0)
    judged = []
    for position, (ranking, query) in enumerate(zip(rankings, truth.queries, strict=True)):
        if positives := query.positives - query.junk:
            ranks = positive_ranks(ranking, positives, query.junk)
            judged.append(QueryQuality(query, position, ranks, len(positives), depth))
    if not judged:
        raise DataError(f"ground truth {truth.name!r}: none of the {len(truth.queries)} queries has a positive")
    return Quality(tuple(judged), len(truth.queries) - len(judged), len(truth.missing), depth)
