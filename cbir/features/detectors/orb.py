"""ORB's oriented FAST."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import cv2
from pydantic import Field, PositiveInt

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import OpenCvDetector

__all__ = ["PATCH", "SMALLEST", "Orb"]

PATCH, SMALLEST = 31, 2
WTA_K, FIRST_LEVEL = 2, 0


class Orb(DetectorSpec):
    """Oriented FAST (Rublee et al. 2011): FAST corners of a pyramid, ranked by Harris' measure.

    The angle is that from the patch's centre to its centroid of intensity, the size 31 pixels of the level. Every level
    gives its share of keypoints, as many as it has pixels.
    """

    name: Literal["orb"] = "orb"
    oriented: ClassVar[bool] = True
    paper: ClassVar[str] = "Rublee et al., ORB: an efficient alternative to SIFT or SURF, ICCV 2011"

    scale_factor: Annotated[float, Field(gt=1, le=2)] = 1.2
    """How much smaller each level of the pyramid is than the one before."""
    levels: PositiveInt = 8
    fast_threshold: int = Field(default=20, ge=1, le=254)
    """By how many grey levels the arc differs from the corner, at least."""

    def algorithm(self, max_features: int) -> Any:
        """OpenCV's ORB."""
        pyramid = self.scale_factor, self.levels, PATCH, FIRST_LEVEL
        return cv2.ORB.create(max_features, *pyramid, WTA_K, cv2.ORB_HARRIS_SCORE, PATCH, self.fast_threshold)

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> OpenCvDetector:  # noqa: ARG002
        """OpenCV's detector."""
        return OpenCvDetector(self.algorithm(max_features), SMALLEST)
