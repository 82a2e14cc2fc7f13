"""Normalised patches: what lies around each keypoint, turned upright and with its ellipse made a circle."""

from collections.abc import Iterator

import cv2
import numpy as np

from cbir.features.keypoints import frames
from cbir.types import Floats, Pixels

__all__ = ["BLOCK", "blocks", "normalised_patches", "pyramid"]

BLOCK = 512
"""How many patches are held at a time."""


def blocks(num_keypoints: int) -> Iterator[slice]:
    """Slices of at most BLOCK keypoints."""
    return (slice(start, start + BLOCK) for start in range(0, num_keypoints, BLOCK))


def pyramid(grey: Pixels | Floats) -> list[Floats]:
    """The picture (H, W) and its smoothed halvings (Burt and Adelson 1983); a pixel at x lies at x / 2 in the next."""
    levels = [grey.astype(np.float32)]
    while min(levels[-1].shape) > 2:
        levels.append(np.asarray(cv2.pyrDown(levels[-1]), np.float32))
    return levels


def normalised_patches(levels: list[Floats], keypoints: Floats, side: int, reach: float) -> Floats:
    """Squares (K, side, side) float32 around the keypoints of a table, from the levels of `pyramid`; K <= BLOCK.

    A patch reaches from -reach to reach times the radius size / 2 of its keypoint; beyond the border, the image goes on
    with the pixel of its edge. Each patch is read where one of its pixels is between one and two pixels of the level.
    """
    transforms = frames(keypoints)
    steps = reach * keypoints[:, 2].astype(np.float64) / side
    levels_of = np.clip(np.floor(np.log2(np.maximum(steps, 1e-6))), 0, len(levels) - 1).astype(np.int64)
    offsets = (np.arange(side) - (side - 1) / 2) * (2 * reach / side)
    grid = np.stack(np.meshgrid(offsets, offsets)).reshape(2, -1)
    patches = np.empty((len(keypoints), side * side), np.float32)
    for number in np.unique(levels_of):
        mine = (levels_of == number).nonzero()[0]
        places = transforms[mine] @ grid + keypoints[mine, :2, None]
        patches[mine] = _read(levels[number], (places / 2.0**number).astype(np.float32))
    return patches.reshape(-1, side, side)


def _read(level: Floats, places: Floats) -> Floats:
    """The level's values at places (K, 2, P) -> (K, P), bilinear."""
    x, y = places[:, 0], places[:, 1]
    return np.asarray(cv2.remap(level, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)
