"""SIFT descriptors of any keypoints, circles or ellipses."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from cbir.features.descriptors.descriptor import DescriptorSpec
from cbir.features.detectors.detector import DetectorSpec
from cbir.features.detectors.dog import LAYERS_PER_OCTAVE, SIGMA, Dog
from cbir.features.opencv import OpenCvDescriptor, OpenCvOnePass, grey
from cbir.features.patches import blocks, normalised_patches, pyramid
from cbir.types import Floats, Int64s, Pixels

__all__ = ["DIM", "SiftDescriptor", "SiftDescriptorSpec", "packed_octaves"]

DIM = 128
# The middle 31 pixels of a patch show 7.5 scales on each side, as far as histograms of 4 x 4 cells of 3 scales reach;
# the 12 around them are what OpenCV's smoothing and gradient see of its surroundings.
SIDE, REACH = 55, 7.5 * 55 / 31
FINEST_OCTAVE = -1


class SiftDescriptorSpec(DescriptorSpec):
    """SIFT (Lowe 2004): 4 x 4 histograms of 8 gradient directions, uint8 rows of 128 dimensions and length about 512.

    A cell is 3 scales wide. Circles are described in the scale space of the picture, ellipses in normalised patches.
    """

    name: Literal["sift"] = "sift"
    paper: ClassVar[str] = "Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004"

    def build(self, device: str, assets: Mapping[str, Path]) -> "SiftDescriptor":  # noqa: ARG002 - runs on the CPU
        """OpenCV's descriptor."""
        return SiftDescriptor()

    def one_pass(self, detector: DetectorSpec, max_features: int) -> OpenCvOnePass | None:
        """With the keypoints of the difference of Gaussians."""
        return OpenCvOnePass(detector.algorithm(max_features)) if isinstance(detector, Dog) else None


class SiftDescriptor:
    """OpenCV's SIFT, at any scale."""

    dim, dtype = DIM, np.dtype(np.uint8)

    def __init__(self) -> None:
        self._in_image = OpenCvDescriptor(Dog().algorithm(), packed_octaves)

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Pixels, Int64s]:
        """Rows (K, 128) of all keypoints."""
        return self.describe_grey(grey(image), keypoints), np.arange(len(keypoints), dtype=np.int64)

    def describe_grey(self, picture: Pixels, keypoints: Floats) -> Pixels:
        """Rows (K, 128) of a grey picture (H, W)."""
        if keypoints.shape[1] == 5:
            return self._in_image.describe_grey(picture, keypoints)[0]
        levels, rows = pyramid(picture), [np.empty((0, DIM), np.uint8)]
        for block in blocks(len(keypoints)):
            patches = normalised_patches(levels, keypoints[block], SIDE, REACH)
            rows.append(self._of_patches(patches.round().astype(np.uint8)))
        return np.concatenate(rows)

    def _of_patches(self, patches: Pixels) -> Pixels:
        """Rows (K, 128) of patches (K, SIDE, SIDE), all at once: they stand one upon the other as one tall picture."""
        table = np.zeros((len(patches), 5), np.float32)
        table[:, 0] = (SIDE - 1) / 2
        table[:, 1] = table[:, 0] + SIDE * np.arange(len(patches))
        table[:, 2] = SIDE / REACH
        return self._in_image.describe_grey(patches.reshape(-1, SIDE), table)[0]


def packed_octaves(table: Floats, shape: tuple[int, ...]) -> list[int]:
    """Octave and layer, as OpenCV's SIFT packs them, that come nearest to each keypoint's size in a picture (H, W).

    The finest octave, -1, is that of the doubled picture; layers are 1 to 3.
    """
    steps = np.round(LAYERS_PER_OCTAVE * np.log2(table[:, 2] / (2 * SIGMA))).astype(np.int64)
    coarsest = max(FINEST_OCTAVE + 1, round(np.log2(min(shape))) - 2)
    octaves = np.clip((steps - 1) // LAYERS_PER_OCTAVE, FINEST_OCTAVE, coarsest)
    layers = np.clip(steps - LAYERS_PER_OCTAVE * octaves, 1, LAYERS_PER_OCTAVE)
    packed: list[int] = ((octaves & 255) | layers << 8).tolist()
    return packed
