"""Local features from any detector and any descriptor."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt, model_validator

import cbir.features.descriptors
import cbir.features.detectors  # noqa: F401 - the two packages register the methods that the fields below choose from
from cbir.features.descriptors.descriptor import DescriptorSpec
from cbir.features.detectors.detector import DetectorSpec
from cbir.features.extractor import ExtractorSpec
from cbir.features.keypoints import by_strength, geometry_of, in_original_pixels, strongest_first
from cbir.features.orientation import with_dominant_angles
from cbir.features.weights import files_of, identity_without_files
from cbir.images import View
from cbir.spec import one_of
from cbir.types import Array, FeatureBatch, Floats, ImageBatch, Pixels

if TYPE_CHECKING:
    AnyDetector = DetectorSpec
    AnyDescriptor = DescriptorSpec
else:
    AnyDetector, AnyDescriptor = one_of("detector"), one_of("descriptor")

__all__ = ["Local", "LocalExtractor"]


class Local(ExtractorSpec):
    """Local features (Mikolajczyk et al. 2005): keypoints of a detector, each described by a descriptor.

    Of an image, the `max_features` keypoints of highest response that can be described; of equal ones, the uppermost.
    Geometry is x, y, size (twice the scale), angle in degrees, and for a detector of ellipses the axis ratio and the
    direction of the major axis. Where the detector gives no angles, keypoints get that of their dominant gradient,
    or 0 if the descriptor finds an orientation itself. `upright` (gravity vector, Perdoch et al. 2009) takes angle 0
    everywhere, so that each place has one keypoint.
    """

    name: Literal["local"] = "local"
    local: ClassVar[bool] = True
    paper: ClassVar[str] = "Mikolajczyk et al., A comparison of affine region detectors, IJCV 2005"

    detector: AnyDetector = Field(examples=[{"name": "mser"}])
    """Where keypoints are."""
    descriptor: AnyDescriptor = Field(examples=[{"name": "sift"}])
    """What is around each."""
    max_features: PositiveInt = 1000
    upright: bool = False
    size: PositiveInt = 1024

    @model_validator(mode="after")
    def _upright_is_possible(self) -> "Local":
        if self.upright and self.descriptor.turns_by_itself:
            raise ValueError(
                "upright: this descriptor follows an orientation that it finds itself; choose another, or set its "
                "`oriented` to false where it has that"
            )
        return self

    @property
    def view(self) -> View:
        """The longest side at most `size`, never enlarged."""
        return View(size=self.size, fit="longest")

    @property
    def assets(self) -> Mapping[str, str]:
        """Those of both, as `detector.<field>` and `descriptor.<field>`."""
        return {
            f"{part}.{field}": uri
            for part, method in (("detector", self.detector), ("descriptor", self.descriptor))
            for field, uri in method.assets.items()
        }

    def identity(self) -> dict[str, Any]:
        """Fields and versions of all three; files enter by their content, not by their path."""
        return {
            **super().identity(),
            "detector": identity_without_files(self.detector, self.detector.assets),
            "descriptor": identity_without_files(self.descriptor, self.descriptor.assets),
        }

    def build(self, device: str, assets: Mapping[str, Path]) -> "LocalExtractor":
        """Detector and descriptor on the device."""
        return LocalExtractor(self, device, assets)


class LocalExtractor:
    """A detector, a descriptor, and between them the choice of keypoints, in an order that only pixels determine."""

    def __init__(self, spec: Local, device: str, assets: Mapping[str, Path]) -> None:
        self._spec = spec
        self._columns = 6 if spec.detector.affine else 4
        self._detector = spec.detector.build(device, files_of("detector", assets), spec.max_features)
        self._descriptor = spec.descriptor.build(device, files_of("descriptor", assets))
        # Upright keypoints change between detection and description.
        self._one_pass = None if spec.upright else spec.descriptor.one_pass(spec.detector, spec.max_features)

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Descriptors (K, D), geometry (K, 4 or 6) float32 in pixels of the upright originals."""
        if not len(batch):
            no_rows = self._no_rows(), np.empty((0, self._columns), np.float32)
            return FeatureBatch(batch.image_ids, np.zeros(1, np.int64), *no_rows)
        rows = [self._features(*pair) for pair in zip(batch.images, batch.sizes, strict=True)]
        descriptors, geometry = zip(*rows, strict=True)
        return FeatureBatch.of_images(batch.image_ids, descriptors, geometry)

    def _features(self, image: Pixels, original_size: npt.NDArray[np.int32]) -> tuple[Array, Floats]:
        contiguous = np.ascontiguousarray(image)
        descriptors, keypoints = self._at_once(contiguous) if self._one_pass else self._in_turn(contiguous)
        return descriptors, in_original_pixels(geometry_of(keypoints), image.shape[:2], original_size)

    def _at_once(self, image: Pixels) -> tuple[Array, Floats]:
        assert self._one_pass is not None
        keypoints, descriptors = self._one_pass.detect_and_describe(image)
        best = by_strength(keypoints)
        best = best[descriptors[best].any(axis=1)][: self._spec.max_features]
        return descriptors[best], keypoints[best]

    def _in_turn(self, image: Pixels) -> tuple[Array, Floats]:
        """The strongest keypoints until there are enough: some, near the border or on a plain patch, have no row."""
        candidates, limit = self._candidates(image), self._spec.max_features
        descriptors, keypoints = [self._no_rows()], [candidates[:0]]
        for block in strongest_first(candidates, limit):
            chosen = self._oriented(image, block)
            rows, described = self._descriptor.describe(image, chosen)
            not_plain = rows.any(axis=1)
            descriptors.append(rows[not_plain])
            keypoints.append(chosen[described[not_plain]])
            if sum(map(len, keypoints)) >= limit:
                break
        return np.concatenate(descriptors)[:limit], np.concatenate(keypoints)[:limit]

    def _candidates(self, image: Pixels) -> Floats:
        keypoints = self._detector.detect(image)
        if not self._spec.upright or not self._spec.detector.oriented:
            return keypoints
        keypoints[:, 3] = 0.0
        ordered = keypoints[by_strength(keypoints)]
        return ordered[np.unique(geometry_of(ordered), axis=0, return_index=True)[1]]

    def _oriented(self, image: Pixels, keypoints: Floats) -> Floats:
        spec = self._spec
        if spec.upright or spec.detector.oriented or spec.descriptor.turns_by_itself:
            return keypoints
        return with_dominant_angles(image, keypoints)

    def _no_rows(self) -> Array:
        return np.empty((0, self._descriptor.dim), self._descriptor.dtype)
