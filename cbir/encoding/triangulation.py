"""Triangulation embedding: directions from all visual words to a local feature, whitened and summed."""

import functools
import operator
from typing import ClassVar, Literal

import numba
import numpy as np
from pydantic import Field

from cbir.encoding.codebook import Codebook
from cbir.encoding.democratic import democratic_weights
from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.gmp import gmp_weights
from cbir.encoding.moments import Moments
from cbir.encoding.normalise import l2_normalised, signed_power
from cbir.encoding.product import ReproducibleProduct, check_dim
from cbir.encoding.weighted_sum import gram
from cbir.types import Array, FeatureBatch, Float64s, Floats, State

__all__ = ["TriangulationEmbedding", "TriangulationEncoder", "directions"]

BLOCK = 512
"""Rows at a time: each becomes W * D numbers."""

FLOOR = 1e-6
"""Variances count as at least this share of the largest, where the sample has too few rows for all directions."""


class TriangulationEmbedding(EncoderSpec):
    """Triangulation embedding (Jégou and Zisserman 2014): K rows -> one row (W*D - D) per image.

    R(x) holds the unit vectors from all W words to x; phi(x) = Sigma^(-1/2) (R(x) - mean) in the eigenbasis of Sigma
    without its first D components. An image's vector is the sum of its phi, or their democratic or generalised max
    pooling, after power law and L2. A sum costs one projection per image, the other two one per feature, of
    (W*D)² operations; training takes (W*D)³. The paper's rotation (RN) is `{name: pca}` after it with alpha 1 here.
    """

    name: Literal["temb"] = "temb"
    paper: ClassVar[str] = "Jégou and Zisserman, Triangulation embedding and democratic aggregation, CVPR 2014"

    aggregates: ClassVar[bool] = True

    words: int = Field(ge=2, examples=[4, 16, 64], description="size of the codebook; the paper takes 16 to 64")
    iterations: int = Field(default=25, ge=1, description="rounds of k-means")
    aggregation: Literal["sum", "democratic", "gmp"] = Field(default="sum", description="how the features are summed")
    sinkhorn: int = Field(default=10, ge=0, description="rounds for democratic weights")
    regularisation: float = Field(
        default=1.0, gt=0, description="lambda of gmp, as a share of the mean squared length of phi in the sample"
    )
    alpha: float = Field(default=0.5, gt=0, le=1, description="power law of every component; 0.5 is SSR, 1 is none")
    l2: bool = Field(default=True, description="unit vectors at the end")

    @property
    def trained(self) -> bool:
        """Codebook, mean and whitening are."""
        return True

    def output_dim(self, dim: int) -> int:
        """W times D, less D."""
        return (self.words - 1) * dim

    def fit(self, sample: FeatureBatch, seed: int) -> "TriangulationEncoder":
        """Train codebook and whitening; the sample should have more rows than W*D. DataError with fewer than words."""
        rows = sample.descriptors
        codebook = Codebook.train(rows, self.words, self.iterations, seed)
        blocks = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
        moments = functools.reduce(
            operator.add, (Moments.of(directions(block, codebook.centroids)) for block in blocks)
        )
        variances, vectors = np.linalg.eigh(moments.outer / moments.count - np.outer(moments.mean, moments.mean))
        kept = variances[::-1][rows.shape[1] :]
        scales = 1.0 / np.sqrt(np.maximum(kept, FLOOR * variances[-1]))
        basis = vectors.T[::-1][rows.shape[1] :]
        strongest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], 1)
        projection = (basis * (scales[:, None] * np.where(strongest < 0, -1.0, 1.0))).astype(np.float32)
        return TriangulationEncoder(self, codebook, moments.mean, np.ascontiguousarray(projection))

    def restore(self, state: State) -> "TriangulationEncoder":
        """From centroids, mean and projection."""
        codebook = Codebook(np.ascontiguousarray(state["centroids"], np.float32))
        return TriangulationEncoder(self, codebook, state["mean"], state["projection"])


class TriangulationEncoder:
    """Triangulation embedding with trained words and whitening."""

    def __init__(self, spec: TriangulationEmbedding, codebook: Codebook, mean: Float64s, projection: Floats) -> None:
        self.spec, self.codebook = spec, codebook
        self._mean, self._projection = mean, projection
        self._project = ReproducibleProduct(projection)

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, W*D - D) float32, one row per image."""
        check_dim(batch.descriptors, self.codebook.centroids.shape[1])
        vectors: Floats = np.zeros((len(batch), len(self._projection)), np.float32)
        for i in map(int, np.flatnonzero(batch.counts)):
            total = self._total(batch.descriptors[batch.rows(i)])
            powered = signed_power(total, self.spec.alpha) if self.spec.alpha < 1 else total
            vectors[i] = l2_normalised(powered) if self.spec.l2 else powered
        return FeatureBatch.of_global(batch.image_ids, vectors)

    def embed(self, rows: Array) -> Float64s:
        """phi of rows (n, D): (n, W*D - D), of mean zero and unit covariance over the sample."""
        return self._project(directions(rows, self.codebook.centroids) - self._mean)

    def _total(self, rows: Array) -> Float64s:
        """The aggregated vector (W*D - D,) of one image's rows (n, D)."""
        if self.spec.aggregation == "sum":
            centred = directions(rows, self.codebook.centroids) - self._mean
            return self._project(np.add.reduce(centred, axis=0, keepdims=True)).reshape(-1)
        embedded = self.embed(rows)
        if self.spec.aggregation == "democratic":
            weights = democratic_weights(gram(embedded), self.spec.sinkhorn)
        else:
            # phi has unit covariance, so its mean squared length is its number of dimensions.
            weights = gmp_weights(gram(embedded), self.spec.regularisation * embedded.shape[1])
        total: Float64s = np.add.reduce(weights[:, None] * embedded, axis=0)
        return total

    def state(self) -> State:
        """`centroids` (W, D), `mean` (W*D,) float64 and `projection` (W*D - D, W*D), else float32."""
        return {"centroids": self.codebook.centroids, "mean": self._mean, "projection": self._projection}


def directions(rows: Array, centroids: Floats) -> Float64s:
    """R(x), the unit vectors from every word to rows (n, D): (n, W*D); zero for a row that is the word."""
    found = np.empty((len(rows), centroids.size))
    _directions(np.require(rows, np.float32, ["C", "W"]), centroids, found)
    return found


@numba.njit(cache=True, nogil=True)
def _directions(rows: Floats, centroids: Floats, found: Float64s) -> None:
    dim = rows.shape[1]
    for i in range(len(rows)):
        for word in range(len(centroids)):
            squared = 0.0
            for d in range(dim):
                difference = np.float64(rows[i, d]) - np.float64(centroids[word, d])
                found[i, word * dim + d] = difference
                squared += difference * difference
            if squared > 0.0:
                length = np.sqrt(squared)
                for d in range(dim):
                    found[i, word * dim + d] /= length
