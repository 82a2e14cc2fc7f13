"""Selective Search: its boxes hold the objects, and their order depends on pixels and seed alone."""

import numpy as np
import pytest

from cbir.features.regions.selective_search import SelectiveSearch
from tests.features.regions.objects import OBJECTS, overlap, proposed, scene
from tests.features.scenes import scene as lively_scene


@pytest.mark.parametrize("enlarged", [1, 10])
def test_objects_are_boxed(enlarged):
    found = proposed(SelectiveSearch(), scene(), enlarged)
    for box in OBJECTS:
        assert overlap(found, enlarged * box).max() > 0.85


def test_the_order_is_that_of_pixels_and_seed():
    """OpenCV draws its own order anew in every call."""
    image, spec = lively_scene(), SelectiveSearch(max_boxes=10)
    first = proposed(spec, image)
    assert np.array_equal(first, proposed(spec, image))
    other = proposed(SelectiveSearch(max_boxes=10, seed=1), image)
    assert not np.array_equal(first, other)
    every, others = (proposed(SelectiveSearch(max_boxes=10**6, iou=1, seed=seed), image) for seed in (0, 1))
    assert len(every) > 50
    assert set(map(tuple, every.tolist())) == set(map(tuple, others.tolist()))


def test_large_boxes_tend_to_come_first():
    found = proposed(SelectiveSearch(max_boxes=10**6, whole=False), lively_scene())
    areas = (found[:, 2:] - found[:, :2]).prod(axis=1)
    half = len(found) // 2
    assert areas[:half].mean() > 2 * areas[half:].mean()
    assert (np.diff(areas) > 0).any()


def test_boxes_are_few_large_and_differ():
    found = proposed(SelectiveSearch(max_boxes=12, iou=0.4, min_area=0.02, whole=False, size=320), lively_scene())
    assert len(found) == 12
    assert ((found[:, 2:] - found[:, :2]).prod(axis=1) >= 0.02 * 240 * 320 - 1e-3).all()
    for number, box in enumerate(found):
        assert overlap(found[:number], box).max(initial=0) <= 0.4 + 1e-6
