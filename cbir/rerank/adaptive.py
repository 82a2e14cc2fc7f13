"""Query-adaptive late fusion: for each query, the channel whose scores stand out of its background counts more."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from cbir.errors import ConfigError
from cbir.rerank.lists import Doubles, RankedList, fuse_lists
from cbir.rerank.reranker import FusionSpec
from cbir.spec import nearest
from cbir.types import Hits

__all__ = ["Adaptive", "AdaptiveFusion", "ScoreCurve", "background"]

LEAST_FACTOR = 1e-3


class Adaptive(FusionSpec):
    """Query-adaptive late fusion (Zheng et al., CVPR 2015): weights from the shape of each channel's score curve.

    The sorted scores of a channel are mapped to 0..1. The area under this curve is small if a few images stand out of
    many that are all alike, and large if the scores fall slowly, as they do for a descriptor that does not know the
    query. A channel's weight is 1 / area over the sum of all. An image that a channel did not return counts there as
    the last of its list, or as 0 where the channel had no more; a list of equal scores says nothing.

    `sum` adds the weighted scores. It is the same as adding, for each channel, the score above the last one in units of
    its mean over all images, which if these fall off exponentially is how improbable the score is for an irrelevant
    image. `product` is the paper's rule, the product of scores to the power of the weights; it follows the channel of
    the larger weight nearly alone.

    The area is known only from lists that reach far into the irrelevant images. So that shorter ones do as well, it is
    taken from `backgrounds`: how far the score of any image lies above the lowest in the mean, a constant of a channel
    that is measured on the sample when the index is built; from the query's own list where there is none.
    """

    needs_backgrounds: ClassVar[bool] = True

    name: Literal["adaptive"] = "adaptive"
    paper: ClassVar[str] = "Zheng et al., Query-adaptive late fusion for image search and person re-id, CVPR 2015"

    rule: Literal["sum", "product"] = Field(default="sum", description="how weighted scores are joined")
    backgrounds: dict[str, PositiveFloat] = Field(
        default={},
        description="mean excess of scores, per channel; measured when the index is built if a channel is not named",
    )

    @property
    def channels(self) -> Collection[str]:
        """Those with a background of their own."""
        return self.backgrounds.keys()

    def build(self, backgrounds: Mapping[str, float] | None = None) -> "AdaptiveFusion":
        """The working fusion; the configuration's own backgrounds go before those that were measured."""
        measured = {name: value for name, value in (backgrounds or {}).items() if value > 0}
        return AdaptiveFusion(self, measured | self.backgrounds)


@dataclass(frozen=True)
class ScoreCurve:
    """One channel's scores of one query for all images that were found, mapped to 0..1, and the area under them when
    they are sorted."""

    scores: Doubles
    area: float

    @classmethod
    def of(cls, found: RankedList, number: int, mean_excess: float | None = None) -> "ScoreCurve | None":
        """The curve over `number` images, None if all scores are equal; `mean_excess` in place of its own, if given."""
        if not len(found.scores):
            return None
        last = float(found.scores[-1])
        own = found.spread(found.scores, number, min(last, 0.0) if found.exhausted else last)
        low, spread = own.min(), np.ptp(own)
        if spread <= 0:
            return None
        normalised = (own - low) / spread
        return cls(normalised, float(normalised.mean()) if mean_excess is None else mean_excess / float(spread))


def background(hits: Hits, num_images: int) -> float:
    """How far the score of any image lies above the lowest one in the mean, over queries and images.

    The lists must be whole: an image that is not in one has the score 0.
    """
    held = hits.image_ids >= 0
    scores = np.where(held, hits.scores, np.nan).astype(np.float64)
    lowest = np.nanmin(scores, axis=1, keepdims=True, initial=np.inf)
    lowest = np.where(held.sum(axis=1, keepdims=True) < num_images, np.minimum(lowest, 0.0), lowest)
    return float(np.nansum(scores - lowest) / (num_images * len(hits)))


class AdaptiveFusion:
    """Weighted sum or product of normalised scores, with weights of this query."""

    def __init__(self, spec: Adaptive, backgrounds: Mapping[str, float]) -> None:
        self._spec, self._backgrounds = spec, backgrounds

    def fuse(self, hits: Mapping[str, Hits], depth: int) -> Hits:
        """The best `depth` of all images in any list; ConfigError for a background without a channel."""
        for name in self._spec.backgrounds:
            if name not in hits:
                raise ConfigError(f"search.fuse.backgrounds.{name}: there is no such channel{nearest(name, hits)}")
        return fuse_lists(hits, depth, self._combine)

    def _combine(self, lists: Mapping[str, RankedList], number: int) -> Doubles:
        curves = [ScoreCurve.of(found, number, self._backgrounds.get(name)) for name, found in lists.items()]
        telling = [curve for curve in curves if curve is not None]
        weights = np.array([1 / curve.area for curve in telling])
        weights /= weights.sum()
        total = np.zeros(number)
        for weight, curve in zip(weights, telling, strict=True):
            if self._spec.rule == "sum":
                total += weight * curve.scores
            else:
                # One channel's last image must not become the last of all, whatever the others say.
                total += weight * np.log(np.maximum(curve.scores, LEAST_FACTOR))
        return total if self._spec.rule == "sum" else np.exp(total)
