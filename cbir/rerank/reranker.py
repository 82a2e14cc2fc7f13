"""The roles that come after the index: fusion of channels and re-ranking of hits."""

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal, Protocol

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

    def query_signatures(self, channel: str) -> FeatureBatch:
        """The queries' local features as the channel's inverted file sees them: `words`, packed binary codes (K, B)
        uint8 and geometry. A feature with several words has a row for each of them, with the same geometry."""
        ...

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """The same of these stored images, in this order; an image without signatures has no rows."""
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
    needs_backgrounds: ClassVar[bool] = False
    """Whether the scores of irrelevant images are to be measured in every channel when an index is built."""

    @property
    def channels(self) -> Collection[str]:
        """The channels that it names; each must exist."""
        return ()

    def build(self, backgrounds: Mapping[str, float] | None = None) -> Fusion:
        """The working fusion; `backgrounds` by channel, if it needs them and they were measured."""
        raise NotImplementedError


class RerankerSpec(Method):
    """Configuration of a reranker."""

    role: ClassVar[str] = "reranker"

    channel: str | None = None
    """The channel whose stored features or signatures it reads, if any."""

    @property
    def reads(self) -> Literal["features", "signatures"] | None:
        """What it reads of its channel: raw features (`keep_features: true` is needed there), or the signatures of an
        inverted file."""
        return "features" if self.channel is not None else None

    def build(self) -> Reranker:
        """The working reranker."""
        raise NotImplementedError
