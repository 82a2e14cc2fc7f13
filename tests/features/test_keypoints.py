"""Tables of keypoints: order, units, and the frames of circles and ellipses."""

import numpy as np
import pytest

from cbir.features.keypoints import as_ellipses, by_strength, frames, geometry_of, in_original_pixels, strongest_first
from tests.features.scenes import circles


def ellipse(size: float, angle: float, ratio: float, direction: float) -> np.ndarray:
    return np.array([[0, 0, size, angle, 1, ratio, direction]], np.float32)


def test_the_strongest_come_first_and_ties_are_ordered_by_place():
    table = np.array([[5, 2, 3, 0, 1], [1, 2, 3, 0, 1], [9, 1, 3, 0, 1], [0, 9, 3, 0, 7]], np.float32)
    assert by_strength(table).tolist() == [3, 2, 1, 0]
    shuffled = np.random.default_rng(0).permutation(len(table))
    assert np.array_equal(table[shuffled][by_strength(table[shuffled])], table[by_strength(table)])


@pytest.mark.parametrize("size", [1, 7, 59, 60, 100])
def test_blocks_of_the_strongest_are_those_of_the_whole_order(size):
    table = circles()
    table[:, 4] = np.arange(60) % 9  # many ties
    blocks = list(strongest_first(table, size))
    assert np.array_equal(np.concatenate(blocks), table[by_strength(table)])
    assert {len(block) for block in blocks[:-1]} <= {size}
    assert list(strongest_first(table[:0], size)) == []


def test_geometry_leaves_out_the_response():
    table = ellipse(8, 30, 0.5, 60)
    assert geometry_of(table).tolist() == [[0, 0, 8, 30, 0.5, 60]]
    assert geometry_of(table[:, :5]).tolist() == [[0, 0, 8, 30]]


def test_geometry_in_pixels_of_the_original():
    geometry = geometry_of(ellipse(8, 30, 0.5, 60))
    found = in_original_pixels(geometry, (100, 200), np.array([300, 400], np.int32))
    assert np.allclose(found, [[0.5, 1.0, 8 * np.sqrt(6), 30, 0.5, 60]])


def test_a_circle_s_frame_is_a_turn():
    table = circles()
    angle = np.radians(table[:, 3])
    expected = table[:, 2] / 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert np.allclose(frames(table), expected.transpose(2, 0, 1), atol=1e-5)
    assert np.allclose(frames(as_ellipses(table)), frames(table))


@pytest.mark.parametrize("direction", [0, 25, 90, 130, 205])
@pytest.mark.parametrize("angle", [0, 70, 200])
def test_an_ellipse_s_frame_takes_the_unit_circle_to_it_and_the_vertical_to_its_angle(angle, direction):
    frame = frames(ellipse(20, angle, 0.25, direction))[0]
    axis = np.array([np.cos(np.radians(direction)), np.sin(np.radians(direction))])
    # The semi-axes are 20 and 5: of area as a circle of radius 10.
    expected = 400 * np.outer(axis, axis) + 25 * (np.eye(2) - np.outer(axis, axis))
    assert np.allclose(frame @ frame.T, expected, rtol=1e-5, atol=1e-3)
    assert np.linalg.det(frame) == pytest.approx(100, rel=1e-5)
    down = frame @ [0, 1]
    assert down / np.linalg.norm(down) == pytest.approx([-np.sin(np.radians(angle)), np.cos(np.radians(angle))])
