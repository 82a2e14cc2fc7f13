"""Maximally stable extremal regions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numba
import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import grey
from cbir.types import Array, Floats, Int32s, Int64s, Pixels

__all__ = ["Mser", "MserDetector"]


class Mser(DetectorSpec):
    """MSER (Matas et al. 2002): connected regions, brighter or darker than all around them, of stable extent.

    A region is stable where its area changes least over `delta` grey levels, by at most `max_variation` of itself. Of
    nested regions whose areas differ by less than `min_diversity` the largest stays. The keypoint is the ellipse of the
    same second moments (size: twice the standard deviation); the response is its area, so that the largest come first.
    """

    name: Literal["mser"] = "mser"
    paper: ClassVar[str] = "Matas, Chum, Urban, Pajdla, Robust wide baseline stereo from MSER, BMVC 2002"

    delta: PositiveInt = 5
    min_area: PositiveInt = 60
    max_area: PositiveInt = 14_400
    max_variation: PositiveFloat = 0.25
    min_diversity: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @property
    def affine(self) -> bool:
        """Ellipses."""
        return True

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> "MserDetector":  # noqa: ARG002
        """OpenCV's detector, with ellipses."""
        return MserDetector(self)


class MserDetector:
    """OpenCV's regions of both polarities, as ellipses."""

    def __init__(self, spec: Mser) -> None:
        self._min_diversity = spec.min_diversity
        # OpenCV's own test of diversity also leaves out every region that lies in no other.
        opencv_diversity = 0.0
        settings = spec.delta, spec.min_area, spec.max_area, spec.max_variation, opencv_diversity
        self._mser = cv2.MSER.create(*settings)

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 7)."""
        # OpenCV fails on pictures of fewer than three pixels a side.
        found: Any = self._mser.detectRegions(grey(image)) if min(image.shape[:2]) > 2 else ((), ())
        regions, boxes = found
        areas = np.array([len(region) for region in regions])
        # A region that is the whole picture (OpenCV leaves out its border) is brighter or darker than nothing.
        order = np.lexsort((*boxes.T, -areas)) if len(regions) else np.empty(0, np.int64)
        order = order[areas[order] < (image.shape[0] - 2) * (image.shape[1] - 2)]
        if not len(order):
            return np.empty((0, 7), np.float32)
        return ellipses([regions[i] for i in order[_distinct(areas[order], boxes[order], self._min_diversity)]])


@numba.njit(cache=True, nogil=True)
def _distinct(areas: Int64s, boxes: Int32s, min_diversity: float) -> Int64s:
    """Positions of the regions, by falling area, that lie in no kept one of nearly the same area.

    A region lies in another of nearly the same area if its box (left, top, width, height) does.
    """
    kept = np.empty(len(areas), np.int64)
    count = 0
    for i in range(len(areas)):
        left, top, right, bottom = boxes[i, 0], boxes[i, 1], boxes[i, 0] + boxes[i, 2], boxes[i, 1] + boxes[i, 3]
        alone = True
        for j in kept[:count][::-1]:
            if areas[j] - areas[i] >= min_diversity * areas[j]:
                break
            x, y, width, height = boxes[j]
            if x <= left and y <= top and right <= x + width and bottom <= y + height:
                alone = False
                break
        if alone:
            kept[count] = i
            count += 1
    return kept[:count]


def ellipses(regions: Sequence[Array]) -> Floats:
    """The ellipse (K, 7) of each region, an array of the places x, y (P, 2) of its pixels; the response is its area."""
    areas = np.array([len(region) for region in regions])
    starts = np.concatenate([[0], np.cumsum(areas)[:-1]])
    x, y = np.concatenate(regions).T.astype(np.float64)
    means = [np.add.reduceat(values, starts) / areas for values in (x, y, x * x, x * y, y * y)]
    mean_x, mean_y, xx, xy, yy = means
    # A pixel is a square of variance 1/12 on each side, so that no ellipse is without area.
    xx, xy, yy = xx - mean_x**2 + 1 / 12, xy - mean_x * mean_y, yy - mean_y**2 + 1 / 12
    middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    major, minor = np.sqrt(middle + spread), np.sqrt(np.maximum(middle - spread, 1 / 12))
    direction = np.degrees(np.arctan2(2 * xy, xx - yy)) / 2 % 180
    columns = mean_x, mean_y, 2 * np.sqrt(major * minor), np.zeros(len(areas)), areas, minor / major, direction
    return np.stack(columns, axis=1).astype(np.float32)
