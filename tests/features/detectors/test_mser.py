"""MSER: ellipses of known regions, and regions that stay the same under monotone changes of intensity."""

import cv2
import numpy as np
import pytest

from cbir.features.detectors.mser import Mser, ellipses
from cbir.features.keypoints import by_strength, frames
from cbir.types import Floats, Pixels
from tests.features.scenes import scene


def detect(image: Pixels, **fields: object) -> Floats:
    table = Mser(**fields).build("cpu", {}, 1000).detect(image)
    return table[by_strength(table)]


def drawn(semi_axes: tuple[int, int], direction: float) -> Pixels:
    image = np.full((200, 200, 3), 200, np.uint8)
    return cv2.ellipse(image, (90, 110), semi_axes, direction, 0, 360, (40, 40, 40), -1)


@pytest.mark.parametrize("direction", [0, 30, 90, 120])
def test_an_ellipse_is_found_as_itself(direction):
    x, y, size, angle, area, ratio, found = detect(drawn((40, 16), direction))[0]
    assert (x, y) == pytest.approx((90, 110), abs=0.5)
    # The standard deviation of an ellipse's pixels along an axis is half the semi-axis.
    assert size == pytest.approx(2 * np.sqrt(20 * 8), rel=0.03)
    assert ratio == pytest.approx(0.4, abs=0.02)
    assert abs((found - direction + 90) % 180 - 90) < 1.5
    assert area == pytest.approx(np.pi * 40 * 16, rel=0.06)
    assert angle == 0


def test_moments_are_those_of_the_pixels():
    rng = np.random.default_rng(0)
    regions = [np.unique(rng.integers(0, 40, (number, 2)), axis=0).astype(np.int32) for number in (5, 60, 400)]
    table = ellipses(regions)
    for region, row, frame in zip(regions, table, frames(table), strict=True):
        covariance = np.cov(region.T.astype(float), bias=True) + np.eye(2) / 12
        assert np.allclose(frame @ frame.T, covariance, rtol=1e-3)
        assert np.allclose(row[:2], region.mean(axis=0), rtol=1e-5)


def test_a_line_of_pixels_has_an_area():
    table = ellipses([np.stack([np.arange(100), np.full(100, 7)], axis=1).astype(np.int32)])
    assert np.isfinite(table).all()
    assert table[0, 2] > 0
    assert 0 < table[0, 5] < 0.02


@pytest.mark.parametrize(("gain", "offset"), [(1, 60), (2, 0), (2, 31)])
def test_regions_do_not_change_with_brightness_and_contrast(gain, offset):
    grey = (scene()[..., :1] // 3).repeat(3, axis=2)
    changed = gain * grey + np.uint8(offset)
    plain = detect(grey)
    assert len(plain) > 10
    assert np.array_equal(detect(changed, delta=5 * gain), plain)


def test_dark_regions_are_bright_ones_of_the_negative():
    grey = scene()[..., :1].repeat(3, axis=2)
    assert np.array_equal(detect(255 - grey), detect(grey))


def test_nested_regions_of_nearly_the_same_area_are_one():
    every, distinct, coarse = (detect(scene(), min_diversity=value) for value in (0.0, 0.2, 0.5))
    assert 10 < len(coarse) < len(distinct) < len(every)
    rows = {tuple(row) for row in every}
    assert all(tuple(row) in rows for row in distinct)
    for x, y, *_, area, ratio, direction in distinct:
        near = np.hypot(distinct[:, 0] - x, distinct[:, 1] - y) < 1
        areas = np.sort(distinct[near, 4])
        assert (np.diff(areas) >= 0.2 * areas[1:]).all(), (area, ratio, direction)


def test_areas_are_limited():
    areas = detect(scene(), min_area=200, max_area=2000)[:, 4]
    assert len(areas) > 5
    assert areas.min() >= 200
    assert areas.max() <= 2000
