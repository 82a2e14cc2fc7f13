"""The compiled scan of lists of visual words: the nearest ones, exactly, at the speed of 16-bit integers.

Words and rows are rounded to 16-bit whole numbers on a common grid, whose distances are exact and cheap. How far
rounding can have moved a distance is known, so every word that it could have put out of order is compared again in
double precision, one component after the other. Hence a row's words depend on this row alone, never on the batch, the
number of threads or the processor, and of equally near words the first wins.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from cbir.errors import DataError
from cbir.types import Array, Float64s, Floats, Int32s, Int64s

__all__ = ["Grid", "WordLists", "finite_rows", "nearest_of"]

WORD_BITS = 13
"""Words have norms up to 2**13 on the grid, and rows up to twice that: sums of products then fit 32 bits."""

BLOCK = 4096
"""Rows at a time: those of another dtype are copied."""

Int16s = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Grid:
    """Whole numbers for vectors: `rint((vector - centre) * scale)`."""

    centre: Float64s
    scale: float

    @classmethod
    def of(cls, words: Floats, bits: int) -> "Grid":
        """About the mean of the words (W, D), whose norms come up to 2**bits."""
        centre = np.add.reduce(words, axis=0, dtype=np.float64) / len(words)
        largest = float(np.sqrt(np.add.reduce((words - centre) ** 2, axis=1)).max())
        # A power of two, so that scaling is exact. Without any spread no row is near the grid, whatever the scale.
        return cls(centre, float(np.ldexp(1.0, bits - int(np.frexp(largest)[1]))))

    def scaled(self, rows: Floats) -> Float64s:
        """Rows (K, D) in units of the grid, not yet rounded."""
        return np.asarray((rows - self.centre) * self.scale, np.float64)


@dataclass(frozen=True)
class WordLists:
    """Visual words (W, D) in lists: `list_of` (W,) is the list that a word is in; without it, one list holds all."""

    words: Floats
    list_of: Int32s | None = None
    num_lists: int = 1
    begins: Int64s = field(init=False, repr=False, compare=False)
    """The list l holds the words `order[begins[l] : begins[l + 1]]`, by rising number."""
    order: Int64s = field(init=False, repr=False, compare=False)
    _stored: "_Stored" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        list_of = self.list_of if self.list_of is not None else np.zeros(len(self.words), np.int32)
        order = np.argsort(list_of, kind="stable")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "begins", np.searchsorted(list_of[order], np.arange(self.num_lists + 1)))
        object.__setattr__(self, "_stored", _Stored.of(self.words[order]))

    def nearest(self, rows: Array, lists: Int32s | None, num: int) -> tuple[Int32s, Float64s]:
        """The `num` nearest among the words of each row's lists (K, P), which differ: words (K, num) by rising distance
        and squared distances (K, num); -1 and inf where the lists hold fewer. A list -1 is none; without `lists`, all
        rows look in list 0.

        DataError if D is not that of the words, or a value is not finite.
        """
        words, squared = np.empty((len(rows), num), np.int32), np.empty((len(rows), num))
        for start in range(0, max(len(rows), 1), BLOCK):  # at least one round, so that D is checked
            some = slice(start, start + BLOCK)
            block = finite_rows(rows[some], self.words.shape[1])
            chosen = lists[some] if lists is not None else np.zeros((len(block), 1), np.int32)
            _scan(block, chosen, self.begins, self.order, *self._stored, words[some], squared[some])
        return words, squared


class _Stored(NamedTuple):
    """Words (W, D) as the scan reads them: whole numbers on a grid, their squared norms, and the largest norm of what
    rounding took."""

    words: Floats
    centre: Float64s
    scale: float
    numbers: Int16s
    squares: Int32s
    error: float

    @classmethod
    def of(cls, words: Floats) -> "_Stored":
        grid = Grid.of(words, WORD_BITS)
        scaled = grid.scaled(words)
        numbers = np.rint(scaled)
        squares = np.add.reduce(numbers * numbers, axis=1).astype(np.int32)
        scaled -= numbers
        error = float(np.sqrt(np.add.reduce(scaled * scaled, axis=1)).max())
        return cls(words, grid.centre, grid.scale, numbers.astype(np.int16), squares, error)


def finite_rows(rows: Array, dim: int) -> Floats:
    """The rows as contiguous float32; DataError if D is not `dim`, or a value is not finite."""
    if rows.shape[1] != dim:
        raise DataError(
            f"these features have D = {rows.shape[1]}, but the vocabulary was trained on D = {dim}; "
            "train it again, or use the extractor and the encoders that it was trained with"
        )
    block: Floats = np.require(rows, np.float32, ["C", "W"])  # a read-only array would compile the loops once more
    if not np.isfinite(block).all():
        raise DataError("descriptors hold NaN or infinite values; see what the extractor or the encoders returned")
    return block


def nearest_of(rows: Floats, candidates: Int32s, words: Floats, num: int) -> tuple[Int32s, Float64s]:
    """The `num` nearest among each row's candidate words (K, M), as `WordLists.nearest` gives them; -1 is skipped."""
    found, squared = np.empty((len(rows), num), np.int32), np.empty((len(rows), num))
    _compare(rows, candidates, words, found, squared)
    return found, squared


@numba.njit(cache=True, nogil=True)
def _round_row(row: Floats, centre: Float64s, scale: float, fixed: Int16s) -> tuple[float, float]:
    """Write the row's whole numbers; their squared norm and the norm of what rounding took, or inf off the grid."""
    limit = 2.0 ** (2 * WORD_BITS + 2)
    square, lost = 0.0, 0.0
    for d in range(len(row)):
        exact = (row[d] - centre[d]) * scale
        whole = np.rint(exact)
        square += whole * whole
        if square > limit:
            return 0.0, np.inf
        fixed[d] = np.int16(whole)
        lost += (exact - whole) * (exact - whole)
    return square, np.sqrt(lost)


@numba.njit(cache=True, nogil=True)
def _squared_distance(left: Floats, right: Floats) -> float:
    total = 0.0
    for d in range(len(left)):
        difference = np.float64(left[d]) - np.float64(right[d])
        total += difference * difference
    return total


@numba.njit(cache=True, nogil=True)
def _insert(words: Int32s, squared: Float64s, word: int, distance: float) -> None:
    """Put a word in its place by rising distance, equal ones by rising number; the last one falls out."""
    at = len(words)
    while at > 0 and (distance < squared[at - 1] or (distance == squared[at - 1] and word < words[at - 1])):
        at -= 1
    if at == len(words):
        return
    for later in range(len(words) - 1, at, -1):
        words[later], squared[later] = words[later - 1], squared[later - 1]
    words[at], squared[at] = word, distance


@numba.njit(cache=True, nogil=True)
def _insert_least(least: Int32s, value: int) -> None:
    """Put a value in its place among the least ones, by rising value; the greatest falls out."""
    at = len(least) - 1
    while at > 0 and value < least[at - 1]:
        least[at] = least[at - 1]
        at -= 1
    least[at] = value


@numba.njit(cache=True, nogil=True)
def _compare(rows: Floats, candidates: Int32s, words: Floats, found: Int32s, squared: Float64s) -> None:
    for i in range(len(rows)):
        found[i], squared[i] = -1, np.inf
        for candidate in candidates[i]:
            if candidate >= 0:
                _insert(found[i], squared[i], candidate, _squared_distance(rows[i], words[candidate]))


@numba.njit(cache=True, nogil=True)
def _scan(
    rows: Floats,
    lists: Int32s,
    begins: Int64s,
    order: Int64s,
    words: Floats,
    centre: Float64s,
    scale: float,
    numbers: Int16s,
    squares: Int32s,
    error: float,
    found: Int32s,
    squared: Float64s,
) -> None:
    num, dim = found.shape[1], rows.shape[1]
    fixed, least = np.zeros(dim, np.int16), np.empty(num, np.int32)
    partial = np.empty(len(words), np.int32)  # |w|^2 - 2 x.w, which is |x - w|^2 less a constant
    greatest = np.iinfo(np.int32).max
    for i in range(len(rows)):
        found[i], squared[i] = -1, np.inf
        square, lost = _round_row(rows[i], centre, scale, fixed)
        least[:] = greatest
        limit = np.float64(greatest)
        if lost < np.inf:
            for part in lists[i]:
                if part < 0:
                    continue
                for at in range(begins[part], begins[part + 1]):
                    product = np.int32(0)
                    for d in range(dim):
                        product = np.int32(product + np.int32(np.int32(fixed[d]) * np.int32(numbers[at, d])))
                    partial[at] = np.int32(squares[at] - 2 * product)
                    if partial[at] < least[num - 1]:
                        _insert_least(least, partial[at])
            if least[num - 1] < greatest:
                # Rounding moved a distance by at most error + lost, up for the one and down for the other word.
                reach = np.sqrt(square + least[num - 1]) + 2.0 * (error + lost) + 0.001
                limit = reach * reach - square
        for part in lists[i]:
            if part < 0:
                continue
            for at in range(begins[part], begins[part + 1]):
                if lost == np.inf or partial[at] <= limit:
                    _insert(found[i], squared[i], order[at], _squared_distance(rows[i], words[at]))
