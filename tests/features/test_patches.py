"""Normalised patches against pictures whose values are known at every place."""

import cv2
import numpy as np
import pytest

from cbir.features.keypoints import as_ellipses, frames
from cbir.features.patches import BLOCK, blocks, normalised_patches, pyramid
from tests.features.scenes import circles, scene


def ramp(height: int = 240, width: int = 320) -> np.ndarray:
    """0.5 x + 0.25 y."""
    rows, columns = np.mgrid[:height, :width]
    return (0.5 * columns + 0.25 * rows).astype(np.float32)


@pytest.mark.parametrize("reach", [2.0, 6.0])
def test_a_patch_shows_what_its_frame_says(reach):
    table = circles()
    patches = normalised_patches([ramp()], table, 16, reach)
    offsets = (np.arange(16) - 7.5) * reach / 8
    grid = np.stack(np.meshgrid(offsets, offsets)).reshape(2, -1)
    places = frames(table) @ grid + table[:, :2, None]
    expected = 0.5 * places[:, 0] + 0.25 * places[:, 1]
    inside = (places > 0).all(axis=1) & (places[:, 0] < 319) & (places[:, 1] < 239)
    # OpenCV reads at thirty-seconds of a pixel.
    assert np.abs(patches.reshape(len(table), -1) - expected)[inside].max() < 0.05
    assert inside.mean() > 0.8


def test_all_levels_of_the_pyramid_show_the_same():
    table = circles()
    levels = pyramid(ramp().astype(np.uint8).astype(np.float32))
    one = normalised_patches(levels[:1], table, 16, 2.0)
    for number in (1, 2, 3):
        # A picture of the same place that has only this level.
        alone = normalised_patches([*levels[:1], *levels[number : number + 1]], table * [1, 1, 1, 1, 1], 16, 2.0)
        assert alone.shape == one.shape
    large = table.copy()
    large[:, 2] *= 8
    coarse, fine = (normalised_patches(some, large, 16, 1.0) for some in (levels, levels[:1]))
    assert np.median(np.abs(coarse - fine)) < 1.0
    assert not np.array_equal(coarse, fine)


def test_the_patch_of_an_ellipse_is_that_of_the_circle_before_an_affine_map():
    grey = cv2.GaussianBlur(cv2.cvtColor(scene(), cv2.COLOR_RGB2GRAY), (0, 0), 1.5).astype(np.float32)
    stretch = np.array([[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]])
    narrow = cv2.warpAffine(grey, stretch, (160, 240), flags=cv2.INTER_LINEAR)
    table = circles()
    table[:, 3] = 0.0
    ellipses = as_ellipses(table)
    ellipses[:, 0] /= 2
    ellipses[:, 2] /= np.sqrt(2)
    ellipses[:, 5:] = 0.5, 90.0
    one, other = normalised_patches([grey], table, 16, 3.0), normalised_patches([narrow], ellipses, 16, 3.0)
    assert np.median(np.abs(one - other)) < 1.5
    assert np.median(np.abs(one - np.roll(one, 1, axis=0))) > 15


def test_blocks_cover_every_keypoint_once():
    for count in (0, 1, BLOCK, 2 * BLOCK + 3):
        assert [i for block in blocks(count) for i in range(count)[block]] == list(range(count))
