"""The role of a mask: from decoded images to what of them is wanted; elsewhere features go or maps count less."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cbir.spec import Method
from cbir.types import FeatureBatch, Floats, ImageBatch, Int64s

__all__ = ["MaskSpec", "Masker", "drop_masked", "usable_masks"]


class Masker(Protocol):
    """A working mask, built once per worker process."""

    def masks(self, batch: ImageBatch) -> Sequence[Floats]:
        """One mask (h, w) per image, of any size but stretched over the whole image: from 0, unwanted, to 1."""
        ...


class MaskSpec(Method):
    """Configuration of a mask."""

    role: ClassVar[str] = "mask"

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Features where the mask is below this are dropped; where maps are pooled, a mask that nowhere reaches it is not
    used."""

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that the mask needs (weights): field name -> local path or `s3://` URI."""
        return {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Masker:
        """The working mask on a torch device ("cpu", "cuda"), with its assets as local files."""
        raise NotImplementedError


def drop_masked(features: FeatureBatch, masks: Sequence[Floats], threshold: float) -> FeatureBatch:
    """The features whose centres lie where the mask of their image is at least the threshold.

    `features.sizes` must be known. Where a mask would drop all features of an image it is not used, with a warning.
    """
    kept = [_wanted(features, i, mask) >= threshold for i, mask in enumerate(masks)]
    for i, chosen in enumerate(kept):
        if len(chosen) and not chosen.any():
            chosen[:] = True
            warnings.warn(
                f"image {features.image_ids[i]}: the mask leaves none of its {len(chosen)} features, all are kept",
                RuntimeWarning,
                stacklevel=2,
            )
    return features.take_rows(np.concatenate([np.empty(0, np.bool_), *kept]))


def usable_masks(image_ids: Int64s, masks: Sequence[Floats], threshold: float) -> list[Floats]:
    """The masks, with ones in place of those that are below the threshold everywhere, with a warning."""
    usable = list(masks)
    for i, mask in enumerate(usable):
        if mask.max() < threshold:
            usable[i] = np.ones_like(mask)
            warnings.warn(
                f"image {image_ids[i]}: the mask leaves no place, the whole image is used", RuntimeWarning, stacklevel=2
            )
    return usable


def _wanted(features: FeatureBatch, i: int, mask: Floats) -> npt.NDArray[np.float32]:
    """The mask's value at every feature of image number i."""
    places = features.geometry[features.rows(i), :2].astype(np.float64) + 0.5  # a pixel's centre is at whole numbers
    shares = places / features.sizes[i, ::-1]
    columns, rows = np.clip(shares * mask.shape[::-1], 0, np.subtract(mask.shape[::-1], 1)).astype(np.int64).T
    values: npt.NDArray[np.float32] = mask[rows, columns]
    return values
