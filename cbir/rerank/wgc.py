"""Weak geometric consistency: do the matches agree on one rotation and on one change of scale?"""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat, PositiveInt

from cbir.rerank.matches import Matches, MatchingSpec
from cbir.rerank.reranker import SearchContext
from cbir.rerank.shortlist import rerank_short_lists
from cbir.types import FeatureBatch, Hits, Int64s

__all__ = ["Wgc", "WgcReranker"]


class Wgc(MatchingSpec):
    """Weak geometric consistency (Jégou et al. 2008): histograms of the differences of angle and of log scale between
    matched features, each smoothed over three bins; an image's score is the smaller of their peaks.

    Cheaper than a transform, and blind to positions. The integer part of a score is the number of votes, 0 for an image
    that is not verified.
    """

    name: Literal["wgc"] = "wgc"
    paper: ClassVar[str] = (
        "Jégou et al., Hamming embedding and weak geometric consistency for large scale image search, ECCV 2008"
    )

    angle_bins: int = Field(default=64, ge=3, description="over a full turn")
    scale_bins: int = Field(default=32, ge=3, description="over `octaves`")
    octaves: PositiveFloat = Field(default=8.0, description="range of scale changes, half of it reductions")
    min_votes: PositiveInt = Field(default=10, description="votes of a verified image")

    def build(self) -> "WgcReranker":
        """The working reranker."""
        return WgcReranker(self)


class WgcReranker:
    """Votes for all pairs of a query at once."""

    def __init__(self, spec: Wgc) -> None:
        self._spec = spec

    def rerank(self, hits: Hits, context: SearchContext) -> Hits:
        """The same images, verified ones first; images below `top` follow in their order."""
        return rerank_short_lists(self._spec, self._judge, hits, context)

    def _judge(self, query: FeatureBatch, database: FeatureBatch, matches: Matches) -> Int64s:
        turns, scales = self.histograms(query, database, matches)
        votes = np.minimum(turns.max(1), scales.max(1))
        return np.where(votes >= self._spec.min_votes, votes, 0)

    def histograms(self, query: FeatureBatch, database: FeatureBatch, matches: Matches) -> tuple[Int64s, Int64s]:
        """Smoothed votes for every turn (N, angle_bins) and change of scale (N, scale_bins) of N images."""
        spec = self._spec
        left, right = query.geometry[matches.query], database.geometry[matches.database]
        images = np.repeat(np.arange(len(matches)), np.diff(matches.offsets))
        # Half a bin is added, so that the most frequent difference, none, lies in the middle of a bin.
        turn = np.floor((right[:, 3] - left[:, 3]) / 360 * spec.angle_bins + 0.5).astype(np.int64) % spec.angle_bins
        octave = np.log2(right[:, 2]) - np.log2(left[:, 2])
        scale = np.floor((octave / spec.octaves + 0.5) * spec.scale_bins + 0.5).astype(np.int64)
        kept = (scale >= 0) & (scale < spec.scale_bins)
        turns = _votes(images[kept], turn[kept], len(matches), spec.angle_bins)
        scales = _votes(images[kept], scale[kept], len(matches), spec.scale_bins)
        return _smoothed(np.pad(turns, ((0, 0), (1, 1)), mode="wrap")), _smoothed(np.pad(scales, ((0, 0), (1, 1))))


def _votes(images: npt.NDArray[np.intp], bins: Int64s, num_images: int, num_bins: int) -> Int64s:
    return np.bincount(images * num_bins + bins, minlength=num_images * num_bins).reshape(num_images, num_bins)


def _smoothed(votes: Int64s) -> Int64s:
    """Sums of three neighbours (N, bins + 2) -> (N, bins)."""
    sums: Int64s = votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:]
    return sums
