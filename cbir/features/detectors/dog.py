"""The difference-of-Gaussians detector of SIFT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
from pydantic import NonNegativeFloat, PositiveFloat

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import OpenCvDetector

__all__ = ["LAYERS_PER_OCTAVE", "SIGMA", "Dog"]

LAYERS_PER_OCTAVE, SIGMA = 3, 1.6


class Dog(DetectorSpec):
    """Difference of Gaussians (Lowe 2004): blobs, extrema in scale space; one for each dominant orientation of a place.

    `contrast_threshold` refuses weak blobs, `edge_threshold` long ones.
    """

    name: Literal["dog"] = "dog"
    oriented: ClassVar[bool] = True
    paper: ClassVar[str] = "Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004"

    contrast_threshold: NonNegativeFloat = 0.04
    edge_threshold: PositiveFloat = 10.0
    sigma: PositiveFloat = SIGMA

    def algorithm(self, max_features: int = 0) -> Any:
        """OpenCV's SIFT; 0: all keypoints."""
        # The precise upscaling removes a shift of a quarter pixel that is not the same for a rotated picture.
        settings = (self.contrast_threshold, self.edge_threshold, self.sigma, cv2.CV_8U, True)
        return cv2.SIFT.create(max_features, LAYERS_PER_OCTAVE, *settings)

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> OpenCvDetector:  # noqa: ARG002
        """All keypoints: several of them may be one where no orientation is wanted."""
        return OpenCvDetector(self.algorithm())
