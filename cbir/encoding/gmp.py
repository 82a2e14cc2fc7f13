"""Generalised max pooling: every local feature is about equally similar to the image's vector."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.weighted_sum import WeightedSumSpec, gram
from cbir.types import Float64s

__all__ = ["Gmp", "gmp_weights"]


def gmp_weights(similarities: Float64s, regularisation: float) -> Float64s:
    """alpha = (K + lambda I)^-1 1 for the inner products K (n, n); the pooled vector is the sum of alpha_i x_i."""
    num = len(similarities)
    return _solution(similarities + regularisation * np.eye(num), np.ones(num))


class Gmp(WeightedSumSpec):
    """Generalised max pooling (Murray and Perronnin 2014): K rows -> argmin |X v - 1|² + lambda |v|², one row (D).

    The ridge regression is solved in its dual form, or in the primal one for more rows than dimensions. Without
    regularisation every feature has inner product 1 with the vector, so that a burst of equal features counts once;
    with much of it the result is the sum's direction. Cost grows with the cube of the lesser of rows and D. `temb` has
    it as a setting.
    """

    name: Literal["gmp"] = "gmp"
    paper: ClassVar[str] = "Murray and Perronnin, Generalized max pooling, CVPR 2014"

    regularisation: float = Field(default=1.0, gt=0, description="lambda, in squared units of the features")

    def total(self, rows: Float64s) -> Float64s:
        """By the smaller of both systems of equations."""
        if len(rows) <= rows.shape[1]:
            weights = gmp_weights(gram(rows), self.regularisation)
            total: Float64s = np.add.reduce(weights[:, None] * rows, axis=0)
            return total
        system = gram(np.ascontiguousarray(rows.T)) + self.regularisation * np.eye(rows.shape[1])
        return _solution(system, np.add.reduce(rows, axis=0))


def _solution(system: Float64s, right: Float64s) -> Float64s:
    return np.linalg.solve(system, right).astype(np.float64, copy=False)
