"""SIFT against what Lowe's paper promises: the same features of turned, brightened and shrunk pictures."""

import cv2
import numpy as np
import pytest

from cbir.features.sift import Sift
from cbir.types import FeatureBatch, ImageBatch, Pixels


def scene(height: int = 240, width: int = 320, seed: int = 1) -> Pixels:
    """Smooth blobs of many sizes, grey values 20 to 220."""
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), sigma) * sigma for sigma in (2, 4, 8)]
    texture = sum(layers)
    grey = 20 + 200 * (texture - texture.min()) / (texture.max() - texture.min())
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def sift(image: Pixels, original: tuple[int, int] | None = None, **fields: object) -> FeatureBatch:
    size = np.array([original or image.shape[:2]], np.int32)
    return Sift(**fields).build("cpu", {}).extract(ImageBatch(np.zeros(1, np.int64), [image], size))


def blob(std: float, side: int = 160) -> Pixels:
    rows, columns = np.mgrid[:side, :side] - side / 2
    grey = 40 + 180 * np.exp(-(rows**2 + columns**2) / (2 * std**2))
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def test_a_turned_picture_has_the_same_keypoints_turned():
    image = scene()
    plain, turned = sift(image), sift(np.rot90(image, k=-1))
    x, y, size, angle = plain.geometry.T
    expected = np.stack([image.shape[0] - 1 - y, x, size, (angle + 90) % 360], axis=1)
    found = 0
    for row in expected:
        offset = np.abs(turned.geometry - row)
        offset[:, 3] = np.minimum(offset[:, 3], 360 - offset[:, 3])
        found += (offset < [0.5, 0.5, 0.05 * row[2], 5]).all(axis=1).any()
    assert len(plain.descriptors) > 100
    assert found >= 0.9 * len(expected)


def test_descriptors_hardly_change_with_brightness_and_contrast():
    image = scene()
    plain, changed = sift(image), sift((0.7 * image + 40).round().astype(np.uint8))
    offset = np.abs(plain.geometry[:, None] - changed.geometry[None])
    one, other = (offset < [0.3, 0.3, 1, 3]).all(axis=2).nonzero()
    # Less contrast leaves fewer keypoints, but no others.
    assert 20 < 0.9 * len(changed.descriptors) <= len(np.unique(other))
    cosines = (_unit(plain)[one] * _unit(changed)[other]).sum(axis=1)
    assert np.median(cosines) > 0.99


def test_descriptors_have_about_length_512():
    lengths = np.linalg.norm(sift(scene()).descriptors.astype(float), axis=1)
    assert np.abs(lengths - 512).max() < 0.05 * 512


@pytest.mark.parametrize("std", [4.0, 8.0, 16.0])
def test_a_blob_is_found_in_its_centre_at_its_scale(std):
    x, y, size, _ = sift(blob(std)).geometry[0]
    assert (x, y) == pytest.approx((80, 80), abs=0.5)
    # The difference of Gaussians peaks a little under the blob's std; size is twice the scale.
    assert size / std == pytest.approx(2.0, rel=0.25)


def test_upright_features_have_one_place_each_and_angle_0():
    upright, free = sift(scene(), upright=True), sift(scene())
    places = upright.geometry[:, :2]
    assert len(np.unique(places, axis=0)) == len(places) > 50
    assert not upright.geometry[:, 3].any()
    assert len(np.unique(free.geometry[:, :2], axis=0)) < len(free.geometry)


def test_upright_descriptors_are_those_of_angle_0():
    image = scene()
    features = sift(image, upright=True)
    turned = sift(np.rot90(image, k=2), upright=True)
    x, y = features.geometry[:, :2].T
    expected = np.stack([image.shape[1] - 1 - x, image.shape[0] - 1 - y], axis=1)
    one, other = (np.abs(expected[:, None] - turned.geometry[None, :, :2]).max(axis=2) < 0.2).nonzero()
    assert len(one) > 0.7 * len(expected)
    # A descriptor that followed the picture's turn would be the same; one of fixed angle is not.
    assert np.median((_unit(features)[one] * _unit(turned)[other]).sum(axis=1)) < 0.9


@pytest.mark.parametrize("upright", [False, True])
def test_the_strongest_come_first_and_fewer_are_the_first_of_more(upright):
    many, few = sift(scene(), upright=upright), sift(scene(), upright=upright, max_features=50)
    assert len(few.descriptors) == 50
    # Upright descriptors are computed on a pyramid that begins at the finest keypoint chosen.
    assert np.array_equal(few.geometry, many.geometry[:50])
    if not upright:
        assert np.array_equal(few.descriptors, many.descriptors[:50])


def test_equal_responses_do_not_pass_the_limit():
    tile = scene(64, 64)
    for limit in (10, 11, 12, 13):
        assert len(sift(np.tile(tile, (3, 3, 1)), max_features=limit).descriptors) == limit


def test_geometry_is_in_pixels_of_the_original():
    image = scene()
    same, original = sift(image), sift(image, original=(480, 960))
    x, y, size, angle = same.geometry.T
    assert np.allclose(original.geometry[:, 0], 3 * (x + 0.5) - 0.5, atol=1e-3)
    assert np.allclose(original.geometry[:, 1], 2 * (y + 0.5) - 0.5, atol=1e-3)
    assert np.allclose(original.geometry[:, 2], np.sqrt(6) * size)
    assert np.array_equal(original.geometry[:, 3], angle)


def test_a_blob_decoded_at_half_size_is_found_where_it_is_in_the_original():
    image = blob(12.0)
    half = cv2.resize(image, (80, 80), interpolation=cv2.INTER_AREA)
    full, small = sift(image).geometry[0], sift(half, original=(160, 160)).geometry[0]
    assert small[:2] == pytest.approx(full[:2], abs=0.5)
    assert small[2] == pytest.approx(full[2], rel=0.1)


@pytest.mark.parametrize("upright", [False, True])
def test_features_above_a_higher_contrast_threshold_are_the_first(upright):
    every, strong = sift(scene(), upright=upright), sift(scene(), upright=upright, contrast_threshold=0.06)
    assert 10 < len(strong.geometry) < 0.8 * len(every.geometry)
    assert np.array_equal(strong.geometry, every.geometry[: len(strong.geometry)])


def test_view_asks_for_the_longest_side():
    assert Sift(size=640).view.model_dump() == {"size": 640, "fit": "longest", "oversampling": 1.0}


def _unit(features: FeatureBatch) -> np.ndarray:
    rows = features.descriptors.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
