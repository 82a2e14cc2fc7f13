"""Maximum poolings: of the whole map, of a pyramid of regions, of the tiles of a grid."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from cbir.features.pooling.pooling import PoolingSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BlockwiseMax", "Mac", "Rmac"]

OVERLAP = 0.4
STEPS = range(2, 8)


class Mac(PoolingSpec):
    """Maximum activations of convolutions (Tolias, Sicre, Jégou 2016): the largest value of each map."""

    name: Literal["mac"] = "mac"
    paper: ClassVar[str] = "Tolias, Sicre, Jégou, Particular object retrieval with integral max-pooling, ICLR 2016"

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        return maps.amax((-2, -1))


class Rmac(PoolingSpec):
    """Regional maximum activations (Tolias, Sicre, Jégou 2016): the sum of the l2-normalised MAC of square regions.

    Level l has squares of side 2 * min(H, W) / (l + 1), l of them along the shorter side of the map; along the longer
    one as many more as bring the overlap of neighbours at level 1 nearest to 0.4. Regions are not whitened.
    """

    name: Literal["rmac"] = "rmac"
    paper: ClassVar[str] = "Tolias, Sicre, Jégou, Particular object retrieval with integral max-pooling, ICLR 2016"

    levels: PositiveInt = 3
    whole: bool = Field(default=False, description="add the MAC of the whole map, as in Radenović et al. 2019")

    def regions(self, height: int, width: int) -> Iterator[tuple[int, list[int], list[int]]]:
        """Of each level, the side of its squares, their first rows and their first columns."""
        shorter = min(height, width)
        more_rows, more_columns = _more(height, shorter), _more(width, shorter)
        for level in range(1, self.levels + 1):
            side = 2 * shorter // (level + 1)
            if side:
                yield side, _starts(height - side, level + more_rows), _starts(width - side, level + more_columns)

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        from torch.nn.functional import max_pool2d, normalize

        summed = normalize(maps.amax((-2, -1))) if self.whole else maps.new_zeros(maps.shape[:2])
        for side, rows, columns in self.regions(*maps.shape[-2:]):
            # A maximum over a square is one over columns of maxima over rows.
            over_columns = max_pool2d(maps, (1, side), 1)[..., columns]
            peaks = max_pool2d(over_columns, (side, 1), 1)[..., rows, :]
            summed = summed + normalize(peaks).sum((-2, -1))
        return summed


class BlockwiseMax(PoolingSpec):
    """Blockwise maximum: the largest value of each map in every tile of a grid, concatenated over the tiles.

    Neighbouring tiles share a row or column of places where the grid does not divide the map.
    """

    name: Literal["blockwise_max"] = "blockwise_max"
    paper: ClassVar[str] = "Zheng, Yang, Tian, SIFT meets CNN: a decade survey of instance retrieval, TPAMI 2018"

    rows: PositiveInt = 2
    columns: PositiveInt = 2

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, rows * columns * C), tile by tile."""
        from torch.nn.functional import adaptive_max_pool2d

        peaks: Tensor = adaptive_max_pool2d(maps, (self.rows, self.columns))
        return peaks.flatten(2).transpose(1, 2).flatten(1)


def _more(length: int, shorter: int) -> int:
    """How many more squares there are along this side of the map than along the shorter one."""
    if length == shorter:
        return 0
    overlaps = {steps: 1 - (length - shorter) / (steps - 1) / shorter for steps in STEPS}
    return min(STEPS, key=lambda steps: abs(overlaps[steps] - OVERLAP)) - 1


def _starts(room: int, number: int) -> list[int]:
    """Where so many squares begin that share the room that one of them leaves; from 0 to `room`."""
    return [place * room // max(1, number - 1) for place in range(number)]
