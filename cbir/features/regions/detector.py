"""Boxes of a trained object detector; the part that needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from cbir.features.regions.proposer import Proposer, ProposerSpec

__all__ = ["DetectionSpec", "Detector"]


class DetectionSpec(ProposerSpec):
    """Configuration of a proposer that runs a detection model of torchvision.

    `weights` is a file of its state (local path, `file://` or `s3://`; .safetensors, or .pth of tensors only), or
    `none` for a random network drawn from `seed`.
    """

    model: str = Field(examples=["fasterrcnn_resnet50_fpn"], description="name of a detection model of torchvision")
    model_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="further arguments of the model, for example {min_size: 480}"
    )
    weights: str = Field(examples=["s3://models/landmarks.pth"], description="file of the weights, or none")
    seed: int = Field(default=0, description="of the random network without weights")
    num_classes: PositiveInt = Field(default=91, description="classes of the network, background included")

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, unless they are random."""
        return {} if self.weights == "none" else {"weights": self.weights}

    def weights_file(self, assets: Mapping[str, Path]) -> Path | None:
        """The weights among the assets or at their own local path; None for a random network."""
        return None if self.weights == "none" else assets.get("weights", Path(self.weights.removeprefix("file://")))


class Detector(DetectionSpec):
    """Detected boxes (Detect-to-Retrieve, Teichmann et al. 2019): the whole image, then detections by falling score.

    `model` is any detection model of torchvision, `weights` a file of its state (local path, `file://` or `s3://`;
    .safetensors, or .pth of tensors only), or `none` for a random network drawn from `seed`. An image in which nothing
    is found has exactly one box, the whole image. The network sees the pixels that were decoded for the extractor and
    scales them as it was built to; `model_args` can change that (`{min_size: 480, max_size: 640}`).
    """

    name: Literal["detector"] = "detector"
    paper: ClassVar[str] = "Teichmann et al., Detect-to-Retrieve: efficient regional aggregation, CVPR 2019"

    classes: tuple[int, ...] | None = Field(default=None, description="labels of boxes to keep; all if not given")
    score: Annotated[float, Field(ge=0, le=1)] = Field(default=0.1, description="the least score of a box")
    max_boxes: PositiveInt = Field(default=20, description="the most boxes, besides the whole image")

    def build(self, device: str, assets: Mapping[str, Path]) -> Proposer:
        """The network on the device; weights that are a local path are found without `assets`.

        ConfigError for an unknown model, and for weights that are missing or not its own.
        """
        from cbir.features.networks.detection import DetectorProposer

        return DetectorProposer(self, self.weights_file(assets), device)
