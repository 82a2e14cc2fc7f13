"""Late fusion: the rankings of several channels become one by their scores."""

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat

from cbir.errors import ConfigError
from cbir.rerank.reranker import FusionSpec
from cbir.spec import nearest
from cbir.types import Floats, Hits, Int64s

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

    def build(self) -> "LateFusion":
        """The working fusion."""
        return LateFusion(self)


class LateFusion:
    """Weighted sum of normalised scores."""

    def __init__(self, spec: Late) -> None:
        self._spec = spec

    def fuse(self, hits: Mapping[str, Hits], depth: int) -> Hits:
        """The best `depth` of all images in any list; ConfigError for a weight without a channel."""
        self._check(hits)
        channels = [(self._spec.weights.get(name, 1.0), hits[name]) for name in sorted(hits)]
        rows = [self._fuse_query(channels, query, depth) for query in range(len(channels[0][1]))]
        if not rows:
            return Hits(np.empty((0, depth), np.int64), np.empty((0, depth), np.float32))
        return Hits(np.concatenate([row.image_ids for row in rows]), np.concatenate([row.scores for row in rows]))

    def _check(self, hits: Mapping[str, Hits]) -> None:
        for name in self._spec.weights:
            if name not in hits:
                raise ConfigError(f"search.fuse.weights.{name}: there is no such channel{nearest(name, hits)}")
        if len({len(part) for part in hits.values()}) != 1:
            raise ValueError("fuse needs hits of one or more channels, for the same queries in each")

    def _fuse_query(self, channels: list[tuple[float, Hits]], query: int, depth: int) -> Hits:
        lists = [_valid(part, query) for _, part in channels]
        found = np.unique(np.concatenate([ids for ids, _ in lists]))
        total = np.zeros(len(found))
        for (weight, _), (ids, scores) in zip(channels, lists, strict=True):
            if len(ids):
                normalised = _normalised(scores, self._spec.norm)
                own = np.full(len(found), normalised.min())
                own[np.searchsorted(found, ids)] = normalised
                total += weight * own
        return Hits.ranked(found[None], total[None].astype(np.float32), depth)


def _valid(hits: Hits, query: int) -> tuple[Int64s, Floats]:
    """One query's ids and scores without the padding."""
    held = hits.image_ids[query] >= 0
    return hits.image_ids[query, held], hits.scores[query, held]


def _normalised(scores: Floats, norm: str) -> npt.NDArray[np.float64]:
    """At least one score, normalised in double precision."""
    values = scores.astype(np.float64)
    if norm == "none":
        return values
    low, spread = (values.min(), np.ptp(values)) if norm == "minmax" else (values.mean(), values.std())
    return (values - low) / spread if spread > 0 else np.zeros_like(values)
