"""Bag of visual words as a dense histogram, for vocabularies that are small enough for one."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.codebook import Codebook
from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.normalise import l2_normalised
from cbir.encoding.residuals import NearestWords
from cbir.types import Array, FeatureBatch, Float64s, Floats, Int64s, State

__all__ = ["Bow", "BowEncoder", "soft_weights"]

RELATIVE_VARIANCE = 6250 / 512**2
"""Philbin's sigma² for SIFT, of length 512, as a share of the squared length."""


class Bow(EncoderSpec):
    """Bag of visual words (Sivic and Zisserman 2003): h_w = number of features of word w; K rows -> one row (W).

    With `neighbours` > 1 soft assignment (Philbin et al. 2008): a feature gives its nearest words exp(-d² / 2 sigma²)
    each, together 1. With `idf` every word counts ln(N / N_w), of the sample's N images that N_w of them have. An image
    without features becomes the zero vector. Large vocabularies belong into an inverted index.
    """

    name: Literal["bow"] = "bow"
    paper: ClassVar[str] = "Sivic and Zisserman, Video Google, ICCV 2003"

    aggregates: ClassVar[bool] = True

    words: int = Field(default=256, ge=1, description="size of the codebook")
    iterations: int = Field(default=25, ge=1, description="rounds of k-means")
    neighbours: int = Field(default=1, ge=1, description="words that share a feature; 1 is hard assignment")
    sigma: float | None = Field(
        default=None, gt=0, description="range of soft assignment; else Philbin's, scaled to the sample's lengths"
    )
    idf: bool = Field(default=False, description="weight words by their rarity in the sample")
    norm: Literal["l2", "l1"] = Field(default="l2", description="which norm of the histogram becomes 1")

    @property
    def trained(self) -> bool:
        """The codebook is."""
        return True

    def output_dim(self, dim: int) -> int:  # noqa: ARG002 - that of its settings
        """One number per word."""
        return self.words

    def fit(self, sample: FeatureBatch, seed: int) -> "BowEncoder":
        """Train the codebook, range and weights; DataError if there are too few rows."""
        rows = sample.descriptors
        codebook = Codebook.train(rows, self.words, self.iterations, seed)
        wide = rows.astype(np.float64)
        variance = RELATIVE_VARIANCE * np.mean(np.add.reduce(wide * wide, axis=1))
        sigma = np.sqrt(variance) if self.sigma is None else self.sigma
        weights = np.ones(self.words)
        if self.idf:
            found = BowEncoder(self, codebook, np.array([sigma]), weights).histograms(sample) > 0
            weights = np.log(len(sample) / np.maximum(np.count_nonzero(found, axis=0), 1))
        return BowEncoder(self, codebook, np.array([sigma]), weights)

    def restore(self, state: State) -> "BowEncoder":
        """From centroids, range and weights."""
        codebook = Codebook(np.ascontiguousarray(state["centroids"], np.float32))
        return BowEncoder(self, codebook, state["sigma"], state["weights"])


class BowEncoder:
    """Bag of words with a trained codebook."""

    def __init__(self, spec: Bow, codebook: Codebook, sigma: Float64s, weights: Float64s) -> None:
        self.spec, self.codebook = spec, codebook
        self._sigma, self._weights = sigma, weights
        self._nearest = NearestWords(codebook, spec.neighbours)

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, W) float32, one row per image."""
        weighted = self.histograms(batch) * self._weights
        if self.spec.norm == "l2":
            rows = l2_normalised(weighted)
        else:
            rows = weighted / np.maximum(np.add.reduce(np.abs(weighted), axis=1, keepdims=True), 1e-12)
        return FeatureBatch.of_global(batch.image_ids, rows.astype(np.float32))

    def histograms(self, batch: FeatureBatch) -> Float64s:
        """How much of its features every image has in every word, (N, W)."""
        words = self._nearest(batch.descriptors)
        counts = np.zeros((len(batch), len(self.codebook)))
        for i in range(len(batch)):
            own = batch.rows(i)
            shares = soft_weights(batch.descriptors[own], words[own], self.codebook.centroids, float(self._sigma[0]))
            counts[i] = np.bincount(words[own].ravel(), weights=shares.ravel(), minlength=len(self.codebook))
        return counts

    def state(self) -> State:
        """`centroids` (W, D) float32, `sigma` (1,) and `weights` (W,) float64."""
        return {"centroids": self.codebook.centroids, "sigma": self._sigma, "weights": self._weights}


def soft_weights(rows: Array, words: Int64s, centroids: Floats, sigma: float) -> Float64s:
    """The shares (n, r) of rows (n, D) in their words (n, r): softmax of -d² / 2 sigma²."""
    if words.shape[1] == 1:
        return np.ones(words.shape)
    squares = np.empty(words.shape)
    for rank in range(words.shape[1]):
        differences = rows.astype(np.float64) - centroids[words[:, rank]]
        squares[:, rank] = np.add.reduce(differences * differences, axis=1)
    shares: Float64s = np.exp((squares.min(axis=1, initial=np.inf, keepdims=True) - squares) / (2 * sigma * sigma))
    return shares / np.add.reduce(shares, axis=1, keepdims=True)
