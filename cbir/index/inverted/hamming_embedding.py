"""Hamming embedding: binary signatures that say where in its cell a feature lies."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from cbir.encoding.product import ReproducibleProduct
from cbir.encoding.vocabulary import Vocabulary
from cbir.errors import DataError
from cbir.index.inverted.embedding import Embedded, single
from cbir.index.inverted.inverted import InvertedSpec, Phi
from cbir.index.inverted.kernels import BinaryKernel, ConsistentKernel, MatchKernel
from cbir.types import FeatureBatch, Floats, Int32s, State

Burst = Literal["none", "intra", "inter", "both"]

__all__ = ["HammingEmbedding"]


class HammingEmbedding(InvertedSpec):
    """HE (Jégou et al. 2008): a feature is projected to `bits` dimensions by orthonormal rows and compared with the
    median of its word, which gives its bits; features of a word match at a Hamming distance h <= `threshold`, and
    count exp(-h^2 / (2 sigma^2)).

    `sigma: 0` counts every match as one. `burst` damps repeated structures (Jégou et al., On the burstiness of visual
    elements, CVPR 2009): a match s of a query's feature counts s sqrt(s / t), where t is what this feature matches in
    the same image (intra), or s / sqrt(t), where t is what it matches in all images (inter), for which all partitions
    are asked twice; both: the one, then the other.
    `geometry` is weak geometric consistency (WGC), inside the index: of what the matches of an image count, only the
    part that agrees on one turn and one change of scale is added up.
    """

    name: Literal["he"] = "he"
    paper: ClassVar[str] = "Jégou et al., Hamming embedding and weak geometric consistency, ECCV 2008"

    fits_sample: ClassVar[bool] = True

    words: PositiveInt = Field(default=20000, description="size of the codebook")
    idf: bool = Field(default=True, description="weight a word by ln(N / n)^2, for n of N images that have it")
    bits: PositiveInt = Field(default=64, description="of a signature; at most D")
    threshold: NonNegativeInt = Field(
        default=24, description="largest Hamming distance of a match; 22 with several assignments"
    )
    sigma: NonNegativeFloat = Field(default=16.0, description="width of the weighting; 0: every match counts one")
    burst: Burst = Field(
        default="none",
        description="damp the matches of one query feature with many features of an image (intra), of all images "
        "(inter), or both",
    )
    geometry: bool = Field(
        default=False,
        description="weak geometric consistency: keep two more bytes of a feature, its angle and scale, and score an "
        "image by matches that agree on them",
    )

    def code_dim(self, dim: int) -> int:
        """The bits."""
        if self.bits > dim:
            raise DataError(f"bits: {self.bits} orthonormal projections of features with D = {dim} do not exist")
        return self.bits

    def kernel(self, dim: int) -> MatchKernel:
        """A table over Hamming distances."""
        distances = np.arange(dim + 1)
        weights = np.exp(-(distances**2) / (2 * self.sigma**2)) if self.sigma else np.ones(dim + 1)
        kernel = ConsistentKernel if self.geometry else BinaryKernel
        return kernel(np.where(distances <= self.threshold, weights, 0.0), burst=self.burst in ("intra", "both"))

    @property
    def damps_matches(self) -> bool:
        """With inter-image burstiness."""
        return self.burst in ("inter", "both")

    def fit(self, vocabulary: Vocabulary, sample: FeatureBatch, seed: int) -> State:
        """`projection` (bits, D), rows of Q of a Gaussian matrix, and `medians` (W, bits) of each word's features."""
        rows = np.asarray(sample.descriptors, np.float32)
        dim = rows.shape[1]
        square = np.random.default_rng(seed).standard_normal((dim, dim))
        projection = np.linalg.qr(square)[0][: self.code_dim(dim)].astype(np.float32)
        product = ReproducibleProduct(projection)
        medians = product(vocabulary.centroids).astype(np.float32)  # of words without features
        words = vocabulary.nearest(rows, 1)[:, 0]
        order = np.argsort(words, kind="stable")
        kinds, firsts = np.unique(words[order], return_index=True)
        for word, own in zip(kinds, np.split(order, firsts[1:]), strict=True):
            medians[word] = np.median(product(rows[own]), axis=0)
        return {"projection": projection, "medians": medians}

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:
        """Projections minus medians, whose signs are the bits."""
        product, medians = ReproducibleProduct(own["projection"]), own["medians"]
        nothing = np.zeros_like(vocabulary.centroids)

        def embed(batch: FeatureBatch, words: Int32s) -> Embedded:
            features = single(batch, words, nothing)
            projected: Floats = product(features.vectors).astype(np.float32)
            return features.with_vectors(projected - medians[features.words])

        return embed
