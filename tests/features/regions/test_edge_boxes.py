"""Edge Boxes: the best boxes hold whole contours."""

import cv2
import numpy as np
import pytest

from cbir.features.regions.edge_boxes import EdgeBoxes
from tests.features.regions.objects import OBJECTS, overlap, proposed, scene
from tests.features.scenes import scene as lively_scene


@pytest.mark.parametrize("enlarged", [1, 10])
def test_objects_are_the_best_boxes(enlarged):
    best = proposed(EdgeBoxes(whole=False), scene(), enlarged)[:3]
    for box in OBJECTS:
        assert overlap(best, enlarged * box).max() > 0.85


def test_a_plain_image_has_no_contours():
    plain = np.full((120, 160, 3), 90, np.uint8)
    assert proposed(EdgeBoxes(whole=False), plain).tolist() == [[0, 0, 160, 120]]


def test_what_is_not_contrasty_is_no_contour():
    """A disc is found, and is not where it stands out less than noise would."""
    for step, number in ((60, 2), (6, 1)):
        image = np.full((120, 160, 3), 90, np.uint8)
        cv2.circle(image, (70, 60), 25, (90 + step,) * 3, -1)
        assert min(len(proposed(EdgeBoxes(), image)), 2) == number


def test_boxes_are_few_and_differ():
    image = lively_scene()
    found = proposed(EdgeBoxes(whole=False, iou=0.5, max_boxes=20), image)
    assert len(found) == 20
    for number, box in enumerate(found):
        assert overlap(found[:number], box).max(initial=0) <= 0.5 + 1e-6
    assert np.array_equal(proposed(EdgeBoxes(whole=False, iou=0.5, max_boxes=4), image), found[:4])
    large = proposed(EdgeBoxes(whole=False, min_area=0.2), image)
    assert ((large[:, 2:] - large[:, :2]).prod(axis=1) >= 0.2 * 240 * 320 - 1e-3).all()
