"""The role of an extractor: decoded images in, features out."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from cbir.images import View
from cbir.spec import Method
from cbir.types import FeatureBatch, ImageBatch

__all__ = ["Extractor", "ExtractorSpec"]


class Extractor(Protocol):
    """A working extractor, built once per worker process."""

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Features of every image of the batch, in its order; an image may have none."""
        ...


class ExtractorSpec(Method):
    """Configuration of an extractor."""

    role: ClassVar[str] = "extractor"
    local: ClassVar[bool] = False
    """Whether an image has many features, with a geometry each, rather than one descriptor."""

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
