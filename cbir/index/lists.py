"""Training of the lists of an inverted file, by one worker to begin with and then by all."""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from cbir.encoding.assigners import DirectionAssigner
from cbir.encoding.kmeans import Sums, assignment_sums, common_exponent, nested_parts, sampled_rows, unit_rows, update
from cbir.encoding.scan import finite_rows, nearest_of
from cbir.index.nearest import nearest_centroid
from cbir.types import Array, Float64s, Floats, Int32s

__all__ = ["EXACT_LISTS", "BegunLists"]

EXACT_LISTS = 8192
"""With fewer lists, a vector is compared with all of them. Of vectors without hierarchy, approximate rounds of 1,024
lists lost a fifth of the recall, those of 8,192 none."""

_DRAWS = 8
"""[4,096 lists of 204,800 vectors: rows that lie apart end with 2 % less error than rows drawn evenly.]"""

_FIRST_ROUNDS = 6
"""Over half of the sample, where a vector is compared with all lists: those that began with fewer vectors stay where
these led them [3 % more error]."""


class _AllLists:
    """Compares a row with every centroid, at the speed of a matrix product."""

    def __init__(self, centroids: Floats) -> None:
        self.centroids = centroids

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """The nearest centroid; `num` is 1."""
        block = finite_rows(rows, self.centroids.shape[1])
        words = nearest_centroid(block, self.centroids, "l2")[:, None].astype(np.int32)
        return nearest_of(block, words, self.centroids, num)


@dataclass(frozen=True)
class BegunLists:
    """Lists in training: k-means from rows that lie apart, over parts of a sample, then rounds over all of it.

    Descriptors of whole images lie in no hierarchy, as words of local features do, so k-means in cells would not do
    [8 % more error]. A round is `after(sums(rows of one place) + sums(rows of another) + ...)`, to the same bytes
    wherever rows lie. With `spherical`, rows count with unit length, and so do the centroids (Dhillon and Modha 2001).
    """

    centroids: Floats
    exponent: int
    spherical: bool

    @classmethod
    def of(cls, rows: Array, lists: int, seed: int, *, spherical: bool) -> "BegunLists":
        """From rows (n, D), of which at most 256 per list are used."""
        sample = sampled_rows(rows, lists, seed)
        placed = unit_rows(sample) if spherical else sample
        parts: Iterable[Array]
        exponent, growing = common_exponent(placed), nested_parts(placed, lists, seed)
        if lists < EXACT_LISTS:
            largest = deque(growing, maxlen=1).pop()
            parts, start = itertools.repeat(largest, _FIRST_ROUNDS), _spread_rows(largest, lists, seed)
        else:
            first = next(growing)
            parts, start = itertools.chain([first], growing), _drawn_rows(first, lists, np.random.default_rng(seed))
        begun = cls(start, exponent, spherical)
        for part in parts:
            begun = begun.after(begun.sums(part))
        return begun

    def sums(self, rows: Array) -> Sums:
        """What these rows (n, D) add to the next round."""
        assigner = _AllLists if len(self.centroids) < EXACT_LISTS else DirectionAssigner
        return assignment_sums(unit_rows(rows) if self.spherical else rows, assigner(self.centroids), self.exponent)

    def after(self, sums: Sums) -> "BegunLists":
        """With the means of the rows of all places."""
        means = update(self.centroids, sums)
        return replace(self, centroids=unit_rows(means) if self.spherical else means)


def _drawn_rows(rows: Array, num: int, rng: np.random.Generator) -> Floats:
    return np.asarray(rows[np.sort(rng.choice(len(rows), num, replace=False))], np.float32)


def _spread_rows(rows: Array, num: int, seed: int) -> Floats:
    """So many of at least as many rows, which lie apart: drawn in proportion to their squared distance from those drawn
    before (k-means++, Arthur and Vassilvitskii 2007), many at a time (Bahmani et al., Scalable k-means++, 2012).
    """
    rng, at_once, squared = np.random.default_rng(seed), -(-num // _DRAWS), np.full(len(rows), np.inf)
    chosen = latest = _drawn_rows(rows, at_once, rng)
    while len(chosen) < num:
        squared = np.minimum(squared, _AllLists(latest).nearest(rows, 1)[1][:, 0])
        with np.errstate(divide="ignore"):
            turns = rng.exponential(size=len(rows)) / squared  # the first ones are such a draw
        drawn = np.argsort(turns, kind="stable")[: min(at_once, num - len(chosen))]
        latest = np.asarray(rows[drawn], np.float32)
        chosen = np.concatenate([chosen, latest])
    return chosen
