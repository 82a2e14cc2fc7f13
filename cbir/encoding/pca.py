"""PCA and whitening of descriptors."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.moments import Moments
from cbir.encoding.normalise import BLOCK, l2_normalised
from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError
from cbir.types import Array, FeatureBatch, Float64s, Floats, State

__all__ = ["Pca", "PcaEncoder", "principal_components"]


class Pca(EncoderSpec):
    """PCA (Pearson 1901) with optional whitening (Jégou and Chum 2012): x -> L2(Λ^(-1/2) U (x - mean)), K rows kept.

    Whitening divides every component by its standard deviation, so that co-occurring components count once. A zero
    row, an image in which nothing was found, stays zero instead of becoming the direction away from the mean.
    """

    name: Literal["pca"] = "pca"
    paper: ClassVar[str] = "Jégou and Chum, Negative evidences and co-occurrences in image retrieval, ECCV 2012"

    dim: int = Field(ge=1, examples=[128], description="how many components are kept")
    whiten: bool = Field(default=False, description="scale every component to unit variance")
    shrinkage: float = Field(default=1.0, ge=0, le=1, description="whitening by Λ^(-shrinkage/2): 1 is full, 0 none")
    floor: float = Field(default=1e-9, gt=0, le=1, description="variances count as at least this share of the largest")
    l2: bool = Field(default=True, description="unit vectors at the end")

    @property
    def trained(self) -> bool:
        """Mean and components are."""
        return True

    def output_dim(self, dim: int) -> int:  # noqa: ARG002 - that of its settings
        """The number of components."""
        return self.dim

    def fit(self, sample: FeatureBatch, seed: int) -> "PcaEncoder":  # noqa: ARG002 - nothing is random here
        """Mean and components of the sample's rows; DataError if these are too few, not finite or all equal."""
        rows = sample.descriptors
        largest = max(0, min(len(rows) - 1, rows.shape[1]))
        if self.dim > largest:
            raise DataError(
                f"dim: {self.dim} components of a sample of {len(rows)} rows with D = {rows.shape[1]} are asked for, "
                f"but at most {largest} exist; set dim to at most {largest}, or take a larger sample"
            )
        if not np.isfinite(rows).all():
            raise DataError("the sample of descriptors holds NaN or infinite values; see what the extractor returned")
        mean, components, variances = principal_components(rows, self.dim)
        if self.whiten and variances[0] == 0:
            raise DataError("whiten: all rows of the sample are equal, so nothing can be whitened; take another sample")
        state = {"mean": mean, "components": components.astype(np.float32), "variances": variances}
        return PcaEncoder(self, {key: np.ascontiguousarray(array) for key, array in state.items()})

    def restore(self, state: State) -> "PcaEncoder":
        """From mean, components and variances."""
        return PcaEncoder(self, state)


class PcaEncoder:
    """PCA with known components."""

    def __init__(self, spec: Pca, state: State) -> None:
        self.spec, self._state = spec, dict(state)
        self._mean, components, variances = state["mean"], state["components"], state["variances"]
        self._project = ReproducibleProduct(components)
        floored = np.maximum(variances, spec.floor * variances[0])
        self._scales = np.sqrt(floored**-spec.shrinkage) if spec.whiten else np.ones(len(components))

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (K, dim) float32; images and geometry stay."""
        self._project.check(batch.descriptors)
        rows: Floats = np.empty((len(batch.descriptors), self.spec.dim), np.float32)
        for start in range(0, len(rows), BLOCK):
            rows[start : start + BLOCK] = self._encode(batch.descriptors[start : start + BLOCK])
        return batch.with_descriptors(rows)

    def _encode(self, rows: Array) -> Float64s:
        centred = rows - self._mean
        projected = self._project(centred) * self._scales
        projected[~rows.any(axis=1)] = 0.0
        return l2_normalised(projected) if self.spec.l2 else projected

    def state(self) -> State:
        """`mean` (D,) float64, `components` (dim, D) float32 with orthonormal rows, `variances` (dim,) float64."""
        return self._state


def principal_components(rows: Array, dim: int) -> tuple[Float64s, Float64s, Float64s]:
    """The mean (D,), the first `dim` principal directions (dim, D) and the variances (dim,) along them, falling.

    Each direction's component of largest magnitude is positive, so that the sign is no matter of chance.
    """
    directions = _dual if len(rows) < rows.shape[1] else _primal
    mean, components, variances = directions(rows, dim)
    strongest = np.abs(components).argmax(axis=1)
    signs = np.where(np.take_along_axis(components, strongest[:, None], 1) < 0, -1.0, 1.0)
    return mean, components * signs, np.maximum(variances, 0.0)


def _primal(rows: Array, dim: int) -> tuple[Float64s, Float64s, Float64s]:
    moments = Moments.of(rows)
    variances, vectors = np.linalg.eigh(moments.covariance)
    return moments.mean, vectors[:, ::-1][:, :dim].T, variances[::-1][:dim]


def _dual(rows: Array, dim: int) -> tuple[Float64s, Float64s, Float64s]:
    """By the (n, n) Gram matrix, for fewer rows than dimensions."""
    wide = rows.astype(np.float64)
    mean = wide.mean(axis=0)
    wide -= mean
    variances, vectors = np.linalg.eigh(wide @ wide.T / (len(rows) - 1))
    # QR instead of a division by the singular values: directions without variance come out orthonormal as well.
    components = np.linalg.qr(wide.T @ vectors[:, ::-1][:, :dim])[0].T
    return mean, components, variances[::-1][:dim]
