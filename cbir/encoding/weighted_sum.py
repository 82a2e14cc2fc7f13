"""Aggregation of an image's rows to their sum, with weights that depend on how the rows resemble each other."""

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.normalise import l2_normalised, signed_power
from cbir.encoding.product import ReproducibleProduct
from cbir.types import Array, FeatureBatch, Float64s, Floats, State

__all__ = ["Sum", "WeightedSum", "WeightedSumSpec", "gram"]


def gram(rows: Array) -> Float64s:
    """The inner products (n, n) of rows (n, D)."""
    return ReproducibleProduct(rows)(rows)


class WeightedSumSpec(EncoderSpec):
    """Configuration of a weighted sum: a method states its `total` and is complete."""

    aggregates: ClassVar[bool] = True

    alpha: float = Field(default=1.0, gt=0, le=1, description="power law of every component; 0.5 is SSR, 1 is none")
    l2: bool = Field(default=True, description="unit vectors at the end")

    @abstractmethod
    def total(self, rows: Float64s) -> Float64s:
        """The weighted sum (D,) of one image's rows (n, D), n > 0."""

    def fit(self, sample: FeatureBatch, seed: int) -> "WeightedSum":  # noqa: ARG002 - the role's signature
        """Ready without training."""
        return WeightedSum(self)

    def restore(self, state: State) -> "WeightedSum":  # noqa: ARG002 - the role's signature
        """Ready without a state."""
        return WeightedSum(self)


class WeightedSum:
    """A sum of each image's rows."""

    def __init__(self, spec: WeightedSumSpec) -> None:
        self.spec = spec

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, D) float32, one row per image; zero without features."""
        vectors: Floats = np.zeros((len(batch), batch.descriptors.shape[1]), np.float32)
        for i in map(int, np.flatnonzero(batch.counts)):
            total = self.spec.total(batch.descriptors[batch.rows(i)].astype(np.float64))
            powered = signed_power(total, self.spec.alpha) if self.spec.alpha < 1 else total
            vectors[i] = l2_normalised(powered) if self.spec.l2 else powered
        return FeatureBatch.of_global(batch.image_ids, vectors)

    def state(self) -> State:
        """Nothing was trained."""
        return {}


class Sum(WeightedSumSpec):
    """Sum aggregation (Babenko and Lempitsky 2015, of local features): K rows -> their sum, one row (D) per image."""

    name: Literal["sum"] = "sum"
    paper: ClassVar[str] = "Babenko and Lempitsky, Aggregating deep convolutional features, ICCV 2015"

    def total(self, rows: Float64s) -> Float64s:
        """Every weight is 1."""
        total: Float64s = np.add.reduce(rows, axis=0)
        return total
