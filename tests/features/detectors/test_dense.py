"""The dense grid: how many patches there are, and where."""

import numpy as np
import pytest

from cbir.features.detectors.dense import Dense
from cbir.types import Floats, Pixels
from tests.features.scenes import scene


def detect(image: Pixels, **fields: object) -> Floats:
    return Dense(**fields).build("cpu", {}, 10).detect(image)


@pytest.mark.parametrize(("height", "width"), [(240, 320), (97, 131), (16, 16), (15, 300), (40, 33)])
@pytest.mark.parametrize(("step", "sides"), [(8, (16, 24, 32)), (5, (16,)), (1, (15, 16)), (100, (8, 40))])
def test_counts_are_those_of_the_formula(height, width, step, sides):
    expected = sum(
        ((width - side) // step + 1) * ((height - side) // step + 1) for side in sides if side <= min(height, width)
    )
    assert len(detect(scene(height, width), step=step, sides=sides)) == expected


def test_patches_begin_in_the_corner_and_stay_inside():
    table = detect(scene(97, 131), step=7, sides=(20,))
    left, top = table[0, :2] - 9.5
    assert (left, top) == (0, 0)
    assert np.unique(np.diff(np.unique(table[:, 0]))).tolist() == [7]
    assert (table[:, :2] + 9.5).max(axis=0).tolist() <= [130, 96]
    assert np.allclose(table[:, 2], 20 / 6)


def test_the_response_is_the_standard_deviation_of_the_patch():
    image = np.repeat(scene()[..., :1], 3, axis=2)
    for x, y, size, _, contrast in detect(image)[::97]:
        side = round(6 * size)
        left, top = round(x - (side - 1) / 2), round(y - (side - 1) / 2)
        patch = image[top : top + side, left : left + side, 0].astype(float)
        assert contrast == pytest.approx(patch.std(), abs=1e-3)
