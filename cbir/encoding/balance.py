"""Balancing of variances before product quantisation."""

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.moments import Moments
from cbir.encoding.normalise import Rowwise
from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError
from cbir.types import Array, FeatureBatch, Float64s, State

__all__ = ["Balance", "BalanceEncoder", "balancing_reflection", "random_rotation"]


class Balance(EncoderSpec):
    """Balancing before product quantisation (Jégou et al. 2010): an orthogonal transform after which sub-vectors have
    more equal variances, so that all their codes are put to use. Distances and inner products stay.

    PCA sorts components by variance, so that the first sub-vectors hold nearly everything. `rotation` is a random one
    and mixes all components at D² operations per row. `householder` is the reflection I - 2 v v^T at D operations
    that spreads the direction of largest variance over the sub-vectors, the most to those with the least; no single
    reflection can do much more. Put it between `pca` and the index `ivfpq`, whose `opq` learns more and costs more.
    """

    name: Literal["balance"] = "balance"
    paper: ClassVar[str] = "Jégou et al., Aggregating local descriptors into a compact image representation, CVPR 2010"

    form: Literal["householder", "rotation"] = Field(default="rotation", description="which orthogonal transform")
    parts: PositiveInt | None = Field(
        default=None, description="sub-vectors to balance by householder: the `bytes` of ivfpq; they must divide D"
    )

    @model_validator(mode="after")
    def _parts_are_those_of_householder(self) -> Self:
        if (self.form == "householder") != (self.parts is not None):
            remedy = "set it to the bytes of ivfpq" if self.parts is None else "leave it out, or set form: householder"
            raise ValueError(f"parts: form {self.form} {'needs' if self.parts is None else 'knows no'} parts; {remedy}")
        return self

    @property
    def trained(self) -> bool:
        """The transform is made for the sample's D, and by householder for its covariance."""
        return True

    def fit(self, sample: FeatureBatch, seed: int) -> "BalanceEncoder":
        """The transform for the sample's rows; DataError if these are fewer than two or do not fit."""
        rows = sample.descriptors
        if len(rows) < 2:
            raise DataError(f"a sample of at least two rows is needed, found {len(rows)}; take a larger sample")
        if self.parts is None:
            return self.restore({"rotation": random_rotation(rows.shape[1], seed).astype(np.float32)})
        if rows.shape[1] % self.parts:
            raise DataError(
                f"parts: {self.parts} parts do not divide vectors of D = {rows.shape[1]}; set a divisor of D, the same "
                "as the bytes of ivfpq"
            )
        if not np.isfinite(rows).all():
            raise DataError("the sample of descriptors holds NaN or infinite values; see what the extractor returned")
        return self.restore({"normal": balancing_reflection(Moments.of(rows).covariance, self.parts)})

    def restore(self, state: State) -> "BalanceEncoder":
        """From the normal or the rotation."""
        return BalanceEncoder(state)


class BalanceEncoder:
    """A known reflection or rotation."""

    def __init__(self, state: State) -> None:
        self._state = dict(state)
        self._matrix = self._state["rotation"] if "rotation" in self._state else self._state["normal"][None, :]
        self._product = ReproducibleProduct(self._matrix)
        self._rows = Rowwise(self._product if "rotation" in self._state else self._reflected)

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (K, D) float32; images and geometry stay."""
        self._product.check(batch.descriptors)
        return self._rows.encode(batch)

    def _reflected(self, rows: Array) -> Float64s:
        reflected: Float64s = rows - 2.0 * self._product(rows) * self._matrix
        return reflected

    def state(self) -> State:
        """`rotation` (D, D) float32, or `normal` (D,) float64, the unit vector v."""
        return self._state


def random_rotation(dim: int, seed: int) -> Float64s:
    """An orthogonal matrix (D, D), of all equally likely ones (Stewart 1980)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def balancing_reflection(covariance: Float64s, parts: int) -> Float64s:
    """The unit normal v (D,) of the reflection that turns the direction of largest variance to all `parts` sub-vectors.

    What each gets of its variance brings the poorest of them to one level, by what they hold of all other directions.
    DataError if nothing varies.
    """
    variances, vectors = np.linalg.eigh(covariance)
    largest, direction = variances[-1], vectors[:, -1]
    if largest <= 0:
        raise DataError("all rows of the sample are equal, so there is no variance to balance; take another sample")
    others = np.diag(covariance) - largest * direction * direction
    held = others.reshape(parts, -1).sum(axis=1)
    level = ((largest + np.cumsum(np.sort(held))) / np.arange(1, parts + 1)).min()
    shares = np.repeat(np.maximum(level - held, 0.0) / largest, len(covariance) // parts)
    target = np.sqrt(shares / shares.sum())
    # Of both ways to turn it there, the one whose normal is long, and so exact.
    normal: Float64s = direction + np.copysign(1.0, direction @ target) * target
    return normal / np.linalg.norm(normal)
