"""RootSIFT: the Hellinger kernel for SIFT."""

from typing import ClassVar, Literal

import numpy as np

from cbir.encoding.normalise import RowwiseSpec, signed_power
from cbir.types import Array, Float64s

__all__ = ["RootSift"]


class RootSift(RowwiseSpec):
    """RootSIFT (Arandjelović and Zisserman 2012): sqrt(x / |x|_1).

    The rows are unit vectors, and their inner product is the Hellinger kernel of the histograms. A row without gradient
    (all zero) stays zero; negative components, which SIFT has not, keep their sign.
    """

    name: Literal["rootsift"] = "rootsift"
    paper: ClassVar[str] = "Arandjelović and Zisserman, Three things everyone should know, CVPR 2012"

    def transform(self, rows: Array) -> Float64s:
        """sqrt(x / |x|_1)."""
        wide = rows.astype(np.float64)
        sums = np.add.reduce(np.abs(wide), axis=1, keepdims=True)
        np.divide(wide, sums, out=wide, where=sums > 0)
        return signed_power(wide, 0.5)
