"""SIFT descriptors of given keypoints: the same as those of SIFT's own, and of ellipses after an affine map."""

import cv2
import numpy as np
import pytest

from cbir.features.descriptors.sift import SiftDescriptor, packed_octaves
from cbir.features.detectors.dog import Dog
from cbir.features.keypoints import as_ellipses, frames
from cbir.features.opencv import grey
from cbir.types import Floats, Pixels
from tests.features.scenes import circles, scene


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    one, other = left.astype(float), right.astype(float)
    return (one * other).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


def rows_of(image: Pixels, keypoints: Floats) -> Pixels:
    rows, kept = SiftDescriptor().describe(image, keypoints)
    assert np.array_equal(kept, np.arange(len(keypoints)))
    return rows


def test_octaves_are_those_that_the_detector_found():
    found = Dog().algorithm().detect(grey(scene()), None)
    table = Dog().build("cpu", {}, 0).detect(scene())
    assert len(table) > 50
    assert packed_octaves(table, (240, 320)) == [keypoint.octave & 0xFFFF for keypoint in found]


def test_rows_have_length_512():
    for table in (circles(), as_ellipses(circles())):
        lengths = np.linalg.norm(rows_of(scene(), table).astype(float), axis=1)
        assert np.abs(lengths - 512).max() < 0.05 * 512


def test_ellipses_are_described_alike_after_an_affine_map():
    image, table = scene(), circles()
    table[:, 3] = 0.0
    # Vertical lines stay vertical, so that upright keypoints correspond.
    map_ = np.array([[0.6, 0.0, 10.0], [0.2, 1.0, 5.0]])
    warped = cv2.warpAffine(image, map_, (320, 300), flags=cv2.INTER_AREA)
    shapes = map_[:, :2] @ frames(table)
    squares, axes = np.linalg.eigh(shapes @ shapes.transpose(0, 2, 1))
    minor, major = np.sqrt(squares).T
    moved = as_ellipses(table)
    moved[:, :2] = table[:, :2] @ map_[:, :2].T + map_[:, 2]
    moved[:, 2] = 2 * np.sqrt(major * minor)
    moved[:, 5], moved[:, 6] = minor / major, np.degrees(np.arctan2(axes[:, 1, 1], axes[:, 0, 1])) % 180
    normalised = np.median(cosines(rows_of(image, as_ellipses(table)), rows_of(warped, moved)))
    as_circles = np.median(cosines(rows_of(image, table), rows_of(warped, moved[:, :5])))
    assert normalised > 0.95
    assert as_circles < 0.9


@pytest.mark.parametrize("as_table", [lambda table: table, as_ellipses], ids=["circles", "ellipses"])
def test_affine_changes_of_intensity_hardly_change_rows(as_table):
    image = scene()
    darker = (0.5 * image.astype(float) + 30).round().astype(np.uint8)
    assert np.median(cosines(rows_of(image, as_table(circles())), rows_of(darker, as_table(circles())))) > 0.99


def test_the_row_of_an_ellipse_does_not_depend_on_the_others():
    image, table = scene(), as_ellipses(circles())
    alone = np.concatenate([rows_of(image, row[None]) for row in table])
    assert np.array_equal(alone, rows_of(image, table))


def test_more_ellipses_than_fit_in_a_block():
    image, table = scene(), as_ellipses(circles(count=1100))
    assert np.array_equal(rows_of(image, table)[-60:], rows_of(image, table[-60:]))
