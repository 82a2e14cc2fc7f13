"""Dominant gradients of pictures whose gradient is known."""

import numpy as np
import pytest

from cbir.features.keypoints import as_ellipses
from cbir.features.orientation import with_dominant_angles
from cbir.types import Floats, Pixels
from tests.features.scenes import circles, quarter_turn, scene, turned


def edge(degrees: float, side: int = 121) -> Pixels:
    """Dark to bright along a direction, clockwise from the x axis, through the middle."""
    rows, columns = np.mgrid[:side, :side] - side // 2
    along = columns * np.cos(np.radians(degrees)) + rows * np.sin(np.radians(degrees))
    return np.repeat((127 + 100 * np.tanh(along / 3)).astype(np.uint8)[..., None], 3, axis=2)


def off(one: Floats, other: Floats | float) -> Floats:
    difference = np.abs(one - other) % 360
    return np.minimum(difference, 360 - difference)


@pytest.mark.parametrize("degrees", [0, 17, 90, 133, 200, 271, 355])
@pytest.mark.parametrize("size", [6.0, 30.0])
def test_the_angle_is_the_direction_of_the_gradient(degrees, size):
    table = np.array([[60, 60, size, 99, 1]], np.float32)
    found = with_dominant_angles(edge(degrees), table)
    assert off(found[:, 3], degrees)[0] < 3
    assert np.array_equal(np.delete(found, 3, axis=1), np.delete(table, 3, axis=1))
    assert table[0, 3] == 99


def test_angles_turn_with_the_picture():
    image, table = scene(), circles()
    plain = with_dominant_angles(image, table)
    again = with_dominant_angles(quarter_turn(image), turned(table, image.shape[0]))
    assert (off(again[:, 3], plain[:, 3] + 90) < 2).mean() > 0.95


def test_the_angle_of_an_ellipse_belongs_to_its_normalised_patch():
    table = as_ellipses(np.array([[60, 60, 12, 0, 1]], np.float32))
    table[:, 5:] = 0.5, 0.0
    # The ellipse is twice as wide as high; made a circle, an edge at 45 degrees is at atan(1 / 2) from the x axis.
    within = np.arctan2(0.5, 1.0)
    # The patch's vertical is then at right angles to that, and goes back to the image with the stretch undone.
    vertical = np.array([np.sqrt(2) * -np.sin(within), np.sqrt(0.5) * np.cos(within)])
    expected = np.degrees(np.arctan2(-vertical[0], vertical[1]))
    assert off(with_dominant_angles(edge(45), table)[:, 3], expected)[0] < 4


def test_a_plain_picture_has_angle_0():
    assert not with_dominant_angles(np.full((200, 300, 3), 90, np.uint8), circles())[:, 3].any()


def test_the_angle_of_a_keypoint_does_not_depend_on_the_others():
    image, table = scene(), circles()
    alone = np.concatenate([with_dominant_angles(image, row[None]) for row in table])
    assert np.array_equal(alone, with_dominant_angles(image, table))
