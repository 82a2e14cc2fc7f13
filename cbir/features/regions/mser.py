"""MSER boxes: regions that stay the same while a threshold on brightness moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

import cv2
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cbir.features.regions.proposer import in_original_pixels, with_whole
from cbir.features.regions.search import SearchProposer, SearchSpec, Share, distinct, shrunk
from cbir.types import Array, Floats, Int32s, Pixels

__all__ = ["Mser"]

SMALLEST_SIDE = 3
"""Pixels; OpenCV takes no smaller images."""

NO_DIVERSITY = 0.0
"""OpenCV 5 drops isolated objects for any other value; boxes that hardly differ are removed here by their overlap."""


class Mser(SearchSpec):
    """Boxes of maximally stable extremal regions (Matas et al. 2002), bright and dark, the largest first.

    They are sought in the grey image of at most `size` pixels. Of boxes that overlap by more than `iou` (area of the
    intersection by that of the union) only the largest stays.
    """

    name: Literal["mser"] = "mser"
    paper: ClassVar[str] = "Matas et al., Robust wide baseline stereo from maximally stable extremal regions, BMVC 2002"

    delta: PositiveInt = Field(default=5, description="grey levels over which a region has to be stable")
    max_variation: PositiveFloat = Field(default=0.25, description="the largest relative change of area over delta")
    max_area: Share = Field(default=0.5, description="area of the largest region, as a share of the image's")
    iou: Share = Field(default=0.7, description="the largest overlap with a box before it")
    max_boxes: PositiveInt = Field(default=20, description="the most boxes, besides the whole image")
    size: PositiveInt = Field(default=480, description="the longest side in pixels, never enlarged")

    @model_validator(mode="after")
    def _areas_are_a_range(self) -> Self:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area: {self.min_area:g} is more than max_area: {self.max_area:g}; set less")
        return self

    def build(self, device: str, assets: Mapping[str, Path]) -> "MserProposer":  # noqa: ARG002 - runs on the CPU
        """A proposer on the CPU, whatever the device."""
        return MserProposer(self)


class MserProposer(SearchProposer):
    """OpenCV's MSER, its boxes in an order that only the pixels determine."""

    def __init__(self, spec: Mser) -> None:
        self._spec = spec

    def boxes(self, image: Pixels, size: Int32s) -> Floats:
        """By falling area."""
        spec = self._spec
        grey = shrunk(np.asarray(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), np.uint8), spec.size)
        boxes = _largest_first(in_original_pixels(self._detected(grey), grey.shape, size))
        return with_whole(distinct(boxes, spec.iou, spec.max_boxes), size, first=spec.whole)

    def _detected(self, grey: Pixels) -> Array:
        if min(grey.shape) < SMALLEST_SIDE:
            return np.empty((0, 4))
        least, most = (max(1, round(share * grey.size)) for share in (self._spec.min_area, self._spec.max_area))
        mser = cv2.MSER.create(self._spec.delta, least, most, self._spec.max_variation, NO_DIVERSITY)
        _, found = mser.detectRegions(grey)
        left, top, width, height = np.asarray(found, np.int64).reshape(-1, 4).T
        return np.stack([left, top, left + width, top + height], axis=1)


def _largest_first(boxes: Array) -> Array:
    """Boxes (R, 4) by falling area, ties by their edges."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return boxes[np.lexsort((*boxes.T, -areas))]
