"""SIFT with colour: what is in the colour blocks, and that grey leaves them empty."""

import cv2
import numpy as np
import pytest

from cbir.features.descriptors.colour import HsvSift, HueSift, OpponentSift, opponents
from cbir.features.descriptors.sift import SiftDescriptor
from cbir.features.keypoints import as_ellipses
from tests.features.scenes import circles, scene


def rows_of(spec: object, image: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
    rows, kept = spec.build("cpu", {}).describe(image, circles() if table is None else table)
    assert len(rows) == len(kept) == 60
    return rows


def grey_scene() -> np.ndarray:
    return np.repeat(scene()[..., :1], 3, axis=2)


def plain_sift(plane: np.ndarray) -> np.ndarray:
    return SiftDescriptor().describe_grey(np.ascontiguousarray(plane), circles())


def test_opponents_are_an_orthonormal_change_of_colour():
    image = np.eye(3, dtype=np.uint8)[None]
    matrix = np.stack(opponents(image))[:, 0]
    assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
    assert np.allclose(matrix[2], 1 / np.sqrt(3))
    assert matrix[0] == pytest.approx([1 / np.sqrt(2), -1 / np.sqrt(2), 0])


@pytest.mark.parametrize("as_table", [lambda table: table, as_ellipses], ids=["circles", "ellipses"])
def test_the_opponent_colours_of_a_grey_picture_are_empty(as_table):
    rows = rows_of(OpponentSift(), grey_scene(), as_table(circles()))
    assert not rows[:, :256].any()
    assert rows[:, 256:].any(axis=1).all()


def test_the_intensity_of_a_grey_picture_is_its_sift():
    assert np.array_equal(rows_of(OpponentSift(), grey_scene())[:, 256:], plain_sift(grey_scene()[..., 0]))


def test_each_opponent_block_is_the_sift_of_its_channel():
    image = scene()
    blocks = rows_of(OpponentSift(), image).reshape(60, 3, 128).transpose(1, 0, 2)
    for block, channel in zip(blocks, opponents(image), strict=True):
        stretched = cv2.normalize(channel, None, 0, 255, cv2.NORM_MINMAX).round().astype(np.uint8)
        expected = plain_sift(stretched)
        cosines = (block.astype(float) * expected).sum(axis=1) / 512**2
        assert np.median(cosines) > 0.97


def test_hsv_sift_has_the_sift_of_value_and_no_colour_where_all_is_grey():
    rows = rows_of(HsvSift(), grey_scene())
    assert not rows[:, :256].any()
    assert np.array_equal(rows[:, 256:], plain_sift(grey_scene()[..., 0]))
    assert rows_of(HsvSift(), scene())[:, :256].any(axis=1).all()


def test_hue_sift_begins_with_sift_and_has_no_hue_where_all_is_grey():
    image = scene()
    assert np.array_equal(rows_of(HueSift(), image)[:, :128], SiftDescriptor().describe(image, circles())[0])
    assert not rows_of(HueSift(), grey_scene())[:, 128:].any()
    lengths = np.linalg.norm(rows_of(HueSift(), image)[:, 128:].astype(float), axis=1)
    assert np.abs(lengths[lengths > 0] - 255).max() < 3


@pytest.mark.parametrize(("colour", "degrees"), [((1, 0, 0), 60), ((0, 1, 0), 300), ((0, 0, 1), 180), ((1, 1, 0), 0)])
def test_all_of_a_coloured_picture_is_in_the_bin_of_its_hue(colour, degrees):
    image = grey_scene() * np.array(colour, np.uint8)
    hues = rows_of(HueSift(), image)[:, 128:]
    # Hues on the edge of a bin may fall to either side.
    here = [degrees // 10 % 36, (degrees // 10 - 1) % 36]
    assert (hues[:, here].astype(int).sum(axis=1) > 0).all()
    assert not np.delete(hues, here, axis=1).any()
