"""Grids: how many tiles there are, and that they cover the image exactly."""

import numpy as np
import pytest

from cbir.features.regions.grid import Grid
from cbir.types import FeatureBatch, Floats, ImageBatch

HEIGHT, WIDTH = 101, 167


def boxes(**fields: object) -> Floats:
    images = [np.zeros((8, 8, 3), np.uint8)]
    batch = ImageBatch(np.zeros(1, np.int64), images, np.array([[HEIGHT, WIDTH]], np.int32))
    return Grid(**fields).build("cpu", {}).propose(batch).boxes


def memberships(**fields: object) -> np.ndarray:
    """How many tiles hold each pixel's centre, (H, W)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].reshape(2, -1)
    geometry = np.stack([x, y, x + 1, x], axis=1).astype(np.float32)
    image = np.zeros((8, 8, 3), np.uint8)
    size = np.array([[HEIGHT, WIDTH]], np.int32)
    regions = Grid(**fields).build("cpu", {}).propose(ImageBatch(np.zeros(1, np.int64), [image], size))
    offsets = np.array([0, len(geometry)])
    batch = FeatureBatch(np.zeros(1, np.int64), offsets, geometry[:, :1], geometry, size, regions)
    return batch.members(0).sum(axis=0).reshape(HEIGHT, WIDTH)


def test_the_pyramid_has_14_tiles_and_the_whole_image_is_the_first():
    assert len(boxes()) == 1 + 4 + 9 == 14
    assert boxes()[0].tolist() == [0, 0, WIDTH, HEIGHT]


def test_the_multi_scale_patches_are_30_with_sides_of_two_over_n_plus_one():
    found = boxes(levels=(1, 2, 3, 4), overlap=0.5)
    assert len(found) == 1 + 4 + 9 + 16 == 30
    widths = found[:, 2] - found[:, 0]
    expected = np.repeat([2 / (n + 1) * WIDTH for n in (1, 2, 3, 4)], [1, 4, 9, 16])
    np.testing.assert_allclose(widths, expected, rtol=1e-6)


@pytest.mark.parametrize("level", [1, 2, 3, 7, 49])
def test_every_pixel_lies_in_exactly_one_tile_of_a_level(level):
    assert (memberships(levels=(level,)) == 1).all()


def test_with_overlap_every_pixel_is_covered():
    covered = memberships(levels=(3,), overlap=0.5)
    assert covered.min() == 1
    assert covered.max() == 4


def test_tiles_go_row_by_row():
    found = boxes(levels=(2,))
    assert found[:, 0].tolist() == [0, WIDTH / 2, 0, WIDTH / 2]
    assert found[:, 1].tolist() == [0, 0, HEIGHT / 2, HEIGHT / 2]
    assert found[:, 2].tolist() == [WIDTH / 2, WIDTH, WIDTH / 2, WIDTH]
