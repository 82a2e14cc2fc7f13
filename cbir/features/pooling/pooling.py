"""The role of a pooling: feature maps in, one vector per image out.

Importing this imports no torch: a pooling mostly calls methods of the tensor that it is given.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cbir.spec import Method

if TYPE_CHECKING:
    from torch import Tensor

    Pooling = Callable[[Tensor], Tensor]
else:
    Pooling = Callable
"""A working pooling: maps (N, C, H, W) -> vectors (N, D), each a function of its own image alone."""

__all__ = ["Pooling", "PoolingSpec", "weighted_mean"]


class PoolingSpec(Method):
    """Configuration of a pooling, and, where it has no weights, the pooling itself. Vectors need not have length 1."""

    role: ClassVar[str] = "pooling"
    weighs_places: ClassVar[bool] = True
    """Whether a place whose vector is made shorter counts less, so that a mask can be multiplied with the maps."""

    @property
    def scale_power(self) -> float:
        """The exponent of the power mean over the scales of one image; 1 where descriptors may be negative."""
        return 1.0

    @property
    def assets(self) -> Mapping[str, str]:
        """Files that the pooling needs (weights): field name -> local path or `s3://` URI."""
        return {}

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, D)."""
        raise NotImplementedError

    def build(self, device: str, assets: Mapping[str, Path]) -> Pooling:  # noqa: ARG002 - for those with weights
        """The working pooling on a torch device ("cpu", "cuda"), with its assets as local files; `pool` by default."""
        return self.pool


def weighted_mean(maps: "Tensor", weights: "Tensor") -> "Tensor":
    """The mean of the places of maps (N, C, H, W) by weights (N, 1, H, W) of at least 0; 0 where they are all 0."""
    mean: Tensor = (maps * weights).sum((-2, -1)) / weights.sum((-2, -1)).clamp(min=1e-12)
    return mean
