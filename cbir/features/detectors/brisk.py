"""BRISK's detector: AGAST corners in scale space."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import OpenCvDetector, algorithm

__all__ = ["SMALLEST", "Brisk"]

SMALLEST = 8


class Brisk(DetectorSpec):
    """BRISK (Leutenegger et al. 2011): corners of the segment test that are extrema over place and scale.

    The angle is that of the gradient of long pairs of points in BRISK's pattern.
    """

    name: Literal["brisk"] = "brisk"
    oriented: ClassVar[bool] = True
    paper: ClassVar[str] = "Leutenegger et al., BRISK: binary robust invariant scalable keypoints, ICCV 2011"

    threshold: int = Field(default=30, ge=1, le=254)
    """By how many grey levels the arc differs from the corner, at least."""
    octaves: NonNegativeInt = 3
    """0: a single scale."""
    pattern_scale: PositiveFloat = 1.0

    def algorithm(self) -> Any:
        """OpenCV's BRISK."""
        return algorithm("BRISK").create(self.threshold, self.octaves, self.pattern_scale)

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> OpenCvDetector:  # noqa: ARG002
        """OpenCV's detector."""
        return OpenCvDetector(self.algorithm(), SMALLEST)
