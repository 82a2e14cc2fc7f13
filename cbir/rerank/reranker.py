"""The roles that come after the index: fusion of channels and re-ranking of hits."""

from collections.abc import Collection, Mapping
from typing import ClassVar, Protocol

from cbir.spec import Method
from cbir.types import FeatureBatch, Hits, Int64s

__all__ = ["Fusion", "FusionSpec", "Reranker", "RerankerSpec", "SearchContext"]


class SearchContext(Protocol):
    """What a reranker may ask about the queries and the published version; features are those of the extractor."""

    def query_features(self, channel: str) -> FeatureBatch:
        """The raw features of the Q queries."""
        ...

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """The raw features of these images, in this order; an image without stored features has no rows."""
        ...


class Fusion(Protocol):
    """Joins the hits of several channels."""

    def fuse(self, hits: Mapping[str, Hits], depth: int) -> Hits:
        """One ranking (Q, depth) from the rankings by channel name."""
        ...


class Reranker(Protocol):
    """Re-orders hits; the result is a permutation of its input."""

    def rerank(self, hits: Hits, context: SearchContext) -> Hits:
        """The same images in a better order."""
        ...


class FusionSpec(Method):
    """Configuration of a fusion."""

    role: ClassVar[str] = "fusion"

    @property
    def channels(self) -> Collection[str]:
        """The channels that it names; each must exist."""
        return ()

    def build(self) -> Fusion:
        """The working fusion."""
        raise NotImplementedError


class RerankerSpec(Method):
    """Configuration of a reranker."""

    role: ClassVar[str] = "reranker"

    channel: str | None = None
    """The channel whose stored features it reads (`keep_features: true` is needed there), if any."""

    def build(self) -> Reranker:
        """The working reranker."""
        raise NotImplementedError
