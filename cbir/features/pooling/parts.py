"""Part-based descriptors: a vector for each part of the image."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cbir.features.pooling.pooling import PoolingSpec, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Parts"]

Share = Annotated[float, Field(ge=0, le=1)]


class Parts(PoolingSpec):
    """Part-based descriptor (Sun et al. 2018): the mean of each part's places, l2-normalised, concatenated.

    A part's heatmap is 1 inside its box, and at the border the part of a place that lies inside. Parts in which the
    maps show nothing add nothing to a similarity. One part leaves out all that is beside it, such as a caption.
    """

    name: Literal["parts"] = "parts"
    paper: ClassVar[str] = "Sun, Zheng, Yang, Tian, Wang, Beyond part models: person retrieval, ECCV 2018"

    boxes: tuple[tuple[Share, Share, Share, Share], ...] = Field(
        default=((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)), min_length=1
    )
    """Left, top, right and bottom of each part, as parts of the image's sides; the upper and lower half by default."""

    @model_validator(mode="after")
    def _boxes_have_an_area(self) -> Self:
        for left, top, right, bottom in self.boxes:
            if left >= right or top >= bottom:
                raise ValueError(
                    f"boxes: [{left:g}, {top:g}, {right:g}, {bottom:g}] is empty; give left, top, right, bottom"
                )
        return self

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, M * C) for M parts."""
        import torch
        from torch.nn.functional import normalize

        parts = [weighted_mean(maps, _heatmap(maps, *box)) for box in self.boxes]
        return torch.cat([normalize(part) for part in parts], 1)


def _heatmap(maps: "Tensor", left: float, top: float, right: float, bottom: float) -> "Tensor":
    """The part of every place of maps that lies inside the box: (1, 1, H, W)."""
    height, width = maps.shape[-2:]
    inside = _inside(maps, top, bottom, height)[:, None] * _inside(maps, left, right, width)
    return inside[None, None]


def _inside(maps: "Tensor", first: float, last: float, number: int) -> "Tensor":
    """The part of each of so many places on a side, from 0 to 1, that lies between first and last."""
    starts = maps.new_tensor(range(number))
    return ((starts + 1).clamp(max=last * number) - starts.clamp(min=first * number)).clamp(min=0)
