"""Sliding windows against the count formula and against loops."""

import numpy as np
import pytest

from cbir.features.regions.sliding_window import SlidingWindow
from cbir.types import Floats, ImageBatch


def boxes(height: int, width: int, **fields: object) -> Floats:
    images = [np.zeros((4, 4, 3), np.uint8)]
    batch = ImageBatch(np.zeros(1, np.int64), images, np.array([[height, width]], np.int32))
    return SlidingWindow(**fields).build("cpu", {}).propose(batch).boxes


def test_a_window_of_100_moved_by_50_over_300_by_200_has_15_places():
    found = boxes(200, 300, scales=(0.5,), stride=0.5, whole=False)
    assert len(found) == ((300 - 100) // 50 + 1) * ((200 - 100) // 50 + 1) == 15
    expected = [[x, y, x + 100, y + 100] for y in (0, 50, 100) for x in (0, 50, 100, 150, 200)]
    assert found.tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(200, 300), (333, 111), (90, 91), (17, 5)])
@pytest.mark.parametrize("stride", [0.25, 0.5, 1.0, 1.5])
def test_the_count_formula_holds(height, width, stride):
    spec = SlidingWindow(scales=(0.3, 0.5, 0.9), aspect_ratios=(0.5, 1, 2.5), stride=stride)
    expected = 0
    for w, h in spec.windows(height, width):
        if w <= width and h <= height:
            a, b = max(1, round(stride * w)), max(1, round(stride * h))
            expected += ((width - w) // a + 1) * ((height - h) // b + 1)
    settings = spec.model_dump(exclude={"name", "whole"})
    assert len(boxes(height, width, **settings, whole=False)) == expected > 0
    assert len(boxes(height, width, **settings)) == expected + 1


def test_windows_are_scales_times_aspect_ratios_of_one_area():
    windows = list(SlidingWindow(scales=(0.25, 0.5), aspect_ratios=(0.25, 1, 4)).windows(400, 800))
    assert windows == [(50, 200), (100, 100), (200, 50), (100, 400), (200, 200), (400, 100)]


def test_the_whole_image_stands_in_for_windows_that_do_not_fit():
    assert boxes(50, 60, scales=(2.0,), whole=False).tolist() == [[0, 0, 60, 50]]
