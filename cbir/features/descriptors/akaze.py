"""AKAZE's binary descriptor."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from cbir.features.descriptors.descriptor import DescriptorSpec
from cbir.features.detectors.detector import DetectorSpec
from cbir.features.detectors.kaze import SMALLEST, Akaze
from cbir.features.opencv import OpenCvOnePass, grey, to_opencv
from cbir.types import Floats, Int64s, Pixels

__all__ = ["AkazeDescriptor", "AkazeDescriptorSpec"]

FINEST_SIZE = 4.8  # of the keypoints of the first level: 1.6 scales, times 1.5, as a diameter
LEAST_WIDTH, LEAST_HEIGHT = 80, 40  # of an octave after the first


class AkazeDescriptorSpec(DescriptorSpec):
    """M-LDB (Alcantarilla et al. 2013): 486 comparisons of grey values and gradients, averaged over cells of grids.

    Described at the level of a nonlinear scale space that is nearest to the keypoint's size, turned by its angle. An
    ellipse is described as the circle of the same area. Rows are 61 bytes, to be compared by the Hamming distance.
    """

    name: Literal["akaze"] = "akaze"
    paper: ClassVar[str] = "Alcantarilla, Nuevo, Bartoli, Fast explicit diffusion for accelerated features, BMVC 2013"

    def build(self, device: str, assets: Mapping[str, Path]) -> "AkazeDescriptor":  # noqa: ARG002 - runs on the CPU
        """OpenCV's descriptor, in the scale space of AKAZE's default settings."""
        return AkazeDescriptor()

    def one_pass(self, detector: DetectorSpec, max_features: int) -> OpenCvOnePass | None:  # noqa: ARG002
        """With AKAZE's keypoints."""
        return OpenCvOnePass(detector.algorithm(), SMALLEST) if isinstance(detector, Akaze) else None


class AkazeDescriptor:
    """OpenCV's AKAZE, which wants to know the level of each keypoint."""

    def __init__(self) -> None:
        self._spec = Akaze()
        self._akaze = self._spec.algorithm()
        self.dim, self.dtype = int(self._akaze.descriptorSize()), np.dtype(np.uint8)

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Pixels, Int64s]:
        """Rows (K, 61) of all keypoints, unless the picture is too small for a scale space."""
        if not len(keypoints) or min(image.shape[:2]) < SMALLEST:
            return np.empty((0, self.dim), np.uint8), np.empty(0, np.int64)
        levels = self._levels(keypoints, *image.shape[:2])
        listed = to_opencv(keypoints, (levels // self._spec.layers).tolist())
        for keypoint, level in zip(listed, levels.tolist(), strict=True):
            keypoint.class_id = level
        rows = self._akaze.compute(grey(image), listed)[1]
        return rows, np.arange(len(keypoints), dtype=np.int64)

    def _levels(self, keypoints: Floats, height: int, width: int) -> Int64s:
        octaves = 1
        while octaves < self._spec.octaves and width >> octaves >= LEAST_WIDTH and height >> octaves >= LEAST_HEIGHT:
            octaves += 1
        levels = np.round(self._spec.layers * np.log2(keypoints[:, 2] / FINEST_SIZE)).astype(np.int64)
        return np.asarray(np.clip(levels, 0, octaves * self._spec.layers - 1), np.int64)
