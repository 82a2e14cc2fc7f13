"""Late fusion: the rankings of several channels become one by their scores."""

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from cbir.errors import ConfigError
from cbir.rerank.lists import Doubles, RankedList, fuse_lists
from cbir.rerank.reranker import FusionSpec
from cbir.spec import nearest
from cbir.types import Hits

__all__ = ["Late", "LateFusion"]


class Late(FusionSpec):
    """Score fusion by a weighted sum (Kittler et al. 1998) of scores normalised per query and channel.

    `minmax` maps a list to 0..1, `zscore` to mean 0 and deviation 1, `none` leaves it; a list of equal scores becomes
    0. An image that a channel did not return counts there as the last of that channel's list.
    """

    name: Literal["late"] = "late"
    paper: ClassVar[str] = "Kittler et al., On combining classifiers, IEEE TPAMI 1998"

    weights: dict[str, PositiveFloat] = Field(default={}, description="per channel; 1 for a channel that is not named")
    norm: Literal["none", "minmax", "zscore"] = Field(default="minmax", description="what makes scores comparable")

    @property
    def channels(self) -> Collection[str]:
        """Those with a weight of their own."""
        return self.weights.keys()

    def build(self, backgrounds: Mapping[str, float] | None = None) -> "LateFusion":  # noqa: ARG002 - needs none
        """The working fusion."""
        return LateFusion(self)


class LateFusion:
    """Weighted sum of normalised scores."""

    def __init__(self, spec: Late) -> None:
        self._spec = spec

    def fuse(self, hits: Mapping[str, Hits], depth: int) -> Hits:
        """The best `depth` of all images in any list; ConfigError for a weight without a channel."""
        for name in self._spec.weights:
            if name not in hits:
                raise ConfigError(f"search.fuse.weights.{name}: there is no such channel{nearest(name, hits)}")
        return fuse_lists(hits, depth, self._sum)

    def _sum(self, lists: Mapping[str, RankedList], number: int) -> Doubles:
        total = np.zeros(number)
        for name, found in lists.items():
            if len(found.scores):
                normalised = _normalised(found.scores, self._spec.norm)
                total += self._spec.weights.get(name, 1.0) * found.spread(normalised, number, normalised.min())
        return total


def _normalised(scores: Doubles, norm: str) -> Doubles:
    """At least one score, normalised."""
    if norm == "none":
        return scores
    low, spread = (scores.min(), np.ptp(scores)) if norm == "minmax" else (scores.mean(), scores.std())
    return (scores - low) / spread if spread > 0 else np.zeros_like(scores)
