"""Training of the lists of an inverted file, by one worker to begin with and then by all."""

from dataclasses import dataclass, replace

import numpy as np

from cbir.encoding.assigners import DirectionAssigner, ExactAssigner
from cbir.encoding.kmeans import Sums, assignment_sums, common_exponent, nested_parts, sampled_rows, unit_rows, update
from cbir.types import Array, Floats

__all__ = ["BegunLists"]

_EXACT = 8192
"""With fewer lists, a vector is compared with all of them. Of vectors without hierarchy, approximate rounds of 1,024
lists lost a fifth of the recall, those of 8,192 none."""


@dataclass(frozen=True)
class BegunLists:
    """Lists in training: k-means from drawn rows over growing parts of a sample, then rounds over all of it.

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
        parts = nested_parts(placed, lists, seed)
        begun = cls(np.asarray(next(parts), np.float32), common_exponent(placed), spherical)
        for part in parts:
            begun = begun.after(begun.sums(part))
        return begun

    def sums(self, rows: Array) -> Sums:
        """What these rows (n, D) add to the next round."""
        assigner = ExactAssigner if len(self.centroids) < _EXACT else DirectionAssigner
        return assignment_sums(unit_rows(rows) if self.spherical else rows, assigner(self.centroids), self.exponent)

    def after(self, sums: Sums) -> "BegunLists":
        """With the means of the rows of all places."""
        means = update(self.centroids, sums)
        return replace(self, centroids=unit_rows(means) if self.spherical else means)
