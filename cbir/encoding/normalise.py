"""Normalisation of single rows: L2, and the signed power law with its square-root case SSR."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.types import Array, FeatureBatch, Float64s, Floats, State

__all__ = ["L2", "Power", "Rowwise", "RowwiseSpec", "l2_normalised", "signed_power"]

EPSILON = 1e-12
"""Shorter rows are divided by this instead of their length, so that zero stays zero."""

BLOCK = 1024
"""Rows at a time, so that the float64 copies stay small."""


def l2_normalised(rows: Array) -> Float64s:
    """v / max(|v|, 1e-12) along the last axis, in float64."""
    wide = rows.astype(np.float64)
    norms = np.sqrt(np.add.reduce(wide * wide, axis=-1, keepdims=True))
    wide /= np.maximum(norms, EPSILON)
    return wide


def signed_power(rows: Array, alpha: float) -> Float64s:
    """sign(x) |x|^alpha of every component, in float64; alpha = 0.5 is signed square rooting (SSR)."""
    magnitudes = np.abs(rows.astype(np.float64))
    # sqrt is correctly rounded on every processor, power is not.
    raised = np.sqrt(magnitudes) if alpha == 0.5 else np.power(magnitudes, alpha)
    return np.copysign(raised, rows)


@dataclass(frozen=True)
class Rowwise:
    """An encoder that maps every row (D,) to another (D,) by a fixed rule; the geometry stays."""

    transform: Callable[[Array], Float64s]

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (K, D) float32."""
        rows: Floats = np.empty(batch.descriptors.shape, np.float32)
        for start in range(0, len(rows), BLOCK):
            rows[start : start + BLOCK] = self.transform(batch.descriptors[start : start + BLOCK])
        return batch.with_descriptors(rows)

    def state(self) -> State:
        """Nothing was trained."""
        return {}


class RowwiseSpec(EncoderSpec):
    """Configuration of a `Rowwise` encoder: a method states its `transform` and is complete."""

    def transform(self, rows: Array) -> Float64s:
        """(n, D) -> (n, D); each row for itself."""
        raise NotImplementedError

    def fit(self, sample: FeatureBatch, seed: int) -> Rowwise:  # noqa: ARG002 - the role's signature
        """Ready without training."""
        return Rowwise(self.transform)

    def restore(self, state: State) -> Rowwise:  # noqa: ARG002 - the role's signature
        """Ready without a state."""
        return Rowwise(self.transform)


class L2(RowwiseSpec):
    """L2 normalisation: every row becomes a unit vector, so that inner product is cosine; zero stays zero."""

    name: Literal["l2"] = "l2"
    paper: ClassVar[str] = "Salton, Wong and Yang, A vector space model for automatic indexing, CACM 1975"

    def transform(self, rows: Array) -> Float64s:
        """v / |v|."""
        return l2_normalised(rows)


class Power(RowwiseSpec):
    """Power law (Perronnin et al. 2010): sign(x) |x|^alpha damps bursts; 0.5 is SSR. Follow it with `l2`."""

    name: Literal["power"] = "power"
    paper: ClassVar[str] = "Perronnin, Sanchez and Mensink, Improving the Fisher kernel, ECCV 2010"

    alpha: float = Field(default=0.5, gt=0, le=1, description="the exponent; 1 changes nothing")

    def transform(self, rows: Array) -> Float64s:
        """sign(x) |x|^alpha."""
        return signed_power(rows, self.alpha)
