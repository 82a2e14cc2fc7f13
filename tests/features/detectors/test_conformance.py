"""What every detector owes: the role's specification, run on all registered detectors."""

from typing import Any

import numpy as np
import pytest

import cbir.features  # noqa: F401 - registers the detectors
from cbir.features.detectors.detector import DetectorSpec
from cbir.features.keypoints import by_strength
from cbir.spec import methods
from cbir.types import Floats, Pixels
from tests.features.scenes import quarter_turn, scene, turned

DETECTORS = methods("detector")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "brisk": [{}, {"octaves": 0}],
    "dense": [{}, {"step": 5, "sides": (15,)}],
}
MANY = 10**5


def specs() -> list[Any]:
    params = []
    for name, cls in DETECTORS.items():
        required = {key: field.examples[0] for key, field in cls.model_fields.items() if field.is_required()}
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            params.append(pytest.param(cls(**{**required, **settings}), id=f"{name}-{number}"))
    return params


@pytest.fixture(scope="module", params=specs())
def spec(request) -> DetectorSpec:
    return request.param


def detect(spec: DetectorSpec, image: Pixels) -> Floats:
    return spec.build("cpu", {}, MANY).detect(image)


def test_keypoints_are_as_declared(spec):
    keypoints = detect(spec, scene())
    assert keypoints.dtype == np.float32
    assert keypoints.shape[1] == (7 if spec.affine else 5)
    assert len(keypoints) > 20
    assert np.isfinite(keypoints).all()
    x, y, size, angle, response, *shape = keypoints.T
    assert ((x > -1) & (x < 320) & (y > -1) & (y < 240)).all()
    assert (size > 0).all()
    assert ((angle >= 0) & (angle <= 360)).all()
    assert spec.oriented or not angle.any()
    assert len(np.unique(response)) > 10
    if spec.affine:
        ratio, direction = shape
        assert ((ratio > 0) & (ratio <= 1)).all()
        assert ((direction >= 0) & (direction < 360)).all()


def test_a_turned_picture_has_the_same_keypoints_turned(spec):
    image = scene()
    expected, found = turned(detect(spec, image), image.shape[0]), detect(spec, quarter_turn(image))
    if not spec.oriented or not detect(spec, image)[:, 3].any():
        expected[:, 3] = 0.0
    assert share_found(expected, found) > 0.75


def share_found(expected: Floats, found: Floats) -> float:
    """For how many there is one within 1.5 px, a tenth of the size, and 10 degrees."""
    count = 0
    for row in expected:
        offset = np.abs(found - row)
        offset[:, 3] = np.minimum(offset[:, 3], 360 - offset[:, 3])
        same = (offset[:, :4] <= [1.5, 1.5, 0.1 * row[2], 10]).all(axis=1)
        if len(row) == 7:
            # A nearly round ellipse has no direction.
            off = np.minimum(offset[:, 6] % 180, 180 - offset[:, 6] % 180)
            same &= (offset[:, 5] < 0.1) & ((off < 10) | (row[5] > 0.8))
        count += bool(same.any())
    return count / len(expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (96, 2), (3, 3), (5, 7), (4, 300), (17, 9)])
def test_tiny_images_are_no_error(spec, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    keypoints = detect(spec, image)
    assert keypoints.shape == (len(keypoints), 7 if spec.affine else 5)
    assert np.isfinite(keypoints).all()


def test_a_plain_image_has_no_contrast(spec):
    keypoints = detect(spec, np.full((96, 96, 3), 128, np.uint8))
    assert not keypoints[:, 4].any()


def test_another_build_gives_the_same_bits_and_images_stay(spec):
    image = scene()
    before = image.copy()
    one, other = detect(spec, image), detect(spec, image)
    assert one[by_strength(one)].tobytes() == other[by_strength(other)].tobytes()
    assert np.array_equal(image, before)


def test_a_limit_keeps_the_strongest(spec):
    few = spec.build("cpu", {}, 20).detect(scene())
    assert len(few) >= 20


def test_the_spec_tells_what_it_is(spec):
    assert type(spec)(**spec.model_dump()) == spec
    assert spec.paper
    assert type(spec).__doc__
