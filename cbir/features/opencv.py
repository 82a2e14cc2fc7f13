"""OpenCV's detectors and descriptors as ours: tables instead of objects, wherever this release keeps the algorithm."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import cv2
import numpy as np

from cbir.errors import ConfigError
from cbir.types import Array, Floats, Int64s, Pixels

__all__ = ["OpenCvDescriptor", "OpenCvDetector", "OpenCvOnePass", "algorithm", "from_opencv", "grey", "to_opencv"]

Octaves = Callable[[Floats, tuple[int, ...]], Sequence[int]]
_dtypes: dict[int, np.dtype[Any]] = {cv2.CV_8U: np.dtype(np.uint8), cv2.CV_32F: np.dtype(np.float32)}


def algorithm(name: str) -> Any:
    """A class or constant of OpenCV, which release 5 may have moved from `cv2` to `cv2.xfeatures2d`.

    ConfigError if this build lacks it.
    """
    found = getattr(cv2, name, None) or getattr(getattr(cv2, "xfeatures2d", None), name, None)
    if found is None:
        raise ConfigError(f"OpenCV {cv2.__version__} is built without {name}; install opencv-contrib-python-headless")
    return found


def grey(image: Pixels) -> Pixels:
    """Luma of an RGB image (H, W, 3) -> (H, W)."""
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), np.uint8)


def from_opencv(keypoints: Sequence[Any]) -> Floats:
    """The table (K, 5) of OpenCV's keypoints; where these have no angle (-1), it is 0."""
    table = np.empty((len(keypoints), 5), np.float32)
    if len(keypoints):
        table[:, :2] = cv2.KeyPoint.convert(keypoints)
    for column, field in enumerate(("size", "angle", "response"), start=2):
        table[:, column] = np.fromiter(map(attrgetter(field), keypoints), np.float32, len(keypoints))
    np.maximum(table[:, 3], 0.0, out=table[:, 3])
    return table


def to_opencv(table: Floats, octaves: Sequence[int] | None = None) -> list[Any]:
    """OpenCV's keypoints of a table (K, 5 or 7); the class id of each is its position."""
    levels = [0] * len(table) if octaves is None else octaves
    return list(map(cv2.KeyPoint, *table[:, :5].T.tolist(), levels, range(len(table))))


class OpenCvDetector:
    """A detector of OpenCV, on the luma; a picture with a side below `smallest`, on which it fails, has nothing."""

    def __init__(self, algorithm: Any, smallest: int = 1) -> None:
        self._algorithm, self._smallest = algorithm, smallest

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 5)."""
        if min(image.shape[:2]) < self._smallest:
            return np.empty((0, 5), np.float32)
        return from_opencv(self._algorithm.detect(grey(image), None))


class OpenCvDescriptor:
    """A descriptor of OpenCV, on the luma; of an ellipse it sees the circle of the same area.

    `octaves` gives what the algorithm expects as the octave of each keypoint of a table, in an image of a shape. In
    pictures with a shorter side than `smallest`, on which it fails, nothing can be described.
    """

    def __init__(self, algorithm: Any, octaves: Octaves | None = None, smallest: int = 1) -> None:
        self._algorithm, self._octaves, self._smallest = algorithm, octaves, smallest
        self.dim, self.dtype = int(algorithm.descriptorSize()), _dtypes[algorithm.descriptorType()]

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Array, Int64s]:
        """Rows (k, dim), and the positions (k,) of their keypoints."""
        return self.describe_grey(grey(image), keypoints)

    def describe_grey(self, picture: Pixels, keypoints: Floats) -> tuple[Array, Int64s]:
        """The same of a grey picture (H, W)."""
        no_rows = np.empty((0, self.dim), self.dtype), np.empty(0, np.int64)
        if not len(keypoints) or min(picture.shape) < self._smallest:
            return no_rows
        octaves = None if self._octaves is None else self._octaves(keypoints, picture.shape)
        # OpenCV drops keypoints near the border, and may change the order of the others.
        found, rows = self._algorithm.compute(picture, to_opencv(keypoints, octaves))
        if rows is None or not len(found):
            return no_rows
        positions = np.array([keypoint.class_id for keypoint in found], np.int64)
        order = np.argsort(positions)
        return rows[order], positions[order]


class OpenCvOnePass:
    """Detection and description by one algorithm of OpenCV, which then builds its scale space only once.

    Pictures with a shorter side than `smallest`, on which it fails, have nothing.
    """

    def __init__(self, algorithm: Any, smallest: int = 1) -> None:
        self._algorithm, self._smallest = algorithm, smallest
        self._no_rows = np.empty((0, algorithm.descriptorSize()), _dtypes[algorithm.descriptorType()])

    def detect_and_describe(self, image: Pixels) -> tuple[Floats, Array]:
        """Keypoints (K, 5) and their rows (K, dim)."""
        if min(image.shape[:2]) < self._smallest:
            return np.empty((0, 5), np.float32), self._no_rows
        keypoints, rows = self._algorithm.detectAndCompute(grey(image), None)
        return from_opencv(keypoints), self._no_rows if rows is None else rows
