"""Training of the lists of an inverted file, by one worker to begin with and then by all."""

from dataclasses import dataclass, replace

import numpy as np

from cbir.encoding.assigners import DirectionAssigner
from cbir.encoding.kmeans import Sums, assignment_sums, common_exponent, nested_parts, sampled_rows, unit_rows, update
from cbir.encoding.scan import nearest_of
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
        return _nearest(np.asarray(rows, np.float32), self.centroids, num)


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
        parts, exponent = list(nested_parts(placed, lists, seed)), common_exponent(placed)
        if lists < EXACT_LISTS:
            parts = [parts[-1]] * _FIRST_ROUNDS
            start = _spread_rows(parts[0], lists, seed)
        else:
            drawn = np.random.default_rng(seed).choice(len(parts[0]), lists, replace=False)
            start = np.asarray(parts[0][np.sort(drawn)], np.float32)
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


def _spread_rows(rows: Array, num: int, seed: int) -> Floats:
    """So many of at least as many rows, which lie apart: drawn in proportion to their squared distance from those drawn
    before (k-means++, Arthur and Vassilvitskii 2007), many at a time (Bahmani et al., Scalable k-means++, 2012).
    """
    rng, flat, at_once = np.random.default_rng(seed), np.asarray(rows, np.float32), -(-num // _DRAWS)
    chosen = np.sort(rng.choice(len(flat), at_once, replace=False))
    squared = _nearest(flat, flat[chosen], 1)[1][:, 0]
    while len(chosen) < num:
        with np.errstate(divide="ignore"):
            turns = rng.exponential(size=len(flat)) / squared  # the first ones are such a draw
        drawn = np.argsort(turns, kind="stable")[: min(at_once, num - len(chosen))]
        chosen = np.concatenate([chosen, drawn])
        squared = np.minimum(squared, _nearest(flat, flat[drawn], 1)[1][:, 0])
    return flat[chosen]


def _nearest(rows: Floats, centroids: Floats, num: int) -> tuple[Int32s, Float64s]:
    words = nearest_centroid(rows, centroids, "l2")[:, None].astype(np.int32)
    return nearest_of(rows, words, centroids, num)
