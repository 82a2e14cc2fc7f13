"""Residuals of local features to their visual words, summed by word: what VLAD and its relatives are made of."""

from dataclasses import dataclass, field

import numba
import numpy as np

from cbir.encoding.codebook import Codebook
from cbir.encoding.product import ReproducibleProduct
from cbir.types import Array, Float64s, Floats, Int64s

__all__ = ["NearestWords", "Residuals", "residual_sums"]

BLOCK = 1024
"""Rows at a time, so that their scores for all words need not be held at once."""


class NearestWords:
    """The `num` nearest words of every feature, nearest first: multiple assignment (Jégou et al. 2007)."""

    def __init__(self, codebook: Codebook, num: int) -> None:
        self.codebook, self.num = codebook, min(num, len(codebook))
        wide = codebook.centroids.astype(np.float64)
        self._product = ReproducibleProduct(codebook.centroids)
        self._half_norms = 0.5 * np.add.reduce(wide * wide, axis=1)

    def __call__(self, rows: Array) -> Int64s:
        """(n, D) -> (n, num); of equally near words the first ones. A row's words depend on this row alone."""
        if self.num == 1:
            return self.codebook.assign(rows)[:, None]
        self._product.check(rows)
        words = np.zeros((len(rows), self.num), np.int64)
        for start in range(0, len(rows), BLOCK):
            # |x - c|^2 is least where |c|^2 / 2 - x.c is.
            scores = self._half_norms - self._product(rows[start : start + BLOCK])
            _least(scores, words[start : start + BLOCK])
        return words


@dataclass(frozen=True)
class Residuals:
    """How features become residual sums: x - c to the nearest words, the r-th nearest with weight `rank_weights[r]`.

    Residuals longer than `max_distance` are left out; `unit` brings every residual to unit length.
    """

    codebook: Codebook
    rank_weights: tuple[float, ...] = (1.0,)
    unit: bool = False
    max_distance: float = np.inf
    _nearest: NearestWords = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_nearest", NearestWords(self.codebook, len(self.rank_weights)))

    def assign(self, rows: Array) -> Int64s:
        """The words (n, r) of rows (n, D), one per rank weight. DataError if D is not the codebook's."""
        return self._nearest(rows)

    def sums(self, rows: Array, words: Int64s) -> tuple[Float64s, Float64s]:
        """Residual sums (W, D) of rows (n, D) with their words (n, r), and the summed weights of each word (W,)."""
        sums, counts = np.zeros(self.codebook.centroids.shape), np.zeros(len(self.codebook))
        weights = np.array(self.rank_weights[: words.shape[1]])
        points = np.require(rows, np.float32, ["C", "W"])  # a read-only array would compile the loops once more
        _add_residuals(points, words, weights, self.codebook.centroids, self.unit, self.max_distance, sums, counts)
        return sums, counts


def residual_sums(rows: Array, words: Int64s, centroids: Floats) -> Float64s:
    """The sum of x - c_w over the rows (n, D) of each word (n,): (W, D) float64, additive over disjoint sets."""
    sums, counts = np.zeros(centroids.shape), np.zeros(len(centroids))
    points = np.require(rows, np.float32, ["C", "W"])
    _add_residuals(points, words[:, None], np.ones(1), centroids, False, np.inf, sums, counts)
    return sums


@numba.njit(cache=True, nogil=True)
def _least(scores: Float64s, words: Int64s) -> None:
    """The positions (n, r) of the least of scores (n, W), rising; of equal ones the first."""
    num = words.shape[1]
    best = np.empty(num)
    for i in range(len(scores)):
        best[:] = np.inf
        for word in range(scores.shape[1]):
            score = scores[i, word]
            if score >= best[num - 1]:
                continue
            at = num - 1
            while at > 0 and score < best[at - 1]:
                best[at] = best[at - 1]
                words[i, at] = words[i, at - 1]
                at -= 1
            best[at] = score
            words[i, at] = word


@numba.njit(cache=True, nogil=True)
def _add_residuals(
    rows: Floats,
    words: Int64s,
    weights: Float64s,
    centroids: Floats,
    unit: bool,
    max_distance: float,
    sums: Float64s,
    counts: Float64s,
) -> None:
    """One feature after the other, in double precision, so that nothing but their order enters the result."""
    dim = rows.shape[1]
    residual = np.empty(dim)
    for i in range(len(rows)):
        for rank in range(words.shape[1]):
            word = words[i, rank]
            squared = 0.0
            for d in range(dim):
                residual[d] = np.float64(rows[i, d]) - np.float64(centroids[word, d])
                squared += residual[d] * residual[d]
            if squared > max_distance * max_distance:
                continue
            counts[word] += weights[rank]
            scale = weights[rank]
            if unit and squared > 0.0:
                scale /= np.sqrt(squared)
            for d in range(dim):
                sums[word, d] += scale * residual[d]
