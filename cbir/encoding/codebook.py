"""Codebooks of visual words by k-means."""

from dataclasses import dataclass, field

import faiss
import numpy as np

from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError
from cbir.types import Array, Float64s, Floats, Int64s

__all__ = ["Codebook"]

POINTS_PER_WORD = 256
"""More training rows per word are sampled down, by the seed: they cost time and move the words little."""

BLOCK = 1024
"""Rows at a time, so that the scores of a large codebook need not be held for all rows at once."""


@dataclass(frozen=True)
class Codebook:
    """Visual words (Sivic and Zisserman 2003): `centroids` (W, D) float32."""

    centroids: Floats
    _product: ReproducibleProduct = field(init=False, repr=False, compare=False)
    _half_norms: Float64s = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        wide = self.centroids.astype(np.float64)
        object.__setattr__(self, "_product", ReproducibleProduct(self.centroids))
        object.__setattr__(self, "_half_norms", 0.5 * np.add.reduce(wide * wide, axis=1))

    @classmethod
    def train(cls, rows: Array, words: int, iterations: int, seed: int) -> "Codebook":
        """k-means (Lloyd 1982) on rows (n, D) of any numeric dtype; a cell that runs empty splits a large one.

        The same rows, seed and number of threads give the same bytes. DataError with fewer rows than words, or with
        rows that are not finite.
        """
        if len(rows) < words:
            raise DataError(
                f"words: {words} words need at least as many descriptors, but the sample has {len(rows)}; "
                f"set words to at most {len(rows)}, or take a larger sample (39 descriptors per word are good)"
            )
        points: Floats = np.ascontiguousarray(rows, np.float32)
        if not np.isfinite(points).all():
            raise DataError("the sample of descriptors holds NaN or infinite values; see what the extractor returned")
        kmeans = faiss.Kmeans(
            points.shape[1],
            words,
            niter=iterations,
            seed=seed % 2**31,  # faiss holds it in a C int
            min_points_per_centroid=1,  # it would only print a warning
            max_points_per_centroid=POINTS_PER_WORD,
        )
        kmeans.train(points)
        return cls(np.array(kmeans.centroids, np.float32).reshape(words, -1))

    def __len__(self) -> int:
        return len(self.centroids)

    def assign(self, rows: Array) -> Int64s:
        """The nearest word of every row, (n, D) -> (n,); of equally near ones the first.

        A row's word depends on this row alone, whatever the batch. DataError if D is not the codebook's.
        """
        words = np.empty(len(rows), np.int64)
        self._product.check(rows)
        for start in range(0, len(rows), BLOCK):
            # |x - c|^2 is least where x.c - |c|^2 / 2 is greatest.
            scores = self._product(rows[start : start + BLOCK]) - self._half_norms
            words[start : start + BLOCK] = scores.argmax(axis=1)
        return words
