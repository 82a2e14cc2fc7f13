"""MultiVLAD: VLADs of many tiles of an image, from the residual sums of the cells of one grid."""

from typing import ClassVar, Literal

import numpy as np

from cbir.encoding.residual_sums import GRID, Parts
from cbir.encoding.vlad_of_sums import SumsSpec
from cbir.errors import DataError
from cbir.types import Float64s, Floats, Int64s

__all__ = ["TILES", "MultiVlad"]


def _tiles() -> list[Int64s]:
    """The cells of every square tile, small tiles first, each level row by row: 9 + 4 + 1."""
    numbers = np.arange(GRID * GRID).reshape(GRID, GRID)
    return [
        numbers[top : top + side, left : left + side].ravel()
        for side in range(1, GRID + 1)
        for top in range(GRID - side + 1)
        for left in range(GRID - side + 1)
    ]


TILES = _tiles()
"""Which cells make each of the 14 tiles; the last one is the whole image."""


class MultiVlad(SumsSpec):
    """MultiVLAD (Arandjelović and Zisserman 2013): the nine rows of an image's cells -> 14 rows (W*D), one per tile.

    The tiles are the cells of a 3 x 3 grid, the four squares of 2 x 2 cells and the whole image, each the sum of its
    cells, so that an object that fills a part of the image is compared with a vector of about this part. A dense index
    takes the best of an image's rows. Give `residual_sums` the setting `parts: cells`.
    """

    name: Literal["multivlad"] = "multivlad"
    paper: ClassVar[str] = "Arandjelović and Zisserman, All about VLAD, CVPR 2013"

    parts: ClassVar[Parts] = "cells"

    def output_rows(self, rows: int) -> int:  # noqa: ARG002 - always the same
        """14."""
        return len(TILES)

    @property
    def located(self) -> bool:
        """Each is of a tile."""
        return True

    def vectors(self, sums: Float64s) -> Float64s:
        """The VLAD of every tile."""
        if len(sums) != GRID * GRID:
            raise DataError(
                f"an image has {len(sums)} rows of residual sums instead of {GRID * GRID}; "
                "set parts: cells in the residual_sums before multivlad"
            )
        return self.normalised(np.stack([np.add.reduce(sums[cells], axis=0) for cells in TILES]))

    def query_vectors(self, sums: Float64s) -> Float64s:
        """The whole query's alone: two small tiles with few features are alike too easily."""
        return self.vectors(sums)[-1:]

    def boxes(self, boxes: Floats) -> Floats:
        """From the first cell's left upper to the last one's right lower corner."""
        return np.stack([np.concatenate([boxes[cells[0], :2], boxes[cells[-1], 2:]]) for cells in TILES])
