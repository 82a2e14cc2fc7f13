"""Descriptors that were made elsewhere: vectors from Parquet files take the place of images."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from cbir.errors import DataError
from cbir.features.extractor import ExtractorSpec
from cbir.images import View
from cbir.types import FeatureBatch, ImageBatch

__all__ = ["Vectors", "VectorsExtractor"]


class Vectors(ExtractorSpec):
    """One vector per image, read from Parquet by `input: {format: vectors}`; nothing is decoded or extracted.

    Lists of numbers are brought to `dtype`; binary holds numbers of this type, little-endian. A vector that is null,
    of another length or not finite is quarantined. Queries are vectors too.
    """

    name: Literal["vectors"] = "vectors"
    paper: ClassVar[str] = "none: it reads what any other method made"

    reads_vectors: ClassVar[bool] = True

    dim: PositiveInt = Field(examples=[128], description="D, the numbers of a vector")
    dtype: Literal["float16", "float32", "uint8"] = Field(default="float16", description="how the numbers are stored")

    @property
    def view(self) -> View:
        """No picture is ever looked at."""
        return View(size=1)

    def build(self, device: str, assets: Mapping[str, Path]) -> "VectorsExtractor":  # noqa: ARG002 - there is no work
        """What refuses pictures."""
        return VectorsExtractor(self)


class VectorsExtractor:
    """Stands where pictures would be described."""

    def __init__(self, spec: Vectors) -> None:
        self._spec = spec

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """No rows (0, D) of no images; DataError for a picture, of which no vector is known."""
        if len(batch):
            raise DataError(
                "the extractor vectors cannot describe pictures: its vectors were made elsewhere; ask with a vector"
            )
        return FeatureBatch.of_global(batch.image_ids, np.empty((0, self._spec.dim), self._spec.dtype))
