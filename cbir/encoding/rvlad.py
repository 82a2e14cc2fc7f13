"""R-VLAD: the mean of the VLADs of an image's regions."""

from typing import ClassVar, Literal

import numpy as np

from cbir.encoding.residual_sums import Parts
from cbir.encoding.vlad_of_sums import SumsSpec
from cbir.types import Float64s

__all__ = ["RVlad"]


class RVlad(SumsSpec):
    """R-VLAD (Teichmann et al. 2019, Detect-to-Retrieve): rows of an image's regions -> one row (W*D), their mean.

    V_R = 1/R sum of gamma(X_r) V(X_r) with unit vectors gamma V of the regions: its inner product with a query's VLAD
    is the mean similarity of the regions. So it is no unit vector, and none should be made of it. Give `residual_sums`
    the setting `parts: regions`.
    """

    name: Literal["rvlad"] = "rvlad"
    paper: ClassVar[str] = "Teichmann et al., Detect-to-Retrieve, CVPR 2019"

    parts: ClassVar[Parts] = "regions"

    def output_rows(self, rows: int) -> int:  # noqa: ARG002 - always the same
        """One."""
        return 1

    def vectors(self, sums: Float64s) -> Float64s:
        """The mean of the regions' unit vectors."""
        return np.add.reduce(self.normalised(sums), axis=0, keepdims=True) / max(1, len(sums))
