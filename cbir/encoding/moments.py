"""Additive statistics of vectors: shards keep their moments, and the sum of these is the moments of all."""

from dataclasses import dataclass

import numpy as np

from cbir.types import Array, Float64s

__all__ = ["Moments"]

BLOCK = 4096
"""Rows at a time, so that the float64 copy stays small."""


@dataclass(frozen=True)
class Moments:
    """n, sum of x (D,) and sum of x x^T (D, D) of n rows, in float64; `a + b` are those of both sets of rows."""

    count: int
    total: Float64s
    outer: Float64s

    @classmethod
    def of(cls, rows: Array) -> "Moments":
        """The moments of rows (n, D) of any numeric dtype; n may be zero."""
        dim = rows.shape[1]
        total, outer = np.zeros(dim), np.zeros((dim, dim))
        for start in range(0, len(rows), BLOCK):
            wide = rows[start : start + BLOCK].astype(np.float64)
            total += wide.sum(axis=0)
            outer += wide.T @ wide
        return cls(len(rows), total, outer)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Float64s:
        """(D,); ValueError without rows."""
        if self.count == 0:
            raise ValueError("no rows have no mean")
        return self.total / self.count

    @property
    def covariance(self) -> Float64s:
        """(D, D), the unbiased one with n - 1; ValueError with fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows, found {self.count}")
        mean = self.mean
        return (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
