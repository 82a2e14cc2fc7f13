"""Hierarchical VLAD: residuals to the words of a second, finer codebook in every cell of the first."""

from typing import ClassVar, Literal

import numba
import numpy as np
from pydantic import Field

from cbir.encoding.codebook import Codebook
from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.residuals import residual_sums
from cbir.encoding.vlad import normalised_vlad
from cbir.types import Array, FeatureBatch, Floats, Int64s, State

__all__ = ["HierarchicalVlad", "HierarchicalVladEncoder"]


class HierarchicalVlad(EncoderSpec):
    """Hierarchical VLAD (Eggert et al. 2014): K rows -> one row (W * children * D) per image.

    A feature goes to its nearest word, then to the nearest of this word's children, whose sum its residual enters.
    The normalisation is that of `vlad`, with one block per child; one child per word, the word itself, is `vlad`.
    """

    name: Literal["hvlad"] = "hvlad"
    paper: ClassVar[str] = "Eggert, Romberg and Lienhart, Improving VLAD: hierarchical coding, ICIP 2014"

    aggregates: ClassVar[bool] = True

    words: int = Field(default=16, ge=1, description="size of the first codebook")
    children: int = Field(default=4, ge=1, description="size of the second codebook of every word")
    iterations: int = Field(default=25, ge=1, description="rounds of k-means")
    alpha: float = Field(default=0.5, gt=0, le=1, description="power law of every component; 0.5 is SSR, 1 is none")
    intra: bool = Field(default=True, description="L2 normalisation of every child's block")

    @property
    def trained(self) -> bool:
        """The codebooks are."""
        return True

    def output_dim(self, dim: int) -> int:
        """W times children times D."""
        return self.words * self.children * dim

    def fit(self, sample: FeatureBatch, seed: int) -> "HierarchicalVladEncoder":
        """Train all codebooks; DataError if there are too few rows. A cell of few rows has copies of its word."""
        rows = sample.descriptors
        codebook = Codebook.train(rows, self.words, self.iterations, seed)
        words = codebook.assign(rows)
        leaves = [self._leaves(codebook.centroids[w], rows[words == w], seed + w) for w in range(self.words)]
        return HierarchicalVladEncoder(self, codebook, np.stack(leaves))

    def _leaves(self, word: Floats, rows: Array, seed: int) -> Floats:
        if self.children == 1 or len(rows) < self.children:
            return np.repeat(word[None], self.children, axis=0)
        return Codebook.train(rows, self.children, self.iterations, seed).centroids

    def restore(self, state: State) -> "HierarchicalVladEncoder":
        """From centroids and leaves."""
        codebook = Codebook(np.ascontiguousarray(state["centroids"], np.float32))
        return HierarchicalVladEncoder(self, codebook, np.ascontiguousarray(state["leaves"], np.float32))


class HierarchicalVladEncoder:
    """Hierarchical VLAD with trained codebooks."""

    def __init__(self, spec: HierarchicalVlad, codebook: Codebook, leaves: Floats) -> None:
        self.spec, self.codebook, self.leaves = spec, codebook, leaves

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, W*children*D) float32, one row per image."""
        children = self.assign(batch.descriptors)
        centroids = self.leaves.reshape(-1, self.leaves.shape[2])
        vectors: Floats = np.empty((len(batch), centroids.size), np.float32)
        for i in range(len(batch)):
            own = batch.rows(i)
            sums = residual_sums(batch.descriptors[own], children[own], centroids)
            vectors[i] = normalised_vlad(sums, self.spec.alpha, self.spec.intra)
        return FeatureBatch.of_global(batch.image_ids, vectors)

    def assign(self, rows: Array) -> Int64s:
        """Word * children + child of every row, (n, D) -> (n,)."""
        words = self.codebook.assign(rows)
        children = np.empty(len(rows), np.int64)
        _nearest_children(np.require(rows, np.float32, ["C", "W"]), words, self.leaves, children)
        return children

    def state(self) -> State:
        """`centroids` (W, D) and `leaves` (W, children, D) float32."""
        return {"centroids": self.codebook.centroids, "leaves": self.leaves}


@numba.njit(cache=True, nogil=True)
def _nearest_children(rows: Floats, words: Int64s, leaves: Floats, children: Int64s) -> None:
    for i in range(len(rows)):
        nearest = np.inf
        children[i] = words[i] * leaves.shape[1]
        for child in range(leaves.shape[1]):
            squared = 0.0
            for d in range(rows.shape[1]):
                difference = np.float64(rows[i, d]) - np.float64(leaves[words[i], child, d])
                squared += difference * difference
            if squared < nearest:
                nearest = squared
                children[i] = words[i] * leaves.shape[1] + child
