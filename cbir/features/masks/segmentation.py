"""Masks of a semantic segmentation; the part that needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cbir.features.masks.mask import Masker, MaskSpec

__all__ = ["Segmentation"]

VOC_MOVABLE = (2, 6, 7, 14, 15)


class Segmentation(MaskSpec):
    """Semantic mask: the probability that a place shows none of the classes `drop` (Long et al. 2015 for the networks).

    `model` is any segmentation model of torchvision, `weights` a file of its state (local path, `file://` or `s3://`;
    .safetensors, or .pth of tensors only), or `none` for a random network drawn from `seed`. torchvision's weights know
    the classes of Pascal VOC, of which what moves is dropped by default: bicycle, bus, car, motorbike, person.
    """

    name: Literal["segmentation"] = "segmentation"
    paper: ClassVar[str] = "Long, Shelhamer, Darrell, Fully convolutional networks for semantic segmentation, CVPR 2015"

    model: str = Field(
        examples=["lraspp_mobilenet_v3_large"], description="name of a segmentation model of torchvision"
    )
    model_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="further arguments of the model"
    )
    weights: str = Field(examples=["s3://models/streets.pth"], description="file of the weights, or none")
    seed: int = Field(default=0, description="of the random network without weights")
    num_classes: PositiveInt = Field(default=21, description="classes of the network, background included")
    drop: tuple[int, ...] = Field(default=VOC_MOVABLE, min_length=1, description="classes that are not wanted")
    size: PositiveInt = Field(default=520, description="the longest side that the network sees, in pixels")

    @model_validator(mode="after")
    def _classes_exist(self) -> Self:
        for number in self.drop:
            if not 0 <= number < self.num_classes:
                raise ValueError(f"drop: no class {number}; the classes are 0 to {self.num_classes - 1} (num_classes)")
        return self

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, unless they are random."""
        return {} if self.weights == "none" else {"weights": self.weights}

    def build(self, device: str, assets: Mapping[str, Path]) -> Masker:
        """The network on the device; weights that are a local path are found without `assets`.

        ConfigError for an unknown model, and for weights that are missing or not its own.
        """
        from cbir.features.networks.segmentation import SegmentationMasker

        local = {} if self.weights == "none" else {"weights": Path(self.weights.removeprefix("file://"))}
        return SegmentationMasker(self, {**local, **assets}.get("weights"), device)
