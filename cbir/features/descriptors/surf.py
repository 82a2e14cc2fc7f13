"""The SURF descriptor."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import numba
import numpy as np

from cbir.features.descriptors.descriptor import DescriptorSpec
from cbir.features.keypoints import frames
from cbir.features.opencv import grey
from cbir.types import Array, Floats, Int64s, Pixels

__all__ = ["Surf", "SurfDescriptor"]

DIM = 64
CELLS, SAMPLES = 4, 5  # per side of the window, and of a cell
SMALLEST = 2  # pixels of a side: a wavelet has two halves
WINDOW_STD = 3.3  # in scales


class Surf(DescriptorSpec):
    """SURF (Bay et al. 2008): Σdx, Σdy, Σ|dx| and Σ|dy| of Haar wavelets in 4 x 4 cells, unit rows of 64 dimensions.

    The window is 20 scales wide, turned by the keypoint's angle; wavelets are two scales wide, along the image's axes.
    The window of an ellipse is stretched as the ellipse is. Needs no OpenCV with SURF.
    """

    name: Literal["surf"] = "surf"
    paper: ClassVar[str] = "Bay, Ess, Tuytelaars, Van Gool, SURF: speeded up robust features, CVIU 2008"

    def build(self, device: str, assets: Mapping[str, Path]) -> "SurfDescriptor":  # noqa: ARG002 - runs on the CPU
        """Our own, on an integral image."""
        return SurfDescriptor()


class SurfDescriptor:
    """SURF on an integral image."""

    dim, dtype = DIM, np.dtype(np.float32)

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Floats, Int64s]:
        """Rows (K, 64) of all keypoints, 0 on a plain patch; none in a picture of one row or column."""
        if min(image.shape[:2]) < SMALLEST:
            return np.empty((0, DIM), np.float32), np.empty(0, np.int64)
        integral = cv2.integral(grey(image), sdepth=cv2.CV_64F)
        sums = _sums(integral, keypoints[:, :2].astype(np.float64), frames(keypoints), keypoints[:, 2] / 2)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        rows = np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0).astype(np.float32)
        return rows, np.arange(len(keypoints), dtype=np.int64)


@numba.njit(cache=True, nogil=True)
def _mean(integral: Array, top: int, left: int, bottom: int, right: int) -> float:
    """The mean over the part of a box that lies in the image; some of it must."""
    top, bottom = max(top, 0), min(bottom, integral.shape[0] - 1)
    left, right = max(left, 0), min(right, integral.shape[1] - 1)
    total = integral[bottom, right] - integral[bottom, left] - integral[top, right] + integral[top, left]
    mean: float = total / ((bottom - top) * (right - left))
    return mean


@numba.njit(cache=True, nogil=True)
def _sums(integral: Array, places: Array, transforms: Array, scales: Array) -> Array:
    """The sums (K, 64) around places (K, 2), in the frames (K, 2, 2) of keypoints of these scales (K,)."""
    rows = np.zeros((len(places), DIM))
    height, width = integral.shape[0] - 1, integral.shape[1] - 1
    side = CELLS * SAMPLES
    for k in range(len(places)):
        frame, half = transforms[k], max(1, round(scales[k]))
        for sample in range(side * side):
            u, v = sample % side - (side - 1) / 2, sample // side - (side - 1) / 2
            # Outside, the image goes on as at its border: there a wavelet keeps a pixel on each side of its middle.
            x = min(max(int(np.floor(places[k, 0] + frame[0, 0] * u + frame[0, 1] * v + 1.0)), 1), width - 1)
            y = min(max(int(np.floor(places[k, 1] + frame[1, 0] * u + frame[1, 1] * v + 1.0)), 1), height - 1)
            across = _mean(integral, y - half, x, y + half, x + half)
            across -= _mean(integral, y - half, x - half, y + half, x)
            down = _mean(integral, y, x - half, y + half, x + half)
            down -= _mean(integral, y - half, x - half, y, x + half)
            weight = np.exp(-(u * u + v * v) / (2 * WINDOW_STD**2)) / scales[k]
            dx = weight * (frame[0, 0] * across + frame[1, 0] * down)
            dy = weight * (frame[0, 1] * across + frame[1, 1] * down)
            first = 4 * (sample // side // SAMPLES * CELLS + sample % side // SAMPLES)
            rows[k, first] += dx
            rows[k, first + 1] += dy
            rows[k, first + 2] += abs(dx)
            rows[k, first + 3] += abs(dy)
    return rows
