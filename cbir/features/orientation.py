"""The orientation of keypoints whose detector gives none: that of the dominant gradient around them."""

import cv2
import numpy as np
import numpy.typing as npt

from cbir.features.keypoints import frames
from cbir.features.opencv import grey
from cbir.features.patches import blocks, normalised_patches, pyramid
from cbir.types import Floats, Pixels

__all__ = ["with_dominant_angles"]

BINS = 36
SIDE, MARGIN = 27, 4  # the margin keeps the smoothing of one patch from the next
REACH = 6.5  # in scales; the histogram's weights have a std of 1.5
SMOOTHING, SMOOTHING_RADIUS = 1.5, 3  # in patch pixels, of which a scale has two


def with_dominant_angles(image: Pixels, keypoints: Floats) -> Floats:
    """The table with the angle of each keypoint's dominant gradient (Lowe 2004), in its normalised patch.

    One angle per keypoint: the highest peak of the histogram of 36 directions; 0 on a plain patch. For an ellipse the
    direction is found where the ellipse is a circle, so that it is the same after any affine transform.
    """
    levels = pyramid(grey(image))
    upright, angles = keypoints.copy(), np.empty(len(keypoints), np.float32)
    upright[:, 3] = 0.0
    for rows in blocks(len(keypoints)):
        patches = normalised_patches(levels, upright[rows], SIDE, REACH)
        angles[rows] = _in_image(upright[rows], _dominant(patches))
    upright[:, 3] = angles
    return upright


def _dominant(patches: Floats) -> npt.NDArray[np.float64]:
    """The dominant direction (K,) of patches (K, SIDE, SIDE), clockwise from the x axis in radians."""
    tall = cv2.GaussianBlur(patches.reshape(-1, SIDE), (2 * SMOOTHING_RADIUS + 1,) * 2, SMOOTHING)
    smooth = tall.reshape(patches.shape)[:, MARGIN - 1 : 1 - MARGIN, MARGIN - 1 : 1 - MARGIN]
    dx = smooth[:, 1:-1, 2:] - smooth[:, 1:-1, :-2]
    dy = smooth[:, 2:, 1:-1] - smooth[:, :-2, 1:-1]
    return _peak(_histogram(dx.reshape(len(patches), -1), dy.reshape(len(patches), -1)))


def _histogram(dx: Floats, dy: Floats) -> npt.NDArray[np.float64]:
    """Gradients (K, P) -> (K, BINS): magnitudes under a Gaussian window, shared by the two nearest directions."""
    magnitude, angle = cv2.cartToPolar(dx, dy)
    place = (angle * (BINS / (2 * np.pi))).astype(np.float64)
    below = np.floor(place).astype(np.int64)
    upper = magnitude * _WINDOW * (place - below)
    lower = magnitude * _WINDOW - upper
    first = np.arange(len(dx))[:, None] * BINS
    bins = np.concatenate([first + below % BINS, first + (below + 1) % BINS], axis=1).ravel()
    shares = np.concatenate([lower, upper], axis=1).ravel()
    histogram = np.asarray(np.bincount(bins, shares, len(dx) * BINS), np.float64).reshape(-1, BINS)
    for _ in range(2):
        histogram = (np.roll(histogram, 1, axis=1) + histogram + np.roll(histogram, -1, axis=1)) / 3
    return histogram


def _peak(histogram: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The direction (K,) of the highest bin, refined by the parabola through its neighbours."""
    rows, highest = np.arange(len(histogram)), histogram.argmax(axis=1)
    before, at, after = (histogram[rows, (highest + step) % BINS] for step in (-1, 0, 1))
    curvature = before - 2 * at + after
    offset = np.divide(before - after, 2 * curvature, out=np.zeros_like(at), where=curvature < 0)
    return np.asarray(np.where(at > 0, (highest + offset) * (2 * np.pi / BINS), 0.0))


def _in_image(upright: Floats, directions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The angle in the image, degrees in [0, 360), of keypoints whose patch is turned by these directions."""
    vertical = np.stack([-np.sin(directions), np.cos(directions)], axis=1)[:, :, None]
    x, y = (frames(upright) @ vertical)[:, :, 0].T
    return np.asarray(np.degrees(np.arctan2(-x, y)) % 360)


def _window() -> Floats:
    """Weights (P,) of the pixels that have a gradient: a Gaussian of 1.5 scales."""
    side = SIDE - 2 * MARGIN
    offsets = (np.arange(side) - (side - 1) / 2) * (2 * REACH / SIDE)
    profile = np.exp(-(offsets**2) / (2 * 1.5**2))
    return np.asarray(np.outer(profile, profile).ravel(), np.float32)


_WINDOW = _window()
