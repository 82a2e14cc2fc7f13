"""The role of an extractor: decoded images in, features out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

from cbir.images import View
from cbir.spec import Method
from cbir.types import FeatureBatch, Floats, ImageBatch

__all__ = ["Extractor", "ExtractorSpec", "MaskedExtractor"]


class Extractor(Protocol):
    """A working extractor, built once per worker process."""

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Features of every image of the batch, in its order; an image may have none."""
        ...


@runtime_checkable
class MaskedExtractor(Extractor, Protocol):
    """A working extractor that can weigh the places of an image by a mask, rather than drop features."""

    def extract_masked(self, batch: ImageBatch, masks: Sequence[Floats]) -> FeatureBatch:
        """The same by masks (h, w) from 0 to 1, one per image, each stretched over the whole image."""
        ...


class ExtractorSpec(Method):
    """Configuration of an extractor."""

    role: ClassVar[str] = "extractor"
    local: ClassVar[bool] = False
    """Whether an image has many features, with a geometry each, rather than one descriptor."""
    reads_vectors: ClassVar[bool] = False
    """Whether vectors that were made elsewhere take the place of images."""

    @property
    def weighs_places(self) -> bool:
        """Whether what it builds is a `MaskedExtractor`."""
        return False

    @property
    def rows_are_regions(self) -> bool:
        """Whether it makes a row of every region of an image, the first of the whole image."""
        return False

    @property
    def for_queries(self) -> Self:
        """The extractor of queries: the same, unless it proposes regions in indexed images only."""
        return self

    @property
    def view(self) -> View:
        """The size at which images are to be decoded."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """How many images `extract` wants at a time."""
        return 1

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that the extractor needs (weights): field name -> local path, `s3://` URI or hub name."""
        return {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """The working extractor on a torch device ("cpu", "cuda"), with its assets as local files."""
        raise NotImplementedError
