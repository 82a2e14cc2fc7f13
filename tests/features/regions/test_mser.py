"""MSER boxes: they lie around what stands out, and do not change with contrast."""

import numpy as np
import pytest

from cbir.features.regions.mser import Mser
from cbir.types import Floats, ImageBatch, Pixels

BRIGHT, DARK = (30, 20, 90, 70), (120, 90, 180, 140)
"""Left, top, right, bottom."""


def scene(grey: int = 120, bright: int = 220, dark: int = 20) -> Pixels:
    image = np.full((160, 220, 3), grey, np.uint8)
    for (left, top, right, bottom), value in ((BRIGHT, bright), (DARK, dark)):
        image[top:bottom, left:right] = value
    return image


def boxes(image: Pixels, **fields: object) -> Floats:
    batch = ImageBatch(np.zeros(1, np.int64), [image], np.array([image.shape[:2]], np.int32))
    return Mser(**fields).build("cpu", {}).propose(batch).boxes


def test_bright_and_dark_objects_are_boxed():
    found = boxes(scene())
    assert found[0].tolist() == [0, 0, 220, 160]
    for box in (BRIGHT, DARK):
        assert np.abs(found[1:] - box).max(axis=1).min() <= 1
    assert len(found) == 3


def test_boxes_do_not_change_with_contrast_and_brightness():
    assert np.array_equal(boxes(scene()), boxes(scene(100, 150, 50)))


def test_boxes_are_sought_in_a_smaller_image_and_given_in_the_original():
    decoded = ImageBatch(np.zeros(1, np.int64), [scene()], np.array([[1600, 2200]], np.int32))
    for size, within in ((480, 10), (110, 40)):
        found = Mser(size=size).build("cpu", {}).propose(decoded).boxes
        assert np.abs(found[1:] - np.multiply(BRIGHT, 10)).max(axis=1).min() <= within


def test_areas_are_shares_of_the_image():
    share = (BRIGHT[2] - BRIGHT[0]) * (BRIGHT[3] - BRIGHT[1]) / (160 * 220)
    assert len(boxes(scene(), min_area=1.1 * share)) == 1
    assert len(boxes(scene(), max_area=0.9 * share)) == 1
    assert len(boxes(scene(), min_area=0.9 * share, max_area=1.1 * share)) == 3


def test_boxes_go_by_falling_area_without_near_duplicates():
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 255, (12, 16, 1), np.uint8), np.ones((14, 14, 3), np.uint8))
    found = boxes(image, whole=False, iou=0.5, min_area=0.004, max_boxes=200)
    sides = found[:, 2:] - found[:, :2]
    areas = sides.prod(axis=1)
    assert len(found) > 10
    assert (np.diff(areas) <= 0).all()
    for i in range(len(found)):
        for j in range(i):
            overlap = np.minimum(found[i, 2:], found[j, 2:]) - np.maximum(found[i, :2], found[j, :2])
            shared = np.maximum(overlap, 0).prod()
            assert shared <= 0.5 * (areas[i] + areas[j] - shared)
    assert np.array_equal(boxes(image, whole=False, iou=0.5, min_area=0.004, max_boxes=5), found[:5])


def test_areas_must_be_a_range():
    with pytest.raises(ValueError, match=r"min_area: 0.6 is more than max_area: 0.5"):
        Mser(min_area=0.6)
