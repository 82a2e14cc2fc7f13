"""What proposers that search in pixels share: their settings, a smaller image, and boxes without near duplicates."""

from abc import ABC, abstractmethod
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field, PositiveInt

from cbir.features.regions.proposer import ProposerSpec, regions_of
from cbir.types import Array, Floats, ImageBatch, Int32s, Pixels, Regions

__all__ = ["SearchProposer", "SearchSpec", "Share", "distinct", "shrunk"]

Share = Annotated[float, Field(gt=0, le=1)]


class SearchSpec(ProposerSpec):
    """Which of the boxes that are found stay, and in how large an image they are sought."""

    min_area: Share = Field(default=0.01, description="area of the smallest box, as a share of the image's")
    iou: Share = Field(default=0.75, description="the largest overlap with a box before it")
    max_boxes: PositiveInt = Field(default=100, description="the most boxes, besides the whole image")
    size: PositiveInt = Field(default=320, description="the longest side in pixels, never enlarged")
    whole: bool = Field(default=True, description="the whole image as first box")


class SearchProposer(ABC):
    """A proposer that looks at one image after the other."""

    def propose(self, batch: ImageBatch) -> Regions:
        """The boxes of every image, in the order of the method."""
        return regions_of([self.boxes(*pair) for pair in zip(batch.images, batch.sizes, strict=True)])

    @abstractmethod
    def boxes(self, image: Pixels, size: Int32s) -> Floats:
        """The boxes (R, 4) of a decoded image, in pixels of an original of this height and width."""


def shrunk(image: Pixels, longest: int) -> Pixels:
    """The image, (H, W) or (H, W, 3), with its longest side at most so many pixels; contiguous."""
    height, width = image.shape[:2]
    ratio = longest / max(height, width)
    if ratio >= 1:
        return np.ascontiguousarray(image)
    shape = max(1, round(width * ratio)), max(1, round(height * ratio))
    return np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_AREA), np.uint8)


def distinct(boxes: Array, iou: float, most: int) -> Array:
    """Non-maximum suppression: the first `most` boxes (R, 4) that overlap no earlier one by more than `iou`.

    The overlap is the area of the intersection by that of the union; the best boxes come first.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept: list[int] = []
    for i, box in enumerate(boxes):
        if len(kept) == most:
            break
        sides = np.minimum(boxes[kept, 2:], box[2:]) - np.maximum(boxes[kept, :2], box[:2])
        shared = np.maximum(sides, 0).prod(axis=1)
        if (shared <= iou * (areas[kept] + areas[i] - shared)).all():
            kept.append(i)
    return boxes[kept]
