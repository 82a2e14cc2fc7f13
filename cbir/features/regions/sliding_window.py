"""Sliding windows: boxes of given scales and aspect ratios at every step."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from cbir.features.regions.proposer import ProposerSpec, regions_of, with_whole
from cbir.types import Array, ImageBatch, Regions

__all__ = ["SlidingWindow"]


class SlidingWindow(ProposerSpec):
    """Sliding windows (Lampert et al. 2008): one window per scale and aspect ratio, moved by a share of its sides.

    A window of w x h pixels that is moved by a x b gives (floor((W - w) / a) + 1) (floor((H - h) / b) + 1) boxes in an
    image of W x H; one that does not fit gives none.
    """

    name: Literal["sliding_window"] = "sliding_window"
    paper: ClassVar[str] = "Lampert, Blaschko, Hofmann, Beyond sliding windows, CVPR 2008"

    scales: tuple[PositiveFloat, ...] = Field(
        default=(0.5, 0.75), min_length=1, description="sides of square windows, as shares of the image's shorter side"
    )
    aspect_ratios: tuple[PositiveFloat, ...] = Field(
        default=(1.0,), min_length=1, description="width by height of the windows; their area does not change with it"
    )
    stride: Annotated[float, Field(gt=0)] = Field(default=0.5, description="the step, as a share of a window's sides")
    whole: bool = Field(default=True, description="the whole image as first box")

    def build(self, device: str, assets: Mapping[str, Path]) -> "SlidingWindowProposer":  # noqa: ARG002 - no pixel is seen
        """The same for every device."""
        return SlidingWindowProposer(self)

    def windows(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Width and height of every window in an image of this size, in whole pixels."""
        for scale, ratio in itertools.product(self.scales, self.aspect_ratios):
            side = scale * min(height, width)
            yield max(1, round(side * math.sqrt(ratio))), max(1, round(side / math.sqrt(ratio)))


class SlidingWindowProposer:
    """The windows of a `SlidingWindow`."""

    def __init__(self, spec: SlidingWindow) -> None:
        self._spec = spec

    def propose(self, batch: ImageBatch) -> Regions:
        """By scale, aspect ratio, row and column."""
        boxes = [self._boxes(*size) for size in batch.sizes.tolist()]
        pairs = zip(boxes, batch.sizes, strict=True)
        return regions_of([with_whole(found, size, first=self._spec.whole) for found, size in pairs])

    def _boxes(self, height: int, width: int) -> Array:
        found = [np.empty((0, 4))]
        for w, h in self._spec.windows(height, width):
            across, down = (max(1, round(self._spec.stride * side)) for side in (w, h))
            places = np.arange(0, height - h + 1, down), np.arange(0, width - w + 1, across)
            top, left = np.stack(np.meshgrid(*places, indexing="ij")).reshape(2, -1)
            found.append(np.stack([left, top, left + w, top + h], axis=1))
        return np.concatenate(found)
