"""Blobs of nonlinear scale spaces: KAZE and AKAZE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import OpenCvDetector, algorithm

__all__ = ["SMALLEST", "Akaze", "Kaze"]

SMALLEST = 4
FULL_SIZE, CHANNELS = 0, 3


class _NonlinearScaleSpace(DetectorSpec):
    """The settings of both."""

    threshold: PositiveFloat = 0.001
    """The least determinant of the Hessian, of a picture with values 0 to 1."""
    octaves: PositiveInt = 4
    layers: PositiveInt = 4
    """Levels of an octave."""


class Kaze(_NonlinearScaleSpace):
    """KAZE (Alcantarilla et al. 2012): extrema of the Hessian's determinant where diffusion keeps edges sharp."""

    name: Literal["kaze"] = "kaze"
    paper: ClassVar[str] = "Alcantarilla, Bartoli, Davison, KAZE features, ECCV 2012"

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> OpenCvDetector:  # noqa: ARG002
        """OpenCV's detector."""
        extended = upright = False
        settings = self.threshold, self.octaves, self.layers
        return OpenCvDetector(algorithm("KAZE").create(extended, upright, *settings), SMALLEST)


class Akaze(_NonlinearScaleSpace):
    """AKAZE (Alcantarilla et al. 2013): KAZE with fast explicit diffusion; the angle is that of gradients around."""

    name: Literal["akaze"] = "akaze"
    oriented: ClassVar[bool] = True
    paper: ClassVar[str] = "Alcantarilla, Nuevo, Bartoli, Fast explicit diffusion for accelerated features, BMVC 2013"

    def algorithm(self) -> Any:
        """OpenCV's AKAZE, with its binary descriptor (M-LDB, 486 bits)."""
        descriptor = algorithm("AKAZE_DESCRIPTOR_MLDB"), FULL_SIZE, CHANNELS
        return algorithm("AKAZE").create(*descriptor, self.threshold, self.octaves, self.layers)

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> OpenCvDetector:  # noqa: ARG002
        """OpenCV's detector."""
        return OpenCvDetector(self.algorithm(), SMALLEST)
