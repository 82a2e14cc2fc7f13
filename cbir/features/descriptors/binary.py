"""Binary descriptors: comparisons of grey values as bits, to be compared by the Hamming distance.

Rows are uint8, eight bits in each. An ellipse is described as the circle of the same area.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from cbir.features.descriptors.descriptor import DescriptorSpec
from cbir.features.detectors import brisk, orb
from cbir.features.detectors.detector import DetectorSpec
from cbir.features.opencv import OpenCvDescriptor, OpenCvOnePass, algorithm
from cbir.types import Floats

__all__ = ["Brief", "BriskDescriptor", "Freak", "OrbDescriptor"]


class Brief(DescriptorSpec):
    """BRIEF (Calonder et al. 2010): 256 comparisons of smoothed pixels in a window of 48 pixels, whatever the size.

    With `oriented`, the window is turned by the keypoint's angle.
    """

    name: Literal["brief"] = "brief"
    paper: ClassVar[str] = "Calonder et al., BRIEF: binary robust independent elementary features, ECCV 2010"

    bits: Literal[128, 256, 512] = 256
    oriented: bool = False

    def build(self, device: str, assets: Mapping[str, Path]) -> OpenCvDescriptor:  # noqa: ARG002 - runs on the CPU
        """OpenCV's descriptor."""
        return OpenCvDescriptor(algorithm("BriefDescriptorExtractor").create(self.bits // 8, self.oriented))


class OrbDescriptor(DescriptorSpec):
    """Rotated BRIEF (Rublee et al. 2011): 256 comparisons, learned to be uncorrelated, in a patch of 31 pixels.

    The patch is taken from the level of a pyramid where the keypoint's size is nearest to 31, turned by its angle.
    """

    name: Literal["orb"] = "orb"
    paper: ClassVar[str] = "Rublee et al., ORB: an efficient alternative to SIFT or SURF, ICCV 2011"

    def build(self, device: str, assets: Mapping[str, Path]) -> OpenCvDescriptor:  # noqa: ARG002 - runs on the CPU
        """OpenCV's descriptor, on the pyramid of ORB's default settings."""
        return OpenCvDescriptor(orb.Orb().algorithm(max_features=1), _orb_levels, orb.SMALLEST)

    def one_pass(self, detector: DetectorSpec, max_features: int) -> OpenCvOnePass | None:
        """With oriented FAST."""
        if not isinstance(detector, orb.Orb):
            return None
        return OpenCvOnePass(detector.algorithm(max_features), orb.SMALLEST)


class BriskDescriptor(DescriptorSpec):
    """BRISK (Leutenegger et al. 2011): 512 comparisons of short pairs in a pattern of 60 points on circles.

    The pattern grows with the keypoint's size. It always follows the gradient of its long pairs, not the given angle.
    """

    name: Literal["brisk"] = "brisk"
    paper: ClassVar[str] = "Leutenegger et al., BRISK: binary robust invariant scalable keypoints, ICCV 2011"

    pattern_scale: PositiveFloat = 1.0

    @property
    def turns_by_itself(self) -> bool:
        """Always."""
        return True

    def build(self, device: str, assets: Mapping[str, Path]) -> OpenCvDescriptor:  # noqa: ARG002 - runs on the CPU
        """OpenCV's descriptor."""
        return OpenCvDescriptor(brisk.Brisk(pattern_scale=self.pattern_scale).algorithm())

    def one_pass(self, detector: DetectorSpec, max_features: int) -> OpenCvOnePass | None:  # noqa: ARG002
        """With BRISK's keypoints, where both have the same pattern."""
        if not isinstance(detector, brisk.Brisk) or detector.pattern_scale != self.pattern_scale:
            return None
        return OpenCvOnePass(detector.algorithm(), brisk.SMALLEST)


class Freak(DescriptorSpec):
    """FREAK (Alahi et al. 2012): 512 comparisons in a pattern like the retina's, dense in the middle.

    The pattern grows with the keypoint's size. With `oriented` it follows the gradient of its own pairs, not the given
    angle; without, it is upright.
    """

    name: Literal["freak"] = "freak"
    paper: ClassVar[str] = "Alahi, Ortiz, Vandergheynst, FREAK: fast retina keypoint, CVPR 2012"

    oriented: bool = True
    pattern_scale: PositiveFloat = 22.0

    @property
    def turns_by_itself(self) -> bool:
        """If oriented."""
        return self.oriented

    def build(self, device: str, assets: Mapping[str, Path]) -> OpenCvDescriptor:  # noqa: ARG002 - runs on the CPU
        """OpenCV's descriptor."""
        scaled = True
        return OpenCvDescriptor(algorithm("FREAK").create(self.oriented, scaled, self.pattern_scale))


def _orb_levels(table: Floats, shape: tuple[int, ...]) -> list[int]:  # noqa: ARG001 - any picture has all levels
    """The pyramid's level for each keypoint."""
    spec = orb.Orb()
    levels = np.round(np.log(table[:, 2] / orb.PATCH) / np.log(spec.scale_factor)).astype(np.int64)
    found: list[int] = np.clip(levels, 0, spec.levels - 1).tolist()
    return found
