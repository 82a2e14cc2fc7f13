"""Non-maximum suppression against brute force, and what a smaller image is."""

import numpy as np
import pytest

from cbir.features.regions.search import distinct, shrunk
from cbir.types import Array


def iou(one: Array, other: Array, side: int = 40) -> float:
    """By counting pixels of a small image."""
    first, second = (np.zeros((side, side), bool) for _ in range(2))
    for mask, (left, top, right, bottom) in ((first, one), (second, other)):
        mask[top:bottom, left:right] = True
    return float((first & second).sum() / (first | second).sum())


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
def test_the_first_of_overlapping_boxes_stays(threshold):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 40, (80, 2, 2)), axis=1).reshape(80, 4)
    boxes = corners[(corners[:, 2:] > corners[:, :2]).all(axis=1)]
    expected: list[Array] = []
    for box in boxes:
        if all(iou(box, earlier) <= threshold for earlier in expected):
            expected.append(box)
    found = distinct(boxes, threshold, 100)
    assert 1 < len(found) < len(boxes)
    assert np.array_equal(found, expected)
    assert np.array_equal(distinct(boxes, threshold, 5), expected[:5])


def test_no_boxes_stay_none():
    assert distinct(np.empty((0, 4)), 0.5, 3).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "longest", "expected"),
    [((40, 80, 3), 20, (10, 20, 3)), ((40, 80), 20, (10, 20)), ((3, 900), 30, (1, 30)), ((40, 80, 3), 80, (40, 80, 3))],
)
def test_an_image_is_never_enlarged(shape, longest, expected):
    image = np.full(shape, 7, np.uint8)
    small = shrunk(image, longest)
    assert small.shape == expected
    assert (small == 7).all()
