"""Democratic aggregation: every local feature has the same say in the similarity of an image to itself."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.weighted_sum import WeightedSumSpec, gram
from cbir.types import Float64s

__all__ = ["Democratic", "democratic_weights"]


def democratic_weights(similarities: Float64s, iterations: int) -> Float64s:
    """lambda (n,) with lambda_i sum_j lambda_j max(K_ij, 0) = 1, by the modified Sinkhorn iteration; K is (n, n).

    A feature that resembles nothing, not even itself (a zero row), keeps the weight 1.
    """
    positive = np.maximum(similarities, 0.0)
    weights = np.ones(len(positive))
    for _ in range(iterations):
        shares = weights * np.add.reduce(positive * weights, axis=1)
        weights = weights / np.sqrt(np.where(shares > 0, shares, 1.0))
    return weights


class Democratic(WeightedSumSpec):
    """Democratic aggregation (Jégou and Zisserman 2014): K rows -> sum of lambda_i x_i, one row (D) per image.

    The weights make lambda_i x_i . sum of lambda_j x_j the same for all features, as far as inner products are not
    negative, so that a burst of n equal features counts sqrt(n) times. `temb` has it as a setting.
    """

    name: Literal["democratic"] = "democratic"
    paper: ClassVar[str] = "Jégou and Zisserman, Triangulation embedding and democratic aggregation, CVPR 2014"

    iterations: int = Field(default=10, ge=0, description="rounds of the Sinkhorn algorithm; 0 is a plain sum")

    def total(self, rows: Float64s) -> Float64s:
        """By the weights of the rows' Gram matrix."""
        weights = democratic_weights(gram(rows), self.iterations)
        total: Float64s = np.add.reduce(weights[:, None] * rows, axis=0)
        return total
