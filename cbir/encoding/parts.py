"""The image as a box, the cells of a grid over it, and which features lie in them."""

import numpy as np

from cbir.errors import DataError
from cbir.types import FeatureBatch, Floats, Int64s

__all__ = ["cell_boxes", "cells_of", "image_box", "positions"]


def positions(batch: FeatureBatch) -> Floats:
    """x and y of every feature (K, 2), from the edges of the upright original's first pixel as boxes have them.

    DataError where they are not known.
    """
    if batch.geometry.shape[1] < 2 and len(batch.geometry):
        raise DataError("these features have no positions, so they cannot be told apart by parts of the image")
    places: Floats = batch.geometry[:, :2].reshape(len(batch.geometry), 2) + np.float32(0.5)
    return places


def image_box(batch: FeatureBatch, i: int) -> Floats:
    """The box (4,) of image number i; where its size is not known, the bounding box of its features."""
    height, width = batch.sizes[i]
    if height > 0 and width > 0:
        return np.array([0, 0, width, height], np.float32)
    points = positions(batch)[batch.rows(i)]
    if not len(points):
        return np.zeros(4, np.float32)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def cell_boxes(box: Floats, grid: int) -> Floats:
    """The grid * grid cells (grid², 4) of a box, row by row."""
    steps = np.linspace(box[:2], box[2:], grid + 1, dtype=np.float32)
    top, left = np.divmod(np.arange(grid * grid), grid)
    return np.stack([steps[left, 0], steps[top, 1], steps[left + 1, 0], steps[top + 1, 1]], axis=1)


def cells_of(points: Floats, box: Floats, grid: int) -> Int64s:
    """The cell (n,) of every point (n, 2), of `cell_boxes`; a point outside belongs to the nearest cell."""
    extent = np.maximum(box[2:] - box[:2], np.finfo(np.float32).tiny).astype(np.float64)
    cells = np.floor((points - box[:2]) / extent * grid).clip(0, grid - 1)
    numbers: Int64s = (cells[:, 1] * grid + cells[:, 0]).astype(np.int64)
    return numbers
