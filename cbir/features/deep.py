"""Global descriptors of a convolutional network or a transformer; the part that needs no torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cbir.features.backbone import BackboneSpec, Layers
from cbir.features.blocks import one_weight_each
from cbir.features.extractor import Extractor
from cbir.features.pooling import GeM, PoolingSpec
from cbir.features.weights import files_of, identity_without_files, local_path
from cbir.images import View
from cbir.spec import one_of

if TYPE_CHECKING:
    AnyPooling = PoolingSpec
else:
    AnyPooling = one_of("pooling")

__all__ = ["Deep"]

PASSES = 2


class Deep(BackboneSpec):
    """Pooled maps of any timm backbone, one l2-normalised float32 row per image (Radenović et al. 2019).

    AlexNet, GoogLeNet, SqueezeNet, ShuffleNet and VGG of torchvision are there as `torchvision/alexnet` and so on.

    `weights` is a file (local path, `file://` or `s3://`; .safetensors or a .pth of tensors only), `hub` for timm's
    default weights of the backbone, the tag of others (`a1_in1k`), or `none` for a random network drawn from `seed`.
    The classifier is not used and need not be in the file. Weights that come from TensorFlow need
    `backbone_args: {pad_type: same}`; `mean` and `std` (of pixels in 0..1) are those of timm unless given.

    Other `layers` than the last map are taken by timm's number, by the name of a module, or as neural codes (Babenko et
    al. 2014): `layers: [fc6]`, `fc7` or `fc8` of AlexNet and VGG, which are not pooled. Several layers are computed in
    one pass and stand side by side, so that an inner product is the mean of their cosines, weighted by the squares of
    `layer_weights`.

    With `fit: stretch` the network sees size x size pixels, at other scales the nearest multiple of `multiple_of`; with
    `fit: longest` the aspect ratio is kept and small pictures are not enlarged at scale 1. The descriptors of several
    `scales` are l2-normalised, then averaged by the power mean whose exponent is p for GeM and 1 for other poolings.
    With `flip` the descriptor is the mean of those of the picture and of its mirror image, l2-normalised.
    A mask of the channel is multiplied with the maps before they are pooled.

    `batch` images at a time pass through an accelerator, always as many (short batches are filled up), so that no
    image's descriptor depends on its neighbours; if they do not fit into its memory, half as many from then on. A CPU
    takes images one by one.

    In `precision: bfloat16` or `float16` (GPUs only) the network computes with 16 bits; what follows it, and the rows,
    stay float32. A device without that arithmetic is refused rather than served otherwise, as rows would differ.
    `compile` makes a program of the network with torch.compile, which takes a minute at the start and a C++ compiler;
    `runtime: openvino` (extra `openvino`) makes one for CPUs in seconds. Both know images of one shape, `fit: stretch`.
    Queries are described in float32 without either: they need neither the hardware nor the wait.
    """

    name: Literal["deep"] = "deep"
    paper: ClassVar[str] = "Radenović, Tolias, Chum, Fine-tuning CNN image retrieval with no human annotation, 2019"

    size: PositiveInt = 224
    fit: Literal["stretch", "longest"] = "stretch"
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    multiple_of: PositiveInt = 32
    pooling: AnyPooling = GeM()
    layers: Layers = ()
    layer_weights: tuple[PositiveFloat, ...] = ()
    flip: bool = False
    batch: PositiveInt = 16
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    runtime: Literal["torch", "openvino"] = "torch"

    @model_validator(mode="after")
    def _weights_are_of_layers(self) -> Self:
        one_weight_each(self.layer_weights, len(self.layers), "layers")
        return self

    @model_validator(mode="after")
    def _programs_are_of_one_shape(self) -> Self:
        if self.compile and self.runtime == "openvino":
            raise ValueError("compile is torch's: remove it, or use runtime: torch")
        if self.fit != "stretch" and (self.compile or self.runtime == "openvino"):
            field = "compile" if self.compile else "runtime: openvino"
            raise ValueError(f"{field} makes a program for each shape of images: use fit: stretch, or do without")
        return self

    @property
    def for_queries(self) -> Self:
        """In float32, by torch as it is."""
        return self.model_copy(update={"precision": "float32", "compile": False, "runtime": "torch"})

    @property
    def weighs_places(self) -> bool:
        """Unless its pooling looks at directions only."""
        return self.pooling.weighs_places

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, and those of the pooling as `pooling.<field>`, where they are files."""
        return {**super().assets, **{f"pooling.{field}": uri for field, uri in self.pooling.assets.items()}}

    def identity(self) -> dict[str, Any]:
        """Fields and versions of both; the pooling's files enter by their content, not by their path."""
        return {**super().identity(), "pooling": identity_without_files(self.pooling, self.pooling.assets)}

    @property
    def view(self) -> View:
        """The size of the largest scale; smaller ones are made from it.

        Networks feel scaled JPEG decoding: without oversampling, MobileNetV2 at 224 px lost 0.017 mAP on 640 px photos.
        """
        return View(size=self.side(max(self.scales)), fit=self.fit, oversampling=2)

    @property
    def batch_size(self) -> int:
        """Several passes of an accelerator, so that the pixels of one travel while another is computed."""
        return PASSES * self.batch

    def side(self, scale: float) -> int:
        """The network's input at a scale, in pixels: both sides of a stretched image, the longest side otherwise."""
        pixels = self.size * scale
        if scale == 1 or self.fit == "longest":
            return max(1, round(pixels))
        return self.multiple_of * max(1, math.floor(pixels / self.multiple_of + 0.5))

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """The network on the device; weights that are a local path are found without `assets`.

        Raises ConfigError for an unknown backbone, and for weights that are missing, altered, unreadable or of another
        network.
        """
        from cbir.features.networks.descriptor import DeepExtractor

        pooling = self.pooling.build(device, files_of("pooling", assets))
        return DeepExtractor(self, local_path("weights", self.weights, assets), pooling, device)
