"""Multi-pass extraction: an image and its patches, each through the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt

import cbir.features.regions  # noqa: F401 - registers the proposers that the field below chooses from
from cbir.features.backbone import errors_of
from cbir.features.deep import Deep
from cbir.features.extractor import Extractor, ExtractorSpec
from cbir.features.regions.grid import Grid
from cbir.features.regions.proposer import Proposer, ProposerSpec
from cbir.features.weights import files_of, identity_without_files
from cbir.images import View
from cbir.spec import one_of
from cbir.types import FeatureBatch, Floats, ImageBatch, Int32s, Pixels, Regions

if TYPE_CHECKING:
    AnyProposer = ProposerSpec
else:
    AnyProposer = one_of("proposer")

__all__ = ["MultiPass", "Patches", "PatchesSpec"]


class PatchesSpec(ExtractorSpec):
    """Configuration of an extractor that passes patches of an image through a network, one by one."""

    network: Deep = Field(examples=[{"backbone": "resnet50"}], description="what describes a patch: the fields of deep")
    patches: AnyProposer = Field(default=Grid(), description="where patches are; a spatial pyramid if not given")
    size: PositiveInt = Field(default=448, description="longest side of the picture that patches are cut from")

    @property
    def for_queries(self) -> Self:
        """With a network for queries."""
        return self.model_copy(update={"network": self.network.for_queries})

    @property
    def view(self) -> View:
        """The longest side at most `size`, never enlarged."""
        return View(size=self.size, fit="longest", oversampling=2)

    @property
    def batch_size(self) -> int:
        """As many as pass through an accelerator at a time; each has several patches."""
        return self.network.batch_size

    @property
    def assets(self) -> Mapping[str, str]:
        """Those of both, as `network.<field>` and `patches.<field>`."""
        return {
            f"{part}.{field}": uri
            for part, method in (("network", self.network), ("patches", self.patches))
            for field, uri in method.assets.items()
        }

    def identity(self) -> dict[str, Any]:
        """Fields and versions of all; files enter by their content, not by their path."""
        return {
            **super().identity(),
            "network": identity_without_files(self.network, self.network.assets),
            "patches": identity_without_files(self.patches, self.patches.assets),
        }

    def describer(self, device: str, assets: Mapping[str, Path]) -> "PatchDescriber":
        """Network and proposer on the device."""
        with errors_of("network"):
            network = self.network.build(device, files_of("network", assets))
        return PatchDescriber(network, self.patches.build(device, files_of("patches", assets)))


class MultiPass(PatchesSpec):
    """Multi-pass descriptors (Gong et al. 2014): those of an image's patches, pooled to one unit row, float32.

    Patches are cut from the picture at its `size` and passed through the `network` one by one; with the whole image as
    only patch that is the descriptor of `deep`. A component of the result is the largest or the mean of the patches.
    """

    name: Literal["multi_pass"] = "multi_pass"
    paper: ClassVar[str] = "Gong et al., Multi-scale orderless pooling of deep convolutional activation features, 2014"

    pool: Literal["max", "mean"] = Field(default="max", description="over the patches")

    def build(self, device: str, assets: Mapping[str, Path]) -> "MultiPassExtractor":
        """Network and proposer on the device."""
        return MultiPassExtractor(self, self.describer(device, assets))


class Patches(PatchesSpec):
    """Orderless patches (Gong et al. 2014): the descriptors of an image's patches as local features, float32.

    MOP-CNN is `vlad` over those of each level of a pyramid: one channel per level. Geometry is the centre of a patch,
    the root of its area and angle 0. A patch of a single colour has no row.
    """

    name: Literal["patches"] = "patches"
    local: ClassVar[bool] = True
    paper: ClassVar[str] = "Gong et al., Multi-scale orderless pooling of deep convolutional activation features, 2014"

    def build(self, device: str, assets: Mapping[str, Path]) -> "PatchesExtractor":
        """Network and proposer on the device."""
        return PatchesExtractor(self.describer(device, assets))


class PatchDescriber:
    """From images to the descriptors of their patches."""

    def __init__(self, network: Extractor, proposer: Proposer) -> None:
        self._network, self._proposer = network, proposer

    def describe(self, batch: ImageBatch) -> tuple[Regions, list[Pixels], Floats]:
        """The patches' boxes and pixels, and their rows (M, D)."""
        boxes = self._proposer.propose(batch)
        crops = [
            _crop(image, size, box)
            for i, (image, size) in enumerate(zip(batch.images, batch.sizes, strict=True))
            for box in boxes.of(i)
        ]
        sides = np.maximum(1, (boxes.boxes[:, 2:] - boxes.boxes[:, :2]).round()).astype(np.int32)
        patches = ImageBatch(np.arange(len(crops)), crops, np.ascontiguousarray(sides[:, ::-1]))
        return boxes, crops, self._network.extract(patches).descriptors


class MultiPassExtractor:
    """The rows of an image's patches, pooled."""

    def __init__(self, spec: MultiPass, describer: PatchDescriber) -> None:
        self._spec, self._describer = spec, describer

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """One row (N, D) float32 of length 1 per image."""
        boxes, _, rows = self._describer.describe(batch)
        descriptors = np.empty((len(batch), rows.shape[1]), np.float32)
        for i in range(len(batch)):
            descriptors[i] = self._pooled(rows[boxes.offsets[i] : boxes.offsets[i + 1]])
        return FeatureBatch.of_global(batch.image_ids, descriptors)

    def _pooled(self, rows: Floats) -> Floats:
        """(M, D) -> (D,); one row is returned as it is."""
        if len(rows) == 1:
            only: Floats = rows[0]
            return only
        exact = rows.astype(np.float64)
        pooled = exact.max(axis=0) if self._spec.pool == "max" else exact.mean(axis=0)
        unit: Floats = (pooled / max(float(np.linalg.norm(pooled)), 1e-12)).astype(np.float32)
        return unit


class PatchesExtractor:
    """The rows of an image's patches, as they are."""

    def __init__(self, describer: PatchDescriber) -> None:
        self._describer = describer

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Descriptors (K, D) float32, geometry (K, 4) float32 in pixels of the upright originals."""
        boxes, crops, rows = self._describer.describe(batch)
        every = FeatureBatch(batch.image_ids, boxes.offsets, rows, _geometry(boxes.boxes))
        # A plain patch shows nothing, and would match that of every other image.
        return every.take_rows(np.array([not (crop == crop[:1, :1]).all() for crop in crops], np.bool_))


def _crop(image: Pixels, original: Int32s, box: Floats) -> Pixels:
    """The pixels of a decoded image (H, W, 3) in a box of its original, at least one."""
    height, width = image.shape[:2]
    scale = np.array([width, height] * 2) / original[[1, 0, 1, 0]]
    left, top, right, bottom = (box * scale).round().astype(np.int64).tolist()
    left, top = min(left, width - 1), min(top, height - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]


def _geometry(boxes: Floats) -> Floats:
    """x, y, size and angle (M, 4) of boxes (M, 4)."""
    left, top, right, bottom = boxes.astype(np.float64).T
    size = np.sqrt((right - left) * (bottom - top))
    columns = (left + right - 1) / 2, (top + bottom - 1) / 2, size, np.zeros(len(boxes))
    return np.ascontiguousarray(np.stack(columns, axis=1), np.float32)
