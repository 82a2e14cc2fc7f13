"""Corners by the segment test: FAST and AGAST."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import cv2
from pydantic import Field, PositiveFloat

from cbir.features.detectors.detector import Detector, DetectorSpec
from cbir.features.opencv import OpenCvDetector, algorithm
from cbir.types import Floats, Pixels

__all__ = ["Agast", "Fast", "Sized"]


class Sized:
    """A detector without scales, whose keypoints all get one size."""

    def __init__(self, detector: Detector, size: float) -> None:
        self._detector, self._size = detector, size

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 5)."""
        keypoints = self._detector.detect(image)
        keypoints[:, 2] = self._size
        return keypoints


class _SegmentTest(DetectorSpec):
    """The settings of both."""

    threshold: int = Field(default=10, ge=1, le=254)
    """By how many grey levels the arc differs from the centre, at least."""
    keypoint_size: PositiveFloat = 7.0
    """The size of all keypoints in pixels; 7 is the circle that is tested."""


class Fast(_SegmentTest):
    """FAST (Rosten and Drummond 2006): corners, where 9 pixels in a row of a circle of 16 are brighter or darker.

    The response is the highest threshold at which the pixel would still be a corner. All have one size.
    """

    name: Literal["fast"] = "fast"
    paper: ClassVar[str] = "Rosten and Drummond, Machine learning for high-speed corner detection, ECCV 2006"

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> Sized:  # noqa: ARG002
        """OpenCV's detector."""
        return Sized(OpenCvDetector(cv2.FastFeatureDetector.create(self.threshold)), self.keypoint_size)


class Agast(_SegmentTest):
    """AGAST (Mair et al. 2010): the segment test of FAST, with a decision tree that adapts to the texture."""

    name: Literal["agast"] = "agast"
    paper: ClassVar[str] = "Mair et al., Adaptive and generic corner detection, ECCV 2010"

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> Sized:  # noqa: ARG002
        """OpenCV's detector."""
        return Sized(OpenCvDetector(algorithm("AgastFeatureDetector").create(self.threshold)), self.keypoint_size)
