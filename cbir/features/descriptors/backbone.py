"""Patches of any detector, described by a network for whole images."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cbir.features.backbone import Layers, NetworkSpec, errors_of
from cbir.features.descriptors.descriptor import Descriptor, DescriptorSpec
from cbir.features.weights import local_path

__all__ = ["BackboneDescriptor"]


class BackboneDescriptor(NetworkSpec, DescriptorSpec):
    """Convolutional features of detected patches (Fischer et al. 2014): averaged maps of any backbone, unit float32.

    A patch in colour is turned by the keypoint's angle, and an ellipse is made a circle. Backbone, weights, colours and
    `layers` are those of the extractor `deep`. Keypoints on a plain patch have no row.
    """

    name: Literal["backbone"] = "backbone"
    paper: ClassVar[str] = "Fischer, Dosovitskiy, Brox, Descriptor matching with convolutional neural networks, 2014"

    layers: Layers = Field(default=(), max_length=1, description="another layer than the last map")
    side: PositiveInt = Field(default=64, description="pixels of a patch as the network sees it")
    reach: PositiveFloat = Field(default=6.0, description="half the side of a patch, in scales of the keypoint")

    def build(self, device: str, assets: Mapping[str, Path]) -> Descriptor:
        """The network on the device; ConfigError for one that is not known, and for weights that are not its own."""
        from cbir.features.networks.backbone_patches import BackbonePatches

        with errors_of("descriptor"):
            return BackbonePatches(self, local_path("weights", self.weights, assets), device)
