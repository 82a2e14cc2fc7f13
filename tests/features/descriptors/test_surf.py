"""SURF: sums of wavelets with a known gradient, and what must not change them."""

import numpy as np

from cbir.features.descriptors.surf import SurfDescriptor
from tests.features.scenes import circles, quarter_turn, scene, turned


def rows_of(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return SurfDescriptor().describe(image, table)[0]


def test_rows_are_unit_vectors():
    assert np.allclose(np.linalg.norm(rows_of(scene(), circles()), axis=1), 1, atol=1e-6)


def test_a_ramp_has_one_sign_along_it_and_nothing_across():
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (240, 240, 3))
    table = np.array([[120, 120, 8, 0, 1], [120, 120, 8, 90, 1], [120, 120, 8, 180, 1]], np.float32)
    for row, (along, across, sign) in zip(rows_of(ramp, table), [(0, 1, 1), (1, 0, -1), (0, 1, -1)], strict=True):
        cells = row.reshape(16, 4)
        assert np.allclose(cells[:, along], sign * cells[:, along + 2], atol=1e-6)
        assert np.abs(cells[:, along]).min() > 0
        assert np.allclose(cells[:, across], 0, atol=1e-6)


def test_affine_changes_of_intensity_change_nothing():
    grey = np.repeat(scene()[..., :1] // 2, 3, axis=2)
    assert np.allclose(rows_of(grey, circles()), rows_of(2 * grey + 10, circles()), atol=1e-6)


def test_a_quarter_turn_changes_nothing():
    image, table = scene(), circles()
    plain, again = rows_of(image, table), rows_of(quarter_turn(image), turned(table, image.shape[0]))
    assert np.median((plain * again).sum(axis=1)) > 0.99


def test_a_plain_picture_has_zero_rows():
    assert not rows_of(np.full((240, 320, 3), 90, np.uint8), circles()).any()
