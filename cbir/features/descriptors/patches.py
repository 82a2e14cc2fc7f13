"""Descriptors of normalised patches: small networks, and the hand-made multiple kernels."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from cbir.features.descriptors.descriptor import Descriptor, DescriptorSpec
from cbir.features.weights import Sha256, file_or_none, is_file, local_path, present

__all__ = ["HardNet", "Mkd", "PatchNetworkSpec", "PatchSpec", "SosNet", "TFeat"]


class PatchSpec(DescriptorSpec):
    """Configuration of a descriptor of grey patches of 32 x 32 pixels; its rows are unit vectors, float32.

    A patch is turned by the keypoint's angle, and an ellipse is made a circle. Keypoints on a plain patch have no row.
    """

    reach: PositiveFloat = 6.0
    """Half the side of a patch, in scales of the keypoint (halves of its size)."""


class PatchNetworkSpec(PatchSpec):
    """Configuration of a network for patches, whose weights are a file that kornia can read."""

    source: ClassVar[str]
    """Where a file of weights can be had."""

    weights: str = Field(examples=["none"])
    """A file (local path, `file://` or `s3://`; of tensors only), or `none` for a random network."""
    weights_sha256: Sha256 | None = None
    seed: int = 0
    """Of random weights."""

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        file_or_none(self.weights, self.source)
        return self

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, where they are a file."""
        return {"weights": self.weights} if is_file(self.weights) else {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Descriptor:
        """The network on the device; ConfigError for weights that are missing, altered or of another network."""
        from cbir.features.networks.patches import PatchDescriptor, patch_network

        path = present(local_path("weights", self.weights, assets), "extractor.descriptor.weights", self.source)
        return PatchDescriptor(patch_network(self, path), self.reach, device)


class HardNet(PatchNetworkSpec):
    """HardNet (Mishchuk et al. 2017): 128 dimensions, trained with the hardest negative of each batch."""

    name: Literal["hardnet"] = "hardnet"
    paper: ClassVar[str] = "Mishchuk et al., Working hard to know your neighbor's margins, NeurIPS 2017"
    source: ClassVar[str] = "checkpoint_liberty_with_aug.pth of https://github.com/DagnyT/hardnet"


class SosNet(PatchNetworkSpec):
    """SOSNet (Tian et al. 2019): 128 dimensions, trained with second-order similarity."""

    name: Literal["sosnet"] = "sosnet"
    paper: ClassVar[str] = "Tian et al., SOSNet: second order similarity regularization, CVPR 2019"
    source: ClassVar[str] = "sosnet_32x32_liberty.pth of https://github.com/yuruntian/SOSNet"


class TFeat(PatchNetworkSpec):
    """TFeat (Balntas et al. 2016): 128 dimensions, two layers trained with triplets; made unit vectors."""

    name: Literal["tfeat"] = "tfeat"
    paper: ClassVar[str] = "Balntas et al., Learning local feature descriptors with triplets, BMVC 2016"
    source: ClassVar[str] = "tfeat-liberty.params of https://github.com/vbalnt/tfeat"


class Mkd(PatchSpec):
    """Multiple kernel local descriptor (Mukundan et al. 2019): hand-made, no weights.

    Gradients are embedded by kernels of their direction and of their place, in polar coordinates (175 dimensions),
    Cartesian ones (63) or both (238). The paper whitens them: use `pca` with `whiten`.
    """

    name: Literal["mkd"] = "mkd"
    paper: ClassVar[str] = "Mukundan, Tolias, Bursuc, Jégou, Chum, Understanding and improving kernel local descriptors"

    kernels: Literal["polar", "cart", "concat"] = "concat"

    def build(self, device: str, assets: Mapping[str, Path]) -> Descriptor:  # noqa: ARG002 - needs no files
        """The kernels on the device."""
        from cbir.features.networks.patches import PatchDescriptor, multiple_kernels

        return PatchDescriptor(multiple_kernels(self.kernels), self.reach, device)
