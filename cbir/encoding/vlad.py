"""VLAD: the residuals of local features to their visual words, summed to one vector per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.codebook import Codebook
from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.normalise import l2_normalised, signed_power
from cbir.encoding.residuals import Residuals
from cbir.types import Array, FeatureBatch, Float64s, Floats, Int64s, State

__all__ = ["Cells", "Vlad", "VladEncoder", "local_bases", "normalised_vlad"]

BASIS_ROWS = 65536
"""Bounds the residuals of one word that are held at a time."""


class Vlad(EncoderSpec):
    """VLAD (Jégou et al. 2010): V_w = sum of x - c_w over the features x of word w; K rows -> one row (W*D) per image.

    Then SSR, each word's block to unit length (Arandjelović and Zisserman 2013, intra-normalisation), and all to unit
    length. The geometry is dropped; an image without features becomes the zero vector. Residual normalisation and
    local coordinates are those of Delhumeau et al. (2013); several vocabularies, of Jégou and Chum (2012), are for
    `{name: pca, whiten: true}` after it.
    """

    name: Literal["vlad"] = "vlad"
    paper: ClassVar[str] = "Jégou et al., Aggregating local descriptors into a compact image representation, CVPR 2010"
    version: ClassVar[int] = 2

    aggregates: ClassVar[bool] = True

    words: int = Field(default=64, ge=1, description="size of the codebook")
    iterations: int = Field(default=25, ge=1, description="rounds of k-means")
    vocabularies: int = Field(default=1, ge=1, description="codebooks, each from a seed of its own; joined vectors")
    rank_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(1.0,), min_length=1, description="share of a residual to the nearest, second nearest ... word"
    )
    max_distance: float | None = Field(default=None, gt=0, description="features farther from their word are left out")
    residual_norm: bool = Field(default=False, description="every residual to unit length before the sum (RN)")
    local_coordinates: bool = Field(default=False, description="each word's block in the PCA basis of its cell (LCS)")
    ssr: bool = Field(default=True, description="power law of every component, by alpha")
    alpha: float = Field(default=0.5, gt=0, le=1, description="the exponent; 0.5 is signed square rooting")
    intra: bool = Field(default=True, description="L2 normalisation of every word's block")

    @property
    def trained(self) -> bool:
        """The codebooks are."""
        return True

    def output_dim(self, dim: int) -> int:
        """W times D, of every vocabulary."""
        return self.vocabularies * self.words * dim

    def fit(self, sample: FeatureBatch, seed: int) -> "VladEncoder":
        """Train the codebooks; another order of the sample's images may give others. DataError if too few rows."""
        rows = sample.descriptors
        codebooks = [Codebook.train(rows, self.words, self.iterations, seed + m) for m in range(self.vocabularies)]
        return VladEncoder(self, [self._cells(codebook, rows) for codebook in codebooks])

    def restore(self, state: State) -> "VladEncoder":
        """From centroids and bases."""
        centroids = np.split(np.ascontiguousarray(state["centroids"], np.float32), self.vocabularies)
        bases = np.split(state["bases"], self.vocabularies) if self.local_coordinates else [None] * self.vocabularies
        residuals = [self.residuals(Codebook(part)) for part in centroids]
        return VladEncoder(self, [Cells(part, basis) for part, basis in zip(residuals, bases, strict=True)])

    def residuals(self, codebook: Codebook) -> Residuals:
        """How features are summed."""
        farthest = np.inf if self.max_distance is None else self.max_distance
        return Residuals(codebook, self.rank_weights, self.residual_norm, farthest)

    def normalised(self, sums: Float64s) -> Float64s:
        """Residual sums (W, D) of one image as a unit vector (W*D,)."""
        return normalised_vlad(sums, self.alpha if self.ssr else 1.0, self.intra)

    def _cells(self, codebook: Codebook, rows: Array) -> "Cells":
        bases = local_bases(rows, codebook, unit=self.residual_norm) if self.local_coordinates else None
        return Cells(self.residuals(codebook), bases)


@dataclass(frozen=True)
class Cells:
    """Visual words with how features are summed at them, and orthogonal `bases` (W, D, D) of their cells, if any."""

    residuals: Residuals
    bases: Floats | None = None

    def sums(self, rows: Array, words: Int64s) -> Float64s:
        """Residual sums (W, D) of rows (n, D), in the coordinates of the cells."""
        # In single precision, as `residual_sums` stores them, so that both ways to a VLAD agree to the byte.
        sums = self.residuals.sums(rows, words)[0].astype(np.float32).astype(np.float64)
        # The basis of a cell is one for all its residuals, so the sum may be turned instead of them.
        return sums if self.bases is None else np.einsum("wed,wd->we", self.bases, sums)


class VladEncoder:
    """VLAD with trained vocabularies."""

    def __init__(self, spec: Vlad, vocabularies: Sequence[Cells]) -> None:
        self.spec, self.vocabularies = spec, list(vocabularies)

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N, M*W*D) float32, one row per image."""
        words = [cells.residuals.assign(batch.descriptors) for cells in self.vocabularies]
        vectors: Floats = np.empty((len(batch), self.spec.output_dim(batch.descriptors.shape[1])), np.float32)
        for i in range(len(batch)):
            own = batch.rows(i)
            sums = [
                cells.sums(batch.descriptors[own], nearest[own])
                for cells, nearest in zip(self.vocabularies, words, strict=True)
            ]
            parts = [self.spec.normalised(part) for part in sums]
            vectors[i] = parts[0] if len(parts) == 1 else l2_normalised(np.concatenate(parts))
        return FeatureBatch.of_global(batch.image_ids, vectors)

    def state(self) -> State:
        """`centroids` (M*W, D) float32; with local coordinates `bases` (M*W, D, D) float32."""
        found = {"centroids": np.concatenate([part.residuals.codebook.centroids for part in self.vocabularies])}
        bases = [part.bases for part in self.vocabularies if part.bases is not None]
        return found | ({"bases": np.concatenate(bases)} if bases else {})


def normalised_vlad(sums: Float64s, alpha: float, intra: bool) -> Float64s:
    """Residual sums (..., W, D) as unit vectors (..., W*D), in the order of vlfeat: power law, intra, L2."""
    blocks = sums if alpha == 1.0 else signed_power(sums, alpha)
    blocks = l2_normalised(blocks) if intra else blocks
    return l2_normalised(blocks.reshape(*sums.shape[:-2], -1))


def local_bases(rows: Array, codebook: Codebook, *, unit: bool) -> Floats:
    """The principal directions of the residuals in every cell, as rows of (W, D, D) matrices, strongest first.

    A cell with fewer than two of the rows (n, D) keeps its coordinates.
    """
    words = codebook.assign(rows)
    bases = np.repeat(np.eye(rows.shape[1], dtype=np.float32)[None], len(codebook), axis=0)
    for word in np.flatnonzero(np.bincount(words, minlength=len(codebook)) > 1):
        members = np.flatnonzero(words == word)[:BASIS_ROWS]
        residuals = rows[members].astype(np.float64) - codebook.centroids[word]
        bases[word] = _directions(l2_normalised(residuals) if unit else residuals)
    return bases


def _directions(residuals: Float64s) -> Float64s:
    """Principal directions (D, D) of residuals (n, D); each one's largest component is positive."""
    covariance = np.atleast_2d(np.cov(residuals, rowvar=False))
    directions = np.linalg.eigh(covariance)[1].T[::-1]
    strongest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], 1)
    return directions * np.where(strongest < 0, -1.0, 1.0)
