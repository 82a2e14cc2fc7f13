"""k-means in pieces that add up exactly, so that its result does not depend on how the sample is sharded.

A round of Lloyd (1982) is `update(centroids, sum of the shards' assignment_sums)`. What a shard adds are whole numbers:
rows are rounded to fixed point at a common exponent, so that every order of summation gives the same bytes. A round
over an approximate assigner is that of Philbin et al. 2007 (approximate k-means).
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np
import numpy.typing as npt

from cbir.encoding.scan import WordLists, finite_rows
from cbir.errors import DataError
from cbir.types import Array, Float64s, Floats, Int32s, Int64s

__all__ = [
    "MAX_ROWS_PER_WORD",
    "MIN_ROWS_PER_WORD",
    "Assigner",
    "Sums",
    "assignment_sums",
    "common_exponent",
    "kmeans_in_groups",
    "lloyd",
    "nested_parts",
    "sampled_rows",
    "two_level_words",
    "unit_rows",
    "update",
]

MAX_ROWS_PER_WORD = 256
"""More training rows per word are sampled down: they cost time and move the words little."""

MIN_ROWS_PER_WORD = 39
"""Fewer training rows per word leave the words noisy; they are allowed."""

BITS, HEADROOM_BITS = 24, 8
"""The largest component of the sample takes 24 bits, as in float32; others may be 2**8 times as large, and 2**31 rows
of that size still fit an int64."""

CELL_ITERATIONS, START_ITERATIONS = 10, 5

START_ROWS_PER_WORD = 4, 64
"""The fewest, and the most, rows per word of a round before those over the whole sample."""

BLOCK = 4096


class Assigner(Protocol):
    """Finds the nearest of `centroids` (W, D)."""

    centroids: Floats

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """Words (K, num) by rising distance and their squared distances (K, num); a row's depend on this row alone."""
        ...


@dataclass(frozen=True)
class Sums:
    """What rows add to a round of k-means: `sums` (W, D), `counts` (W,) and `errors` (W,), all int64.

    In units of 2**-exponent for the sums, and of 2**(26 - 2 * exponent) for the errors, the squared distances of a
    word's rows to it.
    """

    sums: Int64s
    counts: Int64s
    errors: Int64s
    exponent: int

    @classmethod
    def zeros(cls, words: int, dim: int, exponent: int) -> "Sums":
        """Of no rows."""
        return cls(np.zeros((words, dim), np.int64), np.zeros(words, np.int64), np.zeros(words, np.int64), exponent)

    def __add__(self, other: "Sums") -> "Sums":
        """Of both sets of rows; ValueError for another exponent."""
        if self.exponent != other.exponent:
            raise ValueError(f"sums of exponent {self.exponent} and {other.exponent} cannot be added")
        return Sums(self.sums + other.sums, self.counts + other.counts, self.errors + other.errors, self.exponent)

    @property
    def error_unit(self) -> float:
        """The squared distance that an error of one stands for."""
        return float(np.ldexp(1.0, 26 - 2 * self.exponent))

    @property
    def inertia(self) -> float:
        """The sum of the squared distances of all rows to their words."""
        return int(self.errors.sum()) * self.error_unit


def sampled_rows(rows: Array, words: int, seed: int) -> Array:
    """At most 256 rows per word, drawn by the seed and kept in their order; DataError if there are fewer than words."""
    if len(rows) < words:
        raise DataError(
            f"words: {words} words need at least as many descriptors, but the sample has {len(rows)}; set words to at "
            f"most {len(rows)}, or take a larger sample ({MIN_ROWS_PER_WORD} descriptors per word are good)"
        )
    most = MAX_ROWS_PER_WORD * words
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]


def unit_rows(rows: Array) -> Floats:
    """Rows (n, D) at unit length, each by itself; rows of zeros stay."""
    flat = np.ascontiguousarray(rows, np.float32)
    unit = np.empty_like(flat)
    _scale_rows(flat, unit)
    return unit


@numba.njit(cache=True, nogil=True)
def _scale_rows(rows: Floats, unit: Floats) -> None:
    for i in range(len(rows)):
        square = 0.0
        for d in range(rows.shape[1]):
            square += np.float64(rows[i, d]) * np.float64(rows[i, d])
        norm = np.sqrt(square) if square > 0 else 1.0
        for d in range(rows.shape[1]):
            unit[i, d] = rows[i, d] / norm


def common_exponent(rows: Array) -> int:
    """The exponent of the fixed point for rows like these; shards whose sums are added must share it.

    DataError for rows that are not finite.
    """
    largest = max(float(np.max(rows, initial=0)), -float(np.min(rows, initial=0)))
    if not np.isfinite(largest):
        raise DataError("the sample of descriptors holds NaN or infinite values; see what the extractor returned")
    return BITS - int(np.frexp(largest)[1])


def assignment_sums(rows: Array, assigner: Assigner, exponent: int) -> Sums:
    """What these rows (K, D) add to a round of k-means; exactly additive over disjoint sets of rows.

    DataError if a component exceeds those of the sample, which set the exponent, by more than 2**8.
    """
    words, squared = assigner.nearest(rows, 1)
    return _sums_of(rows, words[:, 0], squared[:, 0], len(assigner.centroids), exponent)


def _sums_of(rows: Array, words: Int32s, squared: Float64s, num_words: int, exponent: int) -> Sums:
    total = Sums.zeros(num_words, rows.shape[1], exponent)
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        block = finite_rows(rows[some], rows.shape[1])
        if np.abs(block).max(initial=0) > np.ldexp(1.0, BITS + HEADROOM_BITS - exponent):
            raise DataError(
                f"a descriptor holds {np.abs(block).max():g}, far more than those of the sample that k-means began "
                "with; take a larger sample"
            )
        scale = float(np.ldexp(1.0, exponent))
        _add_rows(block, words[some], scale, total.sums, total.counts)
        np.add.at(total.errors, words[some], np.rint(squared[some] / total.error_unit).astype(np.int64))
    return total


@numba.njit(cache=True, nogil=True)
def _add_rows(rows: Floats, words: Int32s, scale: float, sums: Int64s, counts: Int64s) -> None:
    for i in range(len(rows)):
        word = words[i]
        counts[word] += 1
        for d in range(rows.shape[1]):
            sums[word, d] += np.int64(np.rint(np.float64(rows[i, d]) * scale))


def update(centroids: Floats, sums: Sums, group_of: Int32s | None = None) -> Floats:
    """The next centroids (W, D): the means of their rows, in float64.

    A word without rows takes half of the word with the largest error, in its own group where `group_of` (W,) says
    which group a word is in; a word whose rows are all alike is not split, and then the empty word stays as it is.
    """
    means = sums.sums * np.ldexp(1.0, -sums.exponent) / np.maximum(sums.counts, 1)[:, None]
    means[sums.counts == 0] = centroids[sums.counts == 0]
    groups = group_of if group_of is not None else np.zeros(len(centroids), np.int32)
    empty = np.flatnonzero(sums.counts == 0)
    for group in np.unique(groups[empty]):
        _split(means, sums, empty[groups[empty] == group], np.flatnonzero((groups == group) & (sums.errors > 0)))
    return np.asarray(means, np.float32)


def _split(means: Float64s, sums: Sums, empty: Int64s, splittable: Int64s) -> None:
    """Each empty word takes half of the word with the then largest error: a tenth of its deviation to either side."""
    heap = [(-float(sums.errors[word]), int(word), float(sums.counts[word])) for word in splittable]
    heapq.heapify(heap)
    for word in empty if heap else empty[:0]:
        error, large, count = heapq.heappop(heap)
        step = 0.1 * np.sqrt(-error * sums.error_unit / count / means.shape[1])
        sides = np.where((np.arange(means.shape[1]) + word) % 2 == 0, step, -step)
        means[word] = means[large] + sides
        means[large] -= sides
        for half in (int(word), large):
            heapq.heappush(heap, (error / 2, half, count / 2))


def lloyd(rows: Array, centroids: Floats, iterations: int, assigner: Callable[[Floats], Assigner]) -> Floats:
    """Rounds of k-means from these centroids; `assigner` is built again for every round."""
    exponent = common_exponent(rows)
    for _ in range(iterations):
        centroids = update(centroids, assignment_sums(rows, assigner(centroids), exponent))
    return centroids


def kmeans_in_groups(
    rows: Array, group_of: Int32s, words_of: Int64s, iterations: int, seed: int
) -> tuple[Floats, Int32s]:
    """k-means in each group of rows on its own: group g has `words_of[g]` words, from one to its number of rows.

    `group_of` (n,) is the group of a row; a group without rows has no words. It begins with rows drawn by the seed.
    Gives the centroids (W, D), ordered by group, and the group of every word (W,). All in one group is plain k-means.
    ValueError for other numbers of words.
    """
    counts = np.bincount(group_of, minlength=len(words_of))
    if not ((np.minimum(counts, 1) <= words_of) & (words_of <= counts)).all():
        raise ValueError("a group must have from one to as many words as rows, or none without rows")
    order = np.lexsort((np.random.default_rng(seed).permutation(len(rows)), group_of))
    begins = np.searchsorted(group_of[order], np.arange(len(words_of)))
    word_groups = np.repeat(np.arange(len(words_of), dtype=np.int32), words_of)
    ranks = np.arange(len(word_groups)) - np.repeat(np.cumsum(words_of) - words_of, words_of)
    centroids: Floats = np.ascontiguousarray(rows[order[begins[word_groups] + ranks]], np.float32)
    exponent = common_exponent(rows)
    for _ in range(iterations):
        lists = WordLists(centroids, word_groups, len(words_of))
        words, squared = lists.nearest(rows, group_of[:, None], 1)
        sums = _sums_of(rows, words[:, 0], squared[:, 0], len(centroids), exponent)
        centroids = update(centroids, sums, word_groups)
    return centroids, word_groups


def nested_parts(rows: Array, words: int, seed: int) -> Iterator[Array]:
    """Parts of rows to begin k-means with, drawn by the seed, each within the next: the last is half of all, but at
    most 64 rows per word, the one before it its half, and so on down to 4 rows per word.

    In the first rounds words move far, for which few rows are enough (Newling and Fleuret, Nested mini-batch k-means,
    2016). Where half of all is less than 4 rows per word, it is all rows instead, twice.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    largest = min(len(rows) // 2, START_ROWS_PER_WORD[1] * words)
    halvings = range((largest // (START_ROWS_PER_WORD[0] * words)).bit_length())
    for size in [largest >> number for number in reversed(halvings)] or [len(rows)] * 2:
        yield rows[np.sort(order[:size])]


def two_level_words(rows: Array, words: int, seed: int) -> Floats:
    """Centroids (W, D) to begin with: about sqrt(W) cells, then k-means in every cell, whose share of the words is that
    of its rows. It costs sqrt(W) comparisons per row and round instead of W."""
    num_cells = max(1, round(words**0.5))
    some = sampled_rows(rows, num_cells, seed)
    everywhere = np.zeros(len(some), np.int32)
    cells, _ = kmeans_in_groups(some, everywhere, np.array([num_cells]), CELL_ITERATIONS, seed)
    cell_of = WordLists(cells).nearest(rows, None, 1)[0][:, 0]
    counts = np.bincount(cell_of, minlength=num_cells)
    return kmeans_in_groups(rows, cell_of, _shares(counts, words), START_ITERATIONS, seed)[0]


def _shares(counts: npt.NDArray[np.intp], words: int) -> Int64s:
    """Words per cell (C,) in proportion to its rows, by largest remainder: at least one where there are rows, and never
    more than rows."""
    spare = np.maximum(counts - 1, 0)
    free = words - int((counts > 0).sum())
    quotas = free * spare
    shares = (counts > 0) + quotas // max(1, int(spare.sum()))
    remainders = quotas % max(1, int(spare.sum()))
    shares[np.argsort(-remainders, kind="stable")[: words - int(shares.sum())]] += 1
    return np.asarray(shares, np.int64)
