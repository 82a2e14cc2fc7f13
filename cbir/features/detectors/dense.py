"""The dense grid."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, PositiveInt

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import grey
from cbir.types import Array, Floats, Int64s, Pixels

__all__ = ["Dense"]

WINDOW = 6.0  # SIFT's window of 4 x 4 cells is so many sizes wide


class Dense(DetectorSpec):
    """Dense sampling (Fei-Fei and Perona 2005): square patches of given sides every `step` pixels, inside the picture.

    A side of w pixels gives (⌊(W - w) / step⌋ + 1) · (⌊(H - h) / step⌋ + 1) patches. The keypoint's size is a sixth of
    the side, so that SIFT's window of 4 x 4 cells is just the patch; the angle is 0. The response is the standard
    deviation of the grey values in the patch, so that `max_features` leaves out the plainest patches.
    """

    name: Literal["dense"] = "dense"
    oriented: ClassVar[bool] = True
    paper: ClassVar[str] = "Fei-Fei and Perona, A Bayesian hierarchical model for natural scene categories, CVPR 2005"

    step: PositiveInt = 8
    """Pixels from one patch to the next."""
    sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (16, 24, 32)
    """Sides of the patches in pixels."""

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> "DenseDetector":  # noqa: ARG002
        """The grid."""
        return DenseDetector(self)


class DenseDetector:
    """Places that do not depend on the pixels, ranked by contrast."""

    def __init__(self, spec: Dense) -> None:
        self._spec = spec

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 5)."""
        sums, square_sums = cv2.integral2(grey(image))
        grids = [_grid(sums, square_sums, side, self._spec.step) for side in self._spec.sides]
        return np.concatenate(grids).astype(np.float32)


def _grid(sums: Array, square_sums: Array, side: int, step: int) -> Array:
    """Keypoints (K, 5) of the patches of one side, from integral images (H + 1, W + 1); patches are whole pixels."""
    tops, lefts = (np.arange(0, length - side, step) for length in sums.shape)
    mean, mean_square = (_boxes(table, tops, lefts, side) / side**2 for table in (sums, square_sums))
    contrast = np.sqrt(np.maximum(mean_square - mean**2, 0.0)).ravel()
    y, x = (place.ravel() + (side - 1) / 2 for place in np.meshgrid(tops, lefts, indexing="ij"))
    return np.stack([x, y, np.full(len(x), side / WINDOW), np.zeros(len(x)), contrast], axis=1)


def _boxes(sums: Array, tops: Int64s, lefts: Int64s, side: int) -> Array:
    """Sums over the squares with these top and left edges, (len(tops), len(lefts))."""
    upper, lower = sums[tops], sums[tops + side]
    return lower[:, lefts + side] - lower[:, lefts] - upper[:, lefts + side] + upper[:, lefts]
