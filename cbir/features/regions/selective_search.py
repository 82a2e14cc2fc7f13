"""Selective Search: boxes of the regions into which similar neighbours grow together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cbir.features.regions.proposer import in_original_pixels, with_whole
from cbir.features.regions.search import SearchProposer, SearchSpec, Share, distinct, shrunk
from cbir.types import Array, Floats, Int32s, Pixels

__all__ = ["SelectiveSearch"]

SMALLEST_SIDE = 3
"""Pixels; less is no image to segment."""


class SelectiveSearch(SearchSpec):
    """Selective Search (Uijlings et al. 2013): graph segments of several finenesses and colour spaces, merged step by
    step by the likeness of colour, texture, size and fill; each step gives a box.

    This is the `fast` version. Boxes are ordered as published, by their place in the hierarchy times a random number,
    so that large boxes tend to come first; the numbers are drawn from `seed` for every image anew, and the place is
    that by falling area. Of boxes that overlap by more than `iou` the first stays.
    """

    name: Literal["selective_search"] = "selective_search"
    paper: ClassVar[str] = "Uijlings et al., Selective search for object recognition, IJCV 2013"

    k: PositiveInt = Field(default=150, description="the finest segmentation's threshold; larger for larger segments")
    sigma: PositiveFloat = Field(default=0.8, description="smoothing before the segmentation, in pixels")
    iou: Share = Field(default=0.8, description="the largest overlap with a box before it")
    size: PositiveInt = Field(default=240, description="the longest side in pixels, never enlarged")
    seed: NonNegativeInt = Field(default=0, description="of the order of the boxes")

    def build(self, device: str, assets: Mapping[str, Path]) -> "SelectiveSearchProposer":  # noqa: ARG002 - runs on the CPU
        """A proposer on the CPU, whatever the device."""
        return SelectiveSearchProposer(self)


class SelectiveSearchProposer(SearchProposer):
    """OpenCV's Selective Search, whose boxes are put into an order of our own.

    OpenCV draws its order from the C library's generator, which nothing in Python seeds; the boxes themselves depend on
    the pixels alone.
    """

    def __init__(self, spec: SelectiveSearch) -> None:
        self._spec = spec
        self._search: Any = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()

    def boxes(self, image: Pixels, size: Int32s) -> Floats:
        """The most likely objects first."""
        spec, small = self._spec, shrunk(image, self._spec.size)
        found = self._ordered(self._found(small), small.shape[0] * small.shape[1])
        boxes = in_original_pixels(distinct(found, spec.iou, spec.max_boxes), small.shape, size)
        return with_whole(boxes, size, first=spec.whole)

    def _found(self, image: Pixels) -> Array:
        """Left, top, right, bottom (R, 4) in no order."""
        if min(image.shape[:2]) < SMALLEST_SIDE:
            return np.empty((0, 4), np.int64)
        self._search.setBaseImage(np.ascontiguousarray(image[..., ::-1]))
        self._search.switchToSelectiveSearchFast(self._spec.k, self._spec.k, self._spec.sigma)
        left, top, width, height = np.asarray(self._search.process(), np.int64).reshape(-1, 4).T
        return np.stack([left, top, left + width, top + height], axis=1)

    def _ordered(self, boxes: Array, image_area: int) -> Array:
        """Those that are large enough, by their place in the order of falling area times a random number."""
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        large = np.flatnonzero(areas >= self._spec.min_area * image_area)
        by_area = large[np.lexsort((*boxes[large].T, -areas[large]))]
        numbers = np.random.default_rng(self._spec.seed).random(len(by_area))
        return boxes[by_area[np.argsort(np.arange(1, len(by_area) + 1) * numbers, kind="stable")]]
