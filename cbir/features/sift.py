"""SIFT: keypoints of the difference-of-Gaussians scale space and their gradient histograms."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from cbir.features.descriptors.sift import SiftDescriptorSpec
from cbir.features.detectors.dog import Dog
from cbir.features.extractor import ExtractorSpec
from cbir.features.local import Local, LocalExtractor
from cbir.images import View

__all__ = ["Sift"]


class Sift(ExtractorSpec):
    """SIFT (Lowe 2004): the `max_features` keypoints of highest contrast, uint8 descriptors of 128 dimensions.

    Geometry is x, y, size (diameter), angle in degrees, clockwise from the x axis. A place with several dominant
    orientations gives a keypoint for each. `upright` (gravity vector, Perdoch et al. 2009) takes angle 0 everywhere, so
    that each place has one keypoint: better where pictures are taken upright. A picture may have no keypoint.

    The same as the extractor `local` with the detector `dog` and the descriptor `sift`, in fewer words.
    """

    name: Literal["sift"] = "sift"
    local: ClassVar[bool] = True
    paper: ClassVar[str] = "Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004"

    max_features: PositiveInt = 1000
    upright: bool = False
    contrast_threshold: NonNegativeFloat = 0.04
    edge_threshold: PositiveFloat = 10.0
    sigma: PositiveFloat = 1.6
    size: PositiveInt = 1024

    @property
    def view(self) -> View:
        """The longest side at most `size`, never enlarged."""
        return View(size=self.size, fit="longest")

    def build(self, device: str, assets: Mapping[str, Path]) -> LocalExtractor:
        """An extractor on the CPU, whatever the device."""
        thresholds = {"contrast_threshold": self.contrast_threshold, "edge_threshold": self.edge_threshold}
        return Local(
            detector=Dog(sigma=self.sigma, **thresholds),
            descriptor=SiftDescriptorSpec(),
            max_features=self.max_features,
            upright=self.upright,
            size=self.size,
        ).build(device, assets)
