"""Global descriptors of a convolutional network or a transformer; the part that needs no torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cbir.features.backbone import BackboneSpec
from cbir.features.extractor import Extractor
from cbir.features.pooling import GeM, PoolingSpec
from cbir.features.weights import local_path
from cbir.images import View
from cbir.spec import one_of

if TYPE_CHECKING:
    AnyPooling = PoolingSpec
else:
    AnyPooling = one_of("pooling")

__all__ = ["Deep"]


class Deep(BackboneSpec):
    """Pooled maps of any timm backbone, one l2-normalised float32 row per image (Radenović et al. 2019).

    `weights` is a file (local path, `file://` or `s3://`; .safetensors or a .pth of tensors only), `hub` for timm's
    default weights of the backbone, the tag of others (`a1_in1k`), or `none` for a random network drawn from `seed`.
    The classifier is not used and need not be in the file. Weights that come from TensorFlow need
    `backbone_args: {pad_type: same}`; `mean` and `std` (of pixels in 0..1) are those of timm unless given.

    With `fit: stretch` the network sees size x size pixels, at other scales the nearest multiple of `multiple_of`; with
    `fit: longest` the aspect ratio is kept and small pictures are not enlarged at scale 1. The descriptors of several
    `scales` are l2-normalised, then averaged by the power mean whose exponent is p for GeM and 1 for other poolings.

    `batch` images at a time pass through an accelerator, always as many (short batches are filled up), so that no
    image's descriptor depends on its neighbours. A CPU takes images one by one.
    """

    name: Literal["deep"] = "deep"
    paper: ClassVar[str] = "Radenović, Tolias, Chum, Fine-tuning CNN image retrieval with no human annotation, 2019"

    size: PositiveInt = 224
    fit: Literal["stretch", "longest"] = "stretch"
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    multiple_of: PositiveInt = 32
    pooling: AnyPooling = GeM()
    batch: PositiveInt = 16
    precision: Literal["float32"] = "float32"

    @property
    def view(self) -> View:
        """The size of the largest scale; smaller ones are made from it.

        Networks feel scaled JPEG decoding: without oversampling, MobileNetV2 at 224 px lost 0.017 mAP on 640 px photos.
        """
        return View(size=self.side(max(self.scales)), fit=self.fit, oversampling=2)

    @property
    def batch_size(self) -> int:
        """As many as pass through an accelerator at a time."""
        return self.batch

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

        return DeepExtractor(self, local_path("weights", self.weights, assets), device)
