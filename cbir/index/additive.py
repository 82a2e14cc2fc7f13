"""Additive quantisers: a vector is coded as a sum of words, one of each codebook.

The words are chosen one codebook after the other and then exchanged one at a time for as long as that brings the sum
nearer to the vector (iterated conditional modes, Babenko and Lempitsky 2014). From there on, some words are replaced at
random and the exchanges begin again, and the nearest sum is kept (iterated local search, Martinez et al. 2018). The
random words are the same for all vectors, and all else is an exact product and sums in a fixed order, so that a code
does not depend on the batch; that of faiss's encoders does, by random words for a place in it and by float32 products.
"""

import numpy as np

from cbir.encoding.product import ReproducibleProduct
from cbir.types import Floats, Int64s

__all__ = ["AdditiveEncoder"]

_ROUNDS = 8
_REPLACED = 4
_MAX_SWEEPS = 8
_BLOCK_VALUES = 1 << 21


class AdditiveEncoder:
    """The choice of words of codebooks (M, W, D), with a table of their products (M, W, M, W)."""

    def __init__(self, codebooks: Floats) -> None:
        self._num_books, self._num_words, dim = codebooks.shape
        flat = codebooks.reshape(-1, dim)
        self._product = ReproducibleProduct(flat)
        shape = (self._num_books, self._num_words)
        self._norms = np.add.reduce(flat.astype(np.float64) ** 2, axis=1).reshape(shape)
        self._pairs = (2 * self._product(flat)).astype(np.float32).reshape(shape + shape)
        self._pairs[np.arange(self._num_books), :, np.arange(self._num_books)] = 0

    def words(self, rows: Floats) -> Int64s:
        """Rows (K, D) -> words (K, M)."""
        words = np.empty((len(rows), self._num_books), np.int64)
        step = max(1, _BLOCK_VALUES // (self._num_books * self._num_words))
        for start in range(0, len(rows), step):
            words[start : start + step] = self._words(rows[start : start + step])
        return words

    def _words(self, rows: Floats) -> Int64s:
        products = self._product(rows).reshape(len(rows), self._num_books, self._num_words)
        choice = _Choice((self._norms - 2 * products).astype(np.float32), self._pairs)
        choice.begin()
        best, error = choice.words.copy(), choice.error()
        rng = np.random.default_rng(0)
        for _ in range(_ROUNDS):
            choice.move(best)
            for book in rng.choice(self._num_books, min(_REPLACED, self._num_books), replace=False).tolist():
                choice.replace(book, np.full(len(rows), rng.integers(self._num_words)))
            choice.exchange()
            better = (found := choice.error()) < error
            best[better], error[better] = choice.words[better], found[better]
        return best


class _Choice:
    """Words (K, M) of rows, and what every word would cost in place of the chosen one of its codebook, (K, M, W).

    ||x - sum c||^2 - ||x||^2 is the sum of what the words cost `alone`, ||c||^2 - 2 x c, and of all `pairs`, 2 c c'.
    """

    def __init__(self, alone: Floats, pairs: Floats) -> None:
        self.alone, self.pairs, self.costs = alone, pairs, alone.copy()
        self._num_rows, self._num_books, _ = alone.shape
        self.words = np.zeros((self._num_rows, self._num_books), np.int64)

    def begin(self) -> None:
        """Choose one word after the other, and exchange them."""
        for book in range(self._num_books):
            self.words[:, book] = self.costs[:, book].argmin(1)
            self.costs += self.pairs[book, self.words[:, book]]
        self.exchange()

    def exchange(self) -> None:
        """Exchange one word after the other for the best, for as long as a word changes."""
        for _ in range(_MAX_SWEEPS):
            before = self.words.copy()
            for book in range(self._num_books):
                self.replace(book, self.costs[:, book].argmin(1))
            if np.array_equal(before, self.words):
                break

    def replace(self, book: int, new: Int64s) -> None:
        """Choose these words (K,) of a codebook."""
        moved = np.flatnonzero(new != self.words[:, book])
        self.costs[moved] += self.pairs[book, new[moved]] - self.pairs[book, self.words[moved, book]]
        self.words[moved, book] = new[moved]

    def move(self, words: Int64s) -> None:
        """Choose these words (K, M)."""
        for book, new in enumerate(words.T):
            self.replace(book, new)

    def error(self) -> Floats:
        """Twice the error (K,) less the squared norm of a row: a pair is in the costs of both of its words."""
        chosen = (np.arange(self._num_rows)[:, None], np.arange(self._num_books), self.words)
        errors: Floats = np.add.reduce(self.costs[chosen] + self.alone[chosen], axis=1)
        return errors
