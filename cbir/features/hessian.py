"""Blobs as maxima of the Hessian's determinant over places and scales."""

from dataclasses import dataclass

import cv2
import numpy as np

from cbir.features.keypoints import by_strength
from cbir.types import Array, Floats, Int64s, Pixels

__all__ = ["hessian_blobs"]

SIGMA = 1.6
"""The finest scale, in pixels."""

BORDER = 5
"""Pixels at the edges of each level that have no blob."""

ASSUMED_BLUR = 0.5
"""The standard deviation of what the camera has smoothed already."""


@dataclass(frozen=True)
class _Level:
    """A picture (H, W) float32, values 0 to 1, smoothed by `sigma` of its own pixels, which lie `stride` apart."""

    picture: Floats
    sigma: float
    stride: int


def hessian_blobs(grey: Pixels, threshold: float, edge_threshold: float, layers: int) -> Floats:
    """Maxima of sigma^4 (Lxx Lyy - Lxy^2) above a threshold, for values 0 to 1 (Lindeberg 1998; Mikolajczyk 2004).

    Circles (K, 5), a table of cbir.features.keypoints, by falling response. A maximum is above its 26 neighbours in an
    octave of so many layers, and refined by a parabola along each axis. `edge_threshold` is the most by which one
    principal curvature may exceed the other.
    """
    found = [np.empty((0, 5), np.float32)]
    base, stride = _first(grey), 1
    while min(base.shape) > 2 * BORDER:
        octave = _octave(base, stride, layers)
        found.append(_maxima(octave, threshold, edge_threshold, layers))
        base, stride = np.ascontiguousarray(octave[layers].picture[::2, ::2]), 2 * stride
    keypoints = np.concatenate(found)
    return keypoints[by_strength(keypoints)]


def _first(grey: Pixels) -> Floats:
    picture = grey.astype(np.float32) / 255
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), (SIGMA**2 - ASSUMED_BLUR**2) ** 0.5))


def _octave(base: Floats, stride: int, layers: int) -> list[_Level]:
    """Levels of doubling scale, and one more, so that all inner ones have neighbours."""
    made = [_Level(base, SIGMA, stride)]
    for number in range(1, layers + 2):
        before, sigma = made[-1], SIGMA * 2.0 ** (number / layers)
        smoothed = cv2.GaussianBlur(before.picture, (0, 0), (sigma**2 - before.sigma**2) ** 0.5)
        made.append(_Level(np.asarray(smoothed, np.float32), sigma, stride))
    return made


def _maxima(octave: list[_Level], threshold: float, edge_threshold: float, layers: int) -> Floats:
    """The blobs (K, 5) of an octave."""
    responses = np.stack([_determinant(level) for level in octave])
    highest = np.stack([cv2.dilate(response, np.ones((3, 3), np.uint8)) for response in responses])
    inner = responses[1:-1]
    is_peak = (inner > threshold) & (inner == highest[1:-1]) & (inner > highest[:-2]) & (inner > highest[2:])
    layer, row, column = (places.astype(np.int64) for places in is_peak.nonzero())
    layer += 1
    if len(layer):
        round_enough = _curvature_ratio(octave, layer, row, column) < (edge_threshold + 1) ** 2 / edge_threshold
        layer, row, column = (places[round_enough] for places in (layer, row, column))
    return _refined(responses, layer, row, column, octave[0].stride, layers)


def _determinant(level: _Level) -> Floats:
    """sigma^4 det of the Hessian; 0 near the edges."""
    picture = level.picture
    response = np.zeros_like(picture)
    if min(picture.shape) > 2 * BORDER:
        dxx = picture[1:-1, 2:] - 2 * picture[1:-1, 1:-1] + picture[1:-1, :-2]
        dyy = picture[2:, 1:-1] - 2 * picture[1:-1, 1:-1] + picture[:-2, 1:-1]
        dxy = (picture[2:, 2:] - picture[2:, :-2] - picture[:-2, 2:] + picture[:-2, :-2]) / 4
        inside = slice(BORDER - 1, 1 - BORDER)
        determinant = (dxx * dyy - dxy * dxy)[inside, inside]
        response[BORDER:-BORDER, BORDER:-BORDER] = np.float32(level.sigma**4) * determinant
    return response


def _curvature_ratio(octave: list[_Level], layer: Int64s, row: Int64s, column: Int64s) -> Array:
    """tr^2 / det (K,) of the Hessian at places whose determinant is above 0."""
    pictures = np.stack([level.picture for level in octave])

    def at(down: int, right: int) -> Array:
        return np.asarray(pictures[layer, row + down, column + right], np.float64)

    dxx, dyy = at(0, 1) - 2 * at(0, 0) + at(0, -1), at(1, 0) - 2 * at(0, 0) + at(-1, 0)
    dxy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    return np.asarray((dxx + dyy) ** 2 / (dxx * dyy - dxy**2))


def _refined(responses: Floats, layer: Int64s, row: Int64s, column: Int64s, stride: int, layers: int) -> Floats:
    """x, y, size, angle and response (K, 5) in pixels of the image."""
    peak = responses[layer, row, column].astype(np.float64)
    across = _offset(responses[layer, row, column - 1], peak, responses[layer, row, column + 1])
    down = _offset(responses[layer, row - 1, column], peak, responses[layer, row + 1, column])
    deep = _offset(responses[layer - 1, row, column], peak, responses[layer + 1, row, column])
    size = 2 * SIGMA * stride * 2.0 ** ((layer + deep) / layers)
    columns = (column + across) * stride, (row + down) * stride, size, np.zeros(len(peak)), peak
    return np.stack(columns, axis=1).astype(np.float32)


def _offset(before: Floats, peak: Array, after: Floats) -> Array:
    """Where the parabola through three values has its top, at most half a step from the middle one."""
    curvature = np.minimum(before.astype(np.float64) + after - 2 * peak, -1e-12)
    return np.asarray(np.clip((before.astype(np.float64) - after) / (2 * curvature), -0.5, 0.5))
