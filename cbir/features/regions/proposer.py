"""The role of a proposer: decoded images in, boxes of what may be an object out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from cbir.spec import Method
from cbir.types import Array, Floats, ImageBatch, Int32s, Regions

__all__ = ["Proposer", "ProposerSpec", "in_original_pixels", "regions_of", "with_whole"]


class Proposer(Protocol):
    """A working proposer, built once per worker process."""

    def propose(self, batch: ImageBatch) -> Regions:
        """At least one box in every image of the batch, in pixels of the upright original.

        The boxes of an image do not depend on the other images. The whole image is 0, 0, width, height.
        """
        ...


class ProposerSpec(Method):
    """Configuration of a proposer."""

    role: ClassVar[str] = "proposer"

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that the proposer needs (weights): field name -> local path or `s3://` URI."""
        return {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Proposer:
        """The working proposer on a torch device ("cpu", "cuda"), with its assets as local files."""
        raise NotImplementedError


def regions_of(boxes: Sequence[Floats]) -> Regions:
    """From one array of boxes (R, 4) per image, in pixels of the originals."""
    offsets = np.zeros(len(boxes) + 1, np.int64)
    np.cumsum([len(rows) for rows in boxes], out=offsets[1:])
    return Regions(offsets, np.concatenate([np.empty((0, 4), np.float32), *boxes]))


def in_original_pixels(
    boxes: npt.NDArray[np.floating[Any]], decoded: tuple[int, ...], original: Int32s
) -> npt.NDArray[np.float64]:
    """Boxes (R, 4) in a decoded image of (H, W, ...) pixels, in those of its original (height, width), cut off at its
    edges; boxes of which nothing is left are left out."""
    sides = np.array([original[1], original[0]] * 2, np.float64)
    # The product first: the far edge of the decoded image becomes exactly that of the original.
    scaled = np.asarray(boxes, np.float64) * sides / (decoded[1], decoded[0], decoded[1], decoded[0])
    scaled = np.clip(scaled, 0, sides)
    return scaled[(scaled[:, 2:] > scaled[:, :2]).all(axis=1)]


def with_whole(boxes: Array, original: Int32s, *, first: bool = True) -> Floats:
    """Boxes (R, 4) with the whole image before them; with `first` False, instead of them where there are none."""
    whole = np.array([[0, 0, original[1], original[0]]], np.float32)
    rows = np.asarray(boxes, np.float32).reshape(-1, 4)
    if not len(rows):
        return whole
    return np.concatenate([whole, rows[(rows != whole).any(axis=1)]]) if first else rows
