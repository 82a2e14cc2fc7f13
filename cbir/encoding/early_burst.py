"""Early burst detection: features of one image that look alike become one, before they are counted."""

from dataclasses import replace
from typing import ClassVar, Literal

import numba
import numpy as np
import numpy.typing as npt
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.normalise import l2_normalised
from cbir.types import Array, FeatureBatch, Floats, Int64s, State

__all__ = ["EarlyBurst", "EarlyBurstEncoder"]


class EarlyBurst(EncoderSpec):
    """Early burst detection (Shi et al. 2015): near-duplicate descriptors of an image, as of windows or leaves, are
    clustered and pooled to their mean, so that a repeated pattern counts once.

    A feature joins the strongest feature before it whose cosine with it is at least `similarity`, or begins a cluster
    of its own. A cluster has the place of its strongest feature and the length of that one's descriptor; the order of
    strength stays.
    """

    name: Literal["early_burst"] = "early_burst"
    paper: ClassVar[str] = "Shi et al., Early burst detection for memory-efficient image retrieval, CVPR 2015"

    drops_rows: ClassVar[bool] = True

    similarity: float = Field(default=0.9, gt=0, le=1, description="cosine of features that are taken for one")

    def fit(self, sample: FeatureBatch, seed: int) -> "EarlyBurstEncoder":  # noqa: ARG002 - nothing is trained
        """Nothing is trained."""
        return EarlyBurstEncoder(self)

    def restore(self, state: State) -> "EarlyBurstEncoder":  # noqa: ARG002 - nothing is trained
        """Nothing was trained."""
        return EarlyBurstEncoder(self)


class EarlyBurstEncoder:
    """Pools near-duplicates image by image."""

    def __init__(self, spec: EarlyBurst) -> None:
        self._spec = spec

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (K', D) float32 with K' <= K."""
        rows: Floats = np.ascontiguousarray(batch.descriptors, np.float32)
        units = l2_normalised(rows)
        clusters = _clusters(units, batch.offsets, self._spec.similarity)
        first = clusters == np.arange(len(clusters))
        kept = batch.take_rows(first)
        return replace(kept, descriptors=_pooled(rows, units, clusters)[first])

    def state(self) -> State:
        """Nothing."""
        return {}


@numba.njit(cache=True, nogil=True)
def _clusters(units: npt.NDArray[np.float64], offsets: Int64s, similarity: float) -> Int64s:
    """The row that each row joins: itself, or the first row of its image that began a cluster and is like it."""
    clusters = np.arange(len(units))
    for image in range(len(offsets) - 1):
        for row in range(offsets[image], offsets[image + 1]):
            for other in range(offsets[image], row):
                if clusters[other] != other:
                    continue
                cosine = 0.0
                for d in range(units.shape[1]):
                    cosine += units[row, d] * units[other, d]
                if cosine >= similarity:
                    clusters[row] = other
                    break
    return clusters


def _pooled(rows: Floats, units: npt.NDArray[np.float64], clusters: Int64s) -> Array:
    """Mean directions of the clusters, at the length of their first rows; clusters of one keep their bytes."""
    sums = np.zeros(units.shape)
    np.add.at(sums, clusters, units)
    lengths = np.sqrt(np.add.reduce(rows.astype(np.float64) ** 2, axis=1, keepdims=True))
    pooled = (l2_normalised(sums) * lengths).astype(np.float32)
    sizes = np.bincount(clusters, minlength=len(clusters))
    return np.where((sizes > 1)[:, None], pooled, rows)
