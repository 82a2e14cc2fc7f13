"""SIFT: keypoints of the difference-of-Gaussians scale space and their gradient histograms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from cbir.features.extractor import ExtractorSpec
from cbir.images import View
from cbir.types import Array, FeatureBatch, Floats, ImageBatch, Pixels

__all__ = ["Sift", "SiftExtractor"]

DIM = 128
LAYERS_PER_OCTAVE = 3


class Sift(ExtractorSpec):
    """SIFT (Lowe 2004): the `max_features` keypoints of highest contrast, uint8 descriptors of 128 dimensions.

    Geometry is x, y, size (diameter), angle in degrees, clockwise from the x axis. A place with several dominant
    orientations gives a keypoint for each. `upright` (gravity vector, Perdoch et al. 2009) takes angle 0 everywhere, so
    that each place has one keypoint: better where pictures are taken upright. A picture may have no keypoint.
    """

    name: Literal["sift"] = "sift"
    local: ClassVar[bool] = True
    paper: ClassVar[str] = "Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004"

    max_features: PositiveInt = 1000
    upright: bool = False
    contrast_threshold: NonNegativeFloat = 0.04
    edge_threshold: PositiveFloat = 10.0
    sigma: PositiveFloat = 1.6
    size: PositiveInt = 1024

    @property
    def view(self) -> View:
        """The longest side at most `size`, never enlarged."""
        return View(size=self.size, fit="longest")

    def build(self, device: str, assets: Mapping[str, Path]) -> "SiftExtractor":  # noqa: ARG002 - runs on the CPU
        """An extractor on the CPU, whatever the device."""
        return SiftExtractor(self)


class SiftExtractor:
    """OpenCV's SIFT with an exact number of keypoints in an order that only the pixels determine."""

    def __init__(self, spec: Sift) -> None:
        self._spec = spec
        # Upright keypoints are chosen after those at the same place have become one, so all are needed first.
        # The precise upscaling removes a shift of a quarter pixel that is not the same for a rotated picture.
        self._sift = cv2.SIFT.create(
            0 if spec.upright else spec.max_features,
            LAYERS_PER_OCTAVE,
            spec.contrast_threshold,
            spec.edge_threshold,
            spec.sigma,
            cv2.CV_8U,
            True,
        )

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Descriptors (K, 128) uint8, geometry (K, 4) float32 in pixels of the upright originals."""
        if not len(batch):
            no_rows = np.empty((0, DIM), np.uint8), np.empty((0, 4), np.float32)
            return FeatureBatch(batch.image_ids, np.zeros(1, np.int64), *no_rows)
        rows = [self._features(*pair) for pair in zip(batch.images, batch.sizes, strict=True)]
        descriptors, geometry = zip(*rows, strict=True)
        return FeatureBatch.of_images(batch.image_ids, descriptors, geometry)

    def _features(self, image: Pixels, original_size: npt.NDArray[np.int32]) -> tuple[Pixels, Floats]:
        grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
        keypoints, descriptors = self._detect_upright(grey) if self._spec.upright else self._detect(grey)
        if not len(keypoints):
            return np.empty((0, DIM), np.uint8), np.empty((0, 4), np.float32)
        return descriptors, _in_original_pixels(_table(keypoints)[:, :4], image.shape[:2], original_size)

    def _detect(self, grey: Array) -> tuple[Sequence[Any], Any]:
        keypoints, descriptors = self._sift.detectAndCompute(grey, None)
        # OpenCV returns more than it was asked for where responses tie at the threshold.
        best = _by_strength(_table(keypoints))[: self._spec.max_features]
        return [keypoints[i] for i in best], None if descriptors is None else descriptors[best]

    def _detect_upright(self, grey: Array) -> tuple[Sequence[Any], Any]:
        keypoints = self._sift.detect(grey, None)
        table = _table(keypoints)
        order = _by_strength(table)
        _, first = np.unique(table[order, :2], axis=0, return_index=True)
        best = [keypoints[i] for i in order[np.sort(first)[: self._spec.max_features]]]
        for keypoint in best:
            keypoint.angle = 0.0
        # OpenCV fails on an empty list.
        return self._sift.compute(grey, best) if best else ([], None)


def _table(keypoints: Any) -> Floats:
    """x, y, size, angle and response of each keypoint (K, 5)."""
    rows = [(*keypoint.pt, keypoint.size, keypoint.angle, keypoint.response) for keypoint in keypoints]
    return np.array(rows, np.float32).reshape(-1, 5)


def _by_strength(table: Floats) -> npt.NDArray[np.intp]:
    """Positions by falling response; ties by row, column, size and angle."""
    x, y, size, angle, response = table.T
    return np.lexsort((angle, size, x, y, -response))


def _in_original_pixels(
    geometry: Floats, decoded_size: tuple[int, ...], original_size: npt.NDArray[np.int32]
) -> Floats:
    """Geometry (K, 4) of the decoded image in pixels of the original; a pixel's centre has whole coordinates."""
    scale_y, scale_x = original_size / decoded_size
    x, y, size, angle = geometry.T.astype(np.float64)
    columns = ((x + 0.5) * scale_x - 0.5, (y + 0.5) * scale_y - 0.5, size * np.sqrt(scale_x * scale_y), angle)
    return np.ascontiguousarray(np.stack(columns, axis=1), np.float32)
