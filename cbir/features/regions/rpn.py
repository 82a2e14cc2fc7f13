"""Boxes of a region proposal network; the part that needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from cbir.features.regions.detector import DetectionSpec
from cbir.features.regions.proposer import Proposer

__all__ = ["Rpn"]


class Rpn(DetectionSpec):
    """Region proposal network (Ren et al. 2015): boxes of any class by falling objectness, after suppression.

    This is the first half of a Faster R-CNN: its classes are not looked at. Of the boxes of one size of anchors that
    overlap by more than `iou`, the best stays; then the best of all sizes are taken. The network sees the pixels that
    were decoded for the extractor and scales them as it was built to (`model_args: {min_size: 480, max_size: 640}`).
    """

    name: Literal["rpn"] = "rpn"
    paper: ClassVar[str] = "Ren, He, Girshick, Sun, Faster R-CNN: real-time object detection with RPN, NeurIPS 2015"

    score: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="the least objectness of a box")
    iou: Annotated[float, Field(gt=0, le=1)] = Field(default=0.7, description="the largest overlap with a better box")
    max_boxes: PositiveInt = Field(default=300, description="the most boxes, besides the whole image")
    whole: bool = Field(default=True, description="the whole image as first box")

    def build(self, device: str, assets: Mapping[str, Path]) -> Proposer:
        """The network on the device; weights that are a local path are found without `assets`.

        ConfigError for a model that is unknown or proposes nothing, and for weights that are missing or not its own.
        """
        from cbir.features.networks.detection import RpnProposer

        return RpnProposer(self, self.weights_file(assets), device)
