"""FAST and AGAST against the segment test, pixel by pixel."""

import numpy as np
import pytest

from cbir.features.detectors.fast import Agast, Fast
from cbir.features.opencv import grey
from cbir.types import Pixels
from tests.features.scenes import scene

CIRCLE = [(0, -3), (1, -3), (2, -2), (3, -1), (3, 0), (3, 1), (2, 2), (1, 3)]
CIRCLE += [(-dx, -dy) for dx, dy in CIRCLE]


def is_corner(picture: Pixels, x: int, y: int, threshold: int) -> bool:
    """Whether 9 pixels in a row of the circle are all brighter, or all darker, by more than the threshold."""
    ring = np.array([int(picture[y + dy, x + dx]) for dx, dy in CIRCLE]) - int(picture[y, x])
    for beyond in (ring > threshold, ring < -threshold):
        runs = np.concatenate([beyond, beyond])
        if any(runs[start : start + 9].all() for start in range(16)):
            return True
    return False


@pytest.mark.parametrize("spec", [Fast(threshold=20), Agast(threshold=20)], ids=["fast", "agast"])
def test_keypoints_are_corners_and_the_response_is_the_highest_threshold(spec):
    image = scene()
    table = spec.build("cpu", {}, 1000).detect(image)
    assert len(table) > 50
    for x, y, size, angle, response in table[:: len(table) // 50]:
        assert is_corner(grey(image), int(x), int(y), int(response))
        assert not is_corner(grey(image), int(x), int(y), int(response) + 1)
        assert (size, angle) == (7, 0)
    assert table[:, 4].min() >= 20


def test_a_higher_threshold_keeps_the_strongest_corners():
    low, high = (Fast(threshold=value).build("cpu", {}, 1000).detect(scene()) for value in (10, 40))
    places = {tuple(row) for row in low}
    assert 10 < len(high) < len(low)
    assert sum(tuple(row) in places for row in high) == len(high)


def test_the_size_is_that_of_the_settings():
    assert (Fast(keypoint_size=31).build("cpu", {}, 1000).detect(scene())[:, 2] == 31).all()
