"""What proposers that search in pixels share: a smaller image, and boxes without near duplicates."""

import cv2
import numpy as np

from cbir.types import Array, Pixels

__all__ = ["distinct", "shrunk"]


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
