"""Fixed grids: tiles of equal size at several levels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from cbir.features.regions.proposer import ProposerSpec, regions_of
from cbir.types import Array, Floats, ImageBatch, Int32s, Regions

__all__ = ["Grid"]


class Grid(ProposerSpec):
    """Spatial pyramid (Lazebnik et al. 2006): level n divides the image into n x n tiles; level 1 is the whole image.

    The levels 1, 2, 3 are the 14 tiles of MultiVLAD (Arandjelović and Zisserman 2013); 1, 2, 3, 4 with an `overlap` of
    one half are the 30 sub-patches of Razavian et al. (2014), whose sides are 2 / (n + 1) of the image's.
    """

    name: Literal["grid"] = "grid"
    paper: ClassVar[str] = "Lazebnik, Schmid, Ponce, Beyond bags of features: spatial pyramid matching, CVPR 2006"

    levels: tuple[PositiveInt, ...] = Field(default=(1, 2, 3), min_length=1, description="tiles on a side, by level")
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="the share of a tile's side that lies in the next tile"
    )

    def build(self, device: str, assets: Mapping[str, Path]) -> "GridProposer":  # noqa: ARG002 - no pixel is seen
        """The same for every device."""
        tiles = [tile for level in self.levels for tile in _tiles(level, self.overlap)]
        return GridProposer(np.array(tiles, np.float64))


class GridProposer:
    """The same tiles (R, 4), as shares of width and height, in every image."""

    def __init__(self, tiles: Array) -> None:
        self._tiles = tiles

    def propose(self, batch: ImageBatch) -> Regions:
        """All levels in their order, each row by row."""
        return regions_of([self._of(size) for size in batch.sizes])

    def _of(self, size: Int32s) -> Floats:
        height, width = size.tolist()
        return np.ascontiguousarray(self._tiles * (width, height, width, height), np.float32)


def _tiles(level: int, overlap: float) -> list[tuple[float, float, float, float]]:
    """The tiles of one level, as shares of the image's sides."""
    length = 1 + (level - 1) * (1 - overlap)
    # Without overlap, the end of a tile is to the last bit the start of the next: every place lies in exactly one.
    starts = [number * (1 - overlap) / length for number in range(level)]
    ends = [(number * (1 - overlap) + 1) / length for number in range(level)]
    ends[-1] = 1.0
    return [
        (left, top, right, bottom)
        for top, bottom in zip(starts, ends, strict=True)
        for left, right in zip(starts, ends, strict=True)
    ]
