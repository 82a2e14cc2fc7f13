"""Keypoints as tables: one row per keypoint, so that detectors, descriptors and extractors need no objects of OpenCV.

Columns: x, y, size, angle, response, and for ellipses the axis ratio and the direction. A pixel's centre has whole
coordinates. `size` is twice the scale: a blob's or region's standard deviation times two, in pixels. `angle`, clockwise
in degrees, is how far the keypoint's own vertical is turned from that of the image. An ellipse has the area of its
`size`: its semi-axes are size / 2 divided by and multiplied with the root of the axis ratio (minor / major, in (0, 1]);
`direction` is that of the major axis, clockwise from the x axis in degrees.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cbir.types import Floats

__all__ = ["as_ellipses", "by_strength", "frames", "geometry_of", "in_original_pixels", "strongest_first"]

RESPONSE = 4


def by_strength(table: Floats) -> npt.NDArray[np.intp]:
    """Positions by falling response; ties by row, column and the other columns, so that only pixels decide."""
    x, y, size, angle, response, *shape = table.T
    return np.lexsort((*shape, angle, size, x, y, -response))


def strongest_first(table: Floats, size: int) -> Iterator[Floats]:
    """The table in the order of `by_strength`, in blocks of `size` rows; only what is taken is put in order."""
    rest = table
    while len(rest):
        last = min(size, len(rest)) - 1
        least = -np.partition(-rest[:, RESPONSE], last)[last]
        candidates = (rest[:, RESPONSE] >= least).nonzero()[0]
        chosen = candidates[by_strength(rest[candidates])][:size]
        yield rest[chosen]
        rest = np.delete(rest, chosen, axis=0)


def geometry_of(table: Floats) -> Floats:
    """The table (K, 5 or 7) without the response: (K, 4 or 6)."""
    return np.delete(table, RESPONSE, axis=1)


def in_original_pixels(geometry: Floats, decoded_size: tuple[int, ...], original_size: npt.NDArray[np.int32]) -> Floats:
    """Geometry (K, 4 or 6) of the decoded image in pixels of the original."""
    scale_y, scale_x = original_size / decoded_size
    x, y, size, *others = geometry.T.astype(np.float64)
    columns = ((x + 0.5) * scale_x - 0.5, (y + 0.5) * scale_y - 0.5, size * np.sqrt(scale_x * scale_y), *others)
    return np.ascontiguousarray(np.stack(columns, axis=1), np.float32)


def as_ellipses(table: Floats) -> Floats:
    """The table with seven columns: a circle is an ellipse of axis ratio 1 and direction 0."""
    if table.shape[1] == 7:
        return table
    circle = np.broadcast_to(np.array([1.0, 0.0], np.float32), (len(table), 2))
    return np.hstack([table, circle])


def frames(table: Floats) -> npt.NDArray[np.float64]:
    """What takes the unit circle to each keypoint's ellipse, (K, 2, 2), and the vertical to the keypoint's own.

    With angle 0 verticals stay vertical, whatever the ellipse (gravity vector, Perdoch et al. 2009).
    """
    wide = as_ellipses(table).astype(np.float64)
    size, angle, ratio, direction = wide[:, 2], np.radians(wide[:, 3]), wide[:, 5], np.radians(wide[:, 6])
    major, minor = size / 2 / np.sqrt(ratio), size / 2 * np.sqrt(ratio)
    axes = _turns(direction)
    stretch = axes @ (np.stack([major, minor], axis=1)[:, :, None] * axes.transpose(0, 2, 1))
    vertical = np.stack([-np.sin(angle), np.cos(angle)], axis=1)[:, :, None]
    back = np.linalg.solve(stretch, vertical)[:, :, 0]
    return stretch @ _turns(np.arctan2(-back[:, 0], back[:, 1]))


def _turns(radians: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rotations (K, 2, 2)."""
    cosine, sine = np.cos(radians), np.sin(radians)
    return np.stack([np.stack([cosine, -sine], axis=1), np.stack([sine, cosine], axis=1)], axis=1)
