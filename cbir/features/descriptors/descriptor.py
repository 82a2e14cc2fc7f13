"""The role of a descriptor: an image and keypoints in, one row for each keypoint out."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from cbir.features.detectors.detector import DetectorSpec
from cbir.spec import Method
from cbir.types import Array, Floats, Int64s, Pixels

__all__ = ["Descriptor", "DescriptorSpec", "OnePass"]


class Descriptor(Protocol):
    """A working descriptor, built once per worker process."""

    @property
    def dim(self) -> int:
        """Columns of its rows; bits are packed, eight in a column."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """That of its rows: float32, or uint8 for histograms and packed bits."""
        ...

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Array, Int64s]:
        """Rows (k, dim) of those keypoints of an RGB image (H, W, 3) that can be described, and their positions (k,).

        `keypoints` is a table (K, 5 or 7) of cbir.features.keypoints; the positions rise.
        """
        ...


class OnePass(Protocol):
    """A detector and a descriptor that share their work: faster than one after the other, with the same result."""

    def detect_and_describe(self, image: Pixels) -> tuple[Floats, Array]:
        """Every keypoint (K, 5) of an RGB image (H, W, 3), in any order, and their rows (K, dim)."""
        ...


class DescriptorSpec(Method):
    """Configuration of a descriptor."""

    role: ClassVar[str] = "descriptor"

    @property
    def turns_by_itself(self) -> bool:
        """Whether it follows an orientation that it finds itself, not the angle of the keypoints."""
        return False

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that the descriptor needs (weights): field name -> local path, `s3://` URI or hub name."""
        return {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Descriptor:
        """The working descriptor on a torch device ("cpu", "cuda"), with its assets as local files."""
        raise NotImplementedError

    def one_pass(self, detector: DetectorSpec, max_features: int) -> OnePass | None:  # noqa: ARG002 - for subclasses
        """Both in one, if they share their work; it may leave out all but the `max_features` strongest keypoints."""
        return None
