"""The role of a detector: one image in, keypoints out."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

from cbir.spec import Method
from cbir.types import Floats, Pixels

__all__ = ["Detector", "DetectorSpec"]


class Detector(Protocol):
    """A working detector, built once per worker process."""

    def detect(self, image: Pixels) -> Floats:
        """Every keypoint of an RGB image (H, W, 3), as a table of cbir.features.keypoints, in any order.

        (K, 7) if the specification says `affine`, else (K, 5); the angle is 0 where it does not say `oriented`. The
        image may be of any size, and have no keypoint.
        """
        ...


class DetectorSpec(Method):
    """Configuration of a detector."""

    role: ClassVar[str] = "detector"
    oriented: ClassVar[bool] = False
    """Whether its keypoints have an angle; others get that of the dominant gradient."""

    @property
    def affine(self) -> bool:
        """Whether its keypoints are ellipses."""
        return False

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that the detector needs (weights): field name -> local path, `s3://` URI or hub name."""
        return {}

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> Detector:
        """The working detector on a torch device ("cpu", "cuda"), with its assets as local files.

        It may leave out all but the `max_features` keypoints of highest response.
        """
        raise NotImplementedError
