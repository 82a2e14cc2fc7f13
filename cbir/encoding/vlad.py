"""VLAD: the residuals of local features to their visual words, summed to one vector per image."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.codebook import Codebook
from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.normalise import l2_normalised, signed_power
from cbir.encoding.product import Float64s
from cbir.types import Array, FeatureBatch, Floats, Int64s, State

__all__ = ["Vlad", "VladEncoder", "residual_sums"]


class Vlad(EncoderSpec):
    """VLAD (Jégou et al. 2010): V_w = sum of x - c_w over the features x of word w; K rows -> one row (W*D) per image.

    Then SSR, each word's block to unit length (Arandjelović and Zisserman 2013, intra-normalisation), and all to unit
    length. The geometry is dropped; an image without features becomes the zero vector.
    """

    name: Literal["vlad"] = "vlad"
    paper: ClassVar[str] = "Jégou et al., Aggregating local descriptors into a compact image representation, CVPR 2010"

    aggregates: ClassVar[bool] = True

    words: int = Field(default=64, ge=1, description="size of the codebook")
    iterations: int = Field(default=25, ge=1, description="rounds of k-means")
    ssr: bool = Field(default=True, description="signed square rooting of every component")
    intra: bool = Field(default=True, description="L2 normalisation of every word's block")

    @property
    def trained(self) -> bool:
        """The codebook is."""
        return True

    def output_dim(self, dim: int) -> int:
        """W times D."""
        return self.words * dim

    def fit(self, sample: FeatureBatch, seed: int) -> "VladEncoder":
        """Train the codebook; another order of the sample's images may give another one. DataError if too few rows."""
        return VladEncoder(self, Codebook.train(sample.descriptors, self.words, self.iterations, seed))

    def restore(self, state: State) -> "VladEncoder":
        """From the centroids."""
        return VladEncoder(self, Codebook(np.ascontiguousarray(state["centroids"], np.float32)))

    def normalised(self, sums: Float64s) -> Float64s:
        """Residual sums (W, D) of one image, normalised in the order of vlfeat: SSR, intra, L2; (W*D,)."""
        blocks = signed_power(sums, 0.5) if self.ssr else sums
        blocks = l2_normalised(blocks) if self.intra else blocks
        return l2_normalised(blocks.reshape(-1))


class VladEncoder:
    """VLAD with a trained codebook."""

    def __init__(self, spec: Vlad, codebook: Codebook) -> None:
        self.spec, self.codebook = spec, codebook

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, W*D) float32, one row per image."""
        words = self.codebook.assign(batch.descriptors)
        vectors: Floats = np.empty((len(batch), self.codebook.centroids.size), np.float32)
        for i in range(len(batch)):
            rows = batch.rows(i)
            sums = residual_sums(batch.descriptors[rows], words[rows], self.codebook.centroids)
            vectors[i] = self.spec.normalised(sums)
        return FeatureBatch.of_global(batch.image_ids, vectors)

    def state(self) -> State:
        """`centroids` (W, D) float32."""
        return {"centroids": self.codebook.centroids}


def residual_sums(rows: Array, words: Int64s, centroids: Floats) -> Float64s:
    """The sum of x - c_w over the rows (n, D) of each word: (W, D) float64, additive over disjoint sets of rows."""
    residuals = rows - centroids[words]
    # bincount adds one after the other in the order of the rows; a product would leave the order to BLAS.
    cells = words[:, None] * rows.shape[1] + np.arange(rows.shape[1])
    sums = np.bincount(cells.reshape(-1), weights=residuals.reshape(-1), minlength=centroids.size)
    return sums.astype(np.float64, copy=False).reshape(centroids.shape)
