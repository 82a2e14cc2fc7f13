"""SURF's fast-Hessian detector: the Hessian's determinant by boxes on an integral image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numba
import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from cbir.errors import ConfigError
from cbir.features.detectors.detector import Detector, DetectorSpec
from cbir.features.opencv import OpenCvDetector, algorithm, grey
from cbir.types import Array, Floats, Int64s, Pixels

__all__ = ["FastHessian", "FastHessianDetector", "OpenCvFastHessian", "box_hessian", "filter_sizes"]

LAYERS = 4
SIZE_PER_FILTER = 2 * 1.2 / 9  # the 9 x 9 filter stands for a Gaussian of scale 1.2; a size is two scales


class FastHessian(DetectorSpec):
    """Fast-Hessian (Bay et al. 2008): blobs, maxima in scale space of the determinant of box-filtered derivatives.

    `threshold` is for grey values 0 to 255, in the unit that OpenCV made usual. `implementation: opencv` takes OpenCV's
    detector, where the library was built with it.
    """

    name: Literal["fast_hessian"] = "fast_hessian"
    paper: ClassVar[str] = "Bay, Ess, Tuytelaars, Van Gool, SURF: speeded up robust features, CVIU 2008"

    threshold: NonNegativeFloat = 400.0
    octaves: PositiveInt = 4
    implementation: Literal["own", "opencv"] = "own"

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> Detector:  # noqa: ARG002
        """The detector; ConfigError if it is OpenCV's and this build has none."""
        return FastHessianDetector(self) if self.implementation == "own" else OpenCvFastHessian(self)


class OpenCvFastHessian:
    """OpenCV's detector, which calls the side of the filter a size."""

    def __init__(self, spec: FastHessian) -> None:
        try:
            surf = algorithm("SURF").create(spec.threshold, spec.octaves)
        except cv2.error:
            raise ConfigError(
                f"implementation: OpenCV {cv2.__version__} is built without SURF (OPENCV_ENABLE_NONFREE); set "
                "implementation: own, which does the same, or install a build that has it"
            ) from None
        self._detector = OpenCvDetector(surf)

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 5), angle 0."""
        keypoints = self._detector.detect(image)
        keypoints[:, 2:4] *= SIZE_PER_FILTER, 0.0
        return keypoints


class FastHessianDetector:
    """Octave by octave: four layers, maxima among 26 neighbours in the middle two, refined by a quadratic fit."""

    def __init__(self, spec: FastHessian) -> None:
        self._spec = spec

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 5), angle 0."""
        integral = cv2.integral(grey(image), sdepth=cv2.CV_64F)
        found = [np.empty((0, 5), np.float32)]
        for octave in range(self._spec.octaves):
            step, sizes = 2**octave, filter_sizes(octave)
            layers = np.stack([box_hessian(integral, size, step) for size in sizes])
            for middle in (1, 2):
                border = (sizes[middle + 1] // 2) // step + 1
                three = layers[middle - 1 : middle + 2]
                places = _maxima(three, border, self._spec.threshold)
                found.append(_refined(three, places, step, sizes[middle], sizes[middle] - sizes[middle - 1]))
        return np.concatenate(found)


def filter_sizes(octave: int) -> list[int]:
    """Sides of the box filters in pixels: 9, 15, 21, 27 in the first octave; steps double from octave to octave."""
    return [3 * (2 ** (octave + 1) * (layer + 1) + 1) for layer in range(LAYERS)]


@numba.njit(cache=True, nogil=True)
def _box(integral: Array, top: int, left: int, height: int, width: int) -> float:
    """The sum over a box, from an integral image."""
    bottom, right = top + height, left + width
    total: float = integral[bottom, right] - integral[bottom, left] - integral[top, right] + integral[top, left]
    return total


@numba.njit(cache=True, nogil=True)
def box_hessian(integral: Array, size: int, step: int) -> Floats:
    """Determinants Dxx Dyy - (0.9 Dxy)^2 at every `step`-th pixel, from an integral image (H + 1, W + 1).

    They are 0 where the filter, so many pixels a side, would leave the image. Derivatives are divided by the
    filter's area, times 81 / 15, so that those of the 9 x 9 filter are differences between the means of its boxes.
    """
    height, width = integral.shape[0] - 1, integral.shape[1] - 1
    lobe, half = size // 3, size // 2
    scale = 81 / 15 / (size * size)
    determinants = np.zeros(((height - 1) // step + 1, (width - 1) // step + 1), np.float32)
    for i in range(determinants.shape[0]):
        y = i * step
        if y < half or y + half >= height:
            continue
        for j in range(determinants.shape[1]):
            x = j * step
            if x < half or x + half >= width:
                continue
            long, short = 2 * lobe - 1, lobe // 2
            xx = _box(integral, y - lobe + 1, x - half, long, size)
            xx -= 3 * _box(integral, y - lobe + 1, x - short, long, lobe)
            yy = _box(integral, y - half, x - lobe + 1, size, long)
            yy -= 3 * _box(integral, y - short, x - lobe + 1, lobe, long)
            xy = _box(integral, y - lobe, x - lobe, lobe, lobe) + _box(integral, y + 1, x + 1, lobe, lobe)
            xy -= _box(integral, y - lobe, x + 1, lobe, lobe) + _box(integral, y + 1, x - lobe, lobe, lobe)
            determinants[i, j] = scale * scale * (xx * yy - 0.81 * xy * xy)
    return determinants


@numba.njit(cache=True, nogil=True)
def _maxima(layers: Floats, border: int, threshold: float) -> Int64s:
    """Row and column (M, 2) where the middle of three layers is above the threshold and all 26 neighbours."""
    height, width = layers.shape[1:]
    places = np.empty(((height // 2 + 1) * (width // 2 + 1), 2), np.int64)  # no two are neighbours
    count = 0
    for i in range(border, height - border):
        for j in range(border, width - border):
            value = layers[1, i, j]
            if value <= threshold:
                continue
            around = layers[:, i - 1 : i + 2, j - 1 : j + 2]
            if (around >= value).sum() == 1:
                places[count] = i, j
                count += 1
    return places[:count]


def _refined(layers: Floats, places: Int64s, step: int, size: int, size_step: int) -> Floats:
    """Keypoints (K, 5) at the peak of the quadratic through each maximum, where that is less than a sample away."""
    gradient, hessian, value = _derivatives(layers.astype(np.float64), places)
    regular = np.abs(np.linalg.det(hessian)) > np.finfo(np.float64).tiny
    hessian[~regular] = np.eye(3)
    layer, row, column = -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0].T
    x, y = step * (places[:, 1] + column), step * (places[:, 0] + row)
    sizes = SIZE_PER_FILTER * (size + size_step * layer)
    near = regular & (np.abs(layer) < 1) & (np.abs(row) < 1) & (np.abs(column) < 1)
    table = np.stack([x, y, sizes, np.zeros(len(x)), value], axis=1)
    return np.asarray(table[near], np.float32)


def _derivatives(layers: Any, places: Int64s) -> tuple[Array, Array, Array]:
    """Gradient (M, 3), Hessian (M, 3, 3) and value (M,) of three layers at places; axes are layer, row, column."""
    i, j = places.T
    cube = np.array([[[layers[a, i + b, j + c] for c in (-1, 0, 1)] for b in (-1, 0, 1)] for a in (0, 1, 2)])
    ahead, behind = (tuple(np.roll((side, 1, 1), axis) for axis in range(3)) for side in (2, 0))
    gradient = np.stack([(cube[tuple(p)] - cube[tuple(m)]) / 2 for p, m in zip(ahead, behind, strict=True)], axis=1)
    hessian = np.empty((len(places), 3, 3))
    for a in range(3):
        hessian[:, a, a] = cube[tuple(ahead[a])] - 2 * cube[1, 1, 1] + cube[tuple(behind[a])]
        for b in range(a):
            hessian[:, a, b] = hessian[:, b, a] = _mixed(np.moveaxis(cube, (a, b), (0, 1)))
    return gradient, hessian, cube[1, 1, 1]


def _mixed(cube: Array) -> Array:
    """The mixed second difference along the first two axes."""
    return np.asarray((cube[2, 2, 1] - cube[2, 0, 1] - cube[0, 2, 1] + cube[0, 0, 1]) / 4)
