"""Fisher vectors: how the parameters of a mixture of Gaussians would change to fit an image's local features."""

from typing import ClassVar, Literal

import numba
import numpy as np
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.gmm import Gmm
from cbir.encoding.normalise import l2_normalised, signed_power
from cbir.encoding.parts import image_box, positions
from cbir.encoding.product import check_dim
from cbir.errors import DataError
from cbir.types import Array, FeatureBatch, Float64s, Floats, State

__all__ = ["Fisher", "FisherEncoder", "fisher_vector"]

POSTERIOR_FLOOR = 1e-9
"""Smaller posteriors are left out; most Gaussians have no share in a feature."""

EXTRA = {"none": 0, "xy": 2, "xys": 3}


class Fisher(EncoderSpec):
    """Fisher vector (Perronnin et al. 2010): gradients of ln p by means and deviations; K rows -> one row (2*W*D).

    U_w = 1 / (T sqrt(p_w)) sum of g (x - m) / s, S_w = 1 / (T sqrt(2 p_w)) sum of g (((x - m) / s)² - 1) with the
    posteriors g of T features; with `weights` also 1 / (T sqrt(p_w)) sum of g - p_w, in front. Then power law and
    L2. An image without features becomes the zero vector. `spatial` appends place (and scale) in the image to the
    descriptors, times `spatial_weight` (Sanchez et al. 2012). Reduce local features to 64 dimensions before it by
    `{name: pca, dim: 64}`.
    """

    name: Literal["fisher"] = "fisher"
    paper: ClassVar[str] = "Perronnin, Sanchez and Mensink, Improving the Fisher kernel, ECCV 2010"

    aggregates: ClassVar[bool] = True

    gaussians: int = Field(default=64, ge=1, description="size of the mixture")
    iterations: int = Field(default=30, ge=0, description="rounds of EM, after k-means")
    weights: bool = Field(default=False, description="the gradients by the mixture's weights, too")
    alpha: float = Field(default=0.5, gt=0, le=1, description="power law of every component; 1 changes nothing")
    spatial: Literal["none", "xy", "xys"] = Field(default="none", description="x and y, or these and log scale")
    spatial_weight: float = Field(
        default=1.0, gt=0, description="x and y go from -1/2 to 1/2, times this times the sample's mean length"
    )

    @property
    def trained(self) -> bool:
        """The mixture is."""
        return True

    def output_dim(self, dim: int) -> int:
        """2 W D, and W with weights."""
        return self.gaussians * (2 * (dim + EXTRA[self.spatial]) + self.weights)

    def fit(self, sample: FeatureBatch, seed: int) -> "FisherEncoder":
        """Train the mixture; DataError if there are too few rows."""
        wide = sample.descriptors.astype(np.float64)
        lengths = np.sqrt(np.add.reduce(wide * wide, axis=1))
        scale = np.array([self.spatial_weight * lengths.mean() if len(lengths) else 1.0])
        return FisherEncoder(
            self, Gmm.train(self.augmented(sample, scale), self.gaussians, self.iterations, seed), scale
        )

    def restore(self, state: State) -> "FisherEncoder":
        """From the mixture."""
        return FisherEncoder(self, Gmm(state["weights"], state["means"], state["variances"]), state["scale"])

    def augmented(self, batch: FeatureBatch, scale: Float64s) -> Array:
        """The descriptors (K, D), with what `spatial` appends."""
        if self.spatial == "none":
            return batch.descriptors
        if batch.geometry.shape[1] < EXTRA[self.spatial] and len(batch.geometry):
            raise DataError(f"spatial: {self.spatial} needs features with geometry; these have none, so set it to none")
        parts = [self._places(batch, i) for i in range(len(batch))]
        places = np.concatenate([np.empty((0, EXTRA[self.spatial])), *parts])
        return np.concatenate([batch.descriptors.astype(np.float64), scale * places], axis=1)

    def _places(self, batch: FeatureBatch, i: int) -> Float64s:
        """x and y from -1/2 to 1/2, and ln of the size as a share of the image's diagonal, of an image's features."""
        own, box = batch.rows(i), image_box(batch, i).astype(np.float64)
        extent = np.maximum(box[2:] - box[:2], 1.0)
        places = (positions(batch)[own] - box[:2]) / extent - 0.5
        if self.spatial == "xy":
            return places
        sizes = np.maximum(batch.geometry[own, 2].astype(np.float64), 1e-3) / np.sqrt(np.add.reduce(extent * extent))
        return np.concatenate([places, np.log(sizes)[:, None] / np.log(1e3) + 0.5], axis=1)


class FisherEncoder:
    """Fisher vectors with a trained mixture."""

    def __init__(self, spec: Fisher, mixture: Gmm, scale: Float64s) -> None:
        self.spec, self.mixture, self._scale = spec, mixture, scale

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, 2*W*D) float32, one row per image."""
        dim = self.mixture.means.shape[1] - EXTRA[self.spec.spatial]
        check_dim(batch.descriptors, dim)
        rows = self.spec.augmented(batch, self._scale)
        vectors: Floats = np.empty((len(batch), self.spec.output_dim(dim)), np.float32)
        for i in range(len(batch)):
            gradient = fisher_vector(rows[batch.rows(i)], self.mixture, weights=self.spec.weights)
            vectors[i] = l2_normalised(signed_power(gradient, self.spec.alpha) if self.spec.alpha < 1 else gradient)
        return FeatureBatch.of_global(batch.image_ids, vectors)

    def state(self) -> State:
        """The mixture's `weights` (W,), `means` and `variances` (W, D), and `scale` (1,) of places, in float64."""
        mixture = self.mixture
        kept = {"weights": mixture.weights, "means": mixture.means, "variances": mixture.variances}
        return kept | {"scale": self._scale}


def fisher_vector(rows: Array, mixture: Gmm, *, weights: bool) -> Float64s:
    """The gradients of one image's rows (T, D): [W weights,] W*D means, W*D deviations; zero without rows."""
    posteriors = mixture.posteriors(rows)
    means, deviations = np.zeros(mixture.means.shape), np.zeros(mixture.means.shape)
    scales = 1.0 / np.sqrt(mixture.variances)
    _add_gradients(np.require(rows, np.float64, ["C", "W"]), posteriors, mixture.means, scales, means, deviations)
    num, roots = max(len(rows), 1), np.sqrt(mixture.weights)
    means /= num * roots[:, None]
    deviations /= num * np.sqrt(2.0) * roots[:, None]
    parts = [means.reshape(-1), deviations.reshape(-1)]
    if weights:
        parts.insert(0, np.add.reduce(posteriors - mixture.weights, axis=0) / (num * roots))
    return np.concatenate(parts)


@numba.njit(cache=True, nogil=True)
def _add_gradients(
    rows: Float64s, posteriors: Float64s, centres: Float64s, scales: Float64s, means: Float64s, deviations: Float64s
) -> None:
    for i in range(len(rows)):
        for w in range(len(centres)):
            share = posteriors[i, w]
            if share < POSTERIOR_FLOOR:
                continue
            for d in range(rows.shape[1]):
                e = (rows[i, d] - centres[w, d]) * scales[w, d]
                means[w, d] += share * e
                deviations[w, d] += share * (e * e - 1.0)
