"""What every descriptor owes: the role's specification, run on all registered descriptors."""

from typing import Any

import numpy as np
import pytest

import cbir.features  # noqa: F401 - registers the descriptors
from cbir.features.descriptors.descriptor import Descriptor, DescriptorSpec
from cbir.features.keypoints import as_ellipses
from cbir.spec import methods
from cbir.types import Pixels
from tests.features.scenes import circles, quarter_turn, scene, turned

DESCRIPTORS = methods("descriptor")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "backbone": [{"backbone": "test_resnet", "weights": "none"}],
    "brief": [{"oriented": True}, {"bits": 512}],
    "freak": [{}, {"oriented": False}],
    "mkd": [{"kernels": "cart"}],
}
NOT_TURNING = {"brief-1", "freak-1"}


def specs() -> list[Any]:
    params = []
    for name, cls in DESCRIPTORS.items():
        required = {key: field.examples[0] for key, field in cls.model_fields.items() if field.is_required()}
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            params.append(pytest.param(cls(**{**required, **settings}), id=f"{name}-{number}"))
    return params


@pytest.fixture(scope="module", params=specs())
def spec(request) -> DescriptorSpec:
    return request.param


@pytest.fixture(scope="module")
def descriptor(spec) -> Descriptor:
    return spec.build("cpu", {})


def dissimilarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The Hamming distance of bits, the Euclidean of numbers, row by row."""
    bits = np.unpackbits(left ^ right, axis=1) if left.dtype == np.uint8 else None
    is_histogram = left.shape[1] % 128 in (0, 36)
    if bits is not None and not is_histogram:
        return bits.sum(axis=1)
    return np.linalg.norm(left.astype(float) - right.astype(float), axis=1)


@pytest.mark.parametrize("columns", [5, 7])
def test_rows_are_as_declared(descriptor, columns):
    keypoints = circles() if columns == 5 else as_ellipses(circles())
    rows, positions = descriptor.describe(scene(), keypoints)
    assert rows.shape == (len(positions), descriptor.dim)
    assert rows.dtype == descriptor.dtype
    assert descriptor.dtype in (np.float32, np.uint8)
    assert positions.dtype == np.int64
    assert (np.diff(positions) > 0).all()
    assert len(positions) > 0.5 * len(keypoints)
    assert 0 <= positions[0] <= positions[-1] < len(keypoints)
    assert np.isfinite(rows).all()


def test_a_circle_is_an_ellipse(descriptor):
    one, kept = descriptor.describe(scene(), circles())
    other, also_kept = descriptor.describe(scene(), as_ellipses(circles()))
    assert np.array_equal(kept, also_kept)
    strangers = dissimilarity(one, one[::-1])
    assert np.median(dissimilarity(one, other)) < 0.35 * np.median(strangers[strangers > 0])


def test_a_turned_picture_has_the_same_rows(request, descriptor):
    if request.node.callspec.id in NOT_TURNING:
        pytest.skip("this descriptor is upright")
    image, keypoints = scene(), circles()
    plain, kept = descriptor.describe(image, keypoints)
    again, also_kept = descriptor.describe(quarter_turn(image), turned(keypoints, image.shape[0]))
    _, one, other = np.intersect1d(kept, also_kept, return_indices=True)
    assert len(one) > 0.5 * len(keypoints)
    strangers = dissimilarity(plain[one], np.roll(plain[one], 1, axis=0))
    assert np.median(dissimilarity(plain[one], again[other])) < 0.35 * np.median(strangers)


def test_no_keypoints_give_no_rows(descriptor):
    for columns in (5, 7):
        rows, positions = descriptor.describe(scene(), np.empty((0, columns), np.float32))
        assert (rows.shape, rows.dtype) == ((0, descriptor.dim), descriptor.dtype)
        assert (positions.shape, positions.dtype) == ((0,), np.int64)


@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (5, 7), (17, 9), (64, 70)])
def test_keypoints_of_any_size_in_tiny_images_are_no_error(descriptor, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    table = [[shape[1] / 2, shape[0] / 2, size, 30.0, 1.0] for size in (0.5, 4.0, 30.0, 500.0)]
    rows, positions = descriptor.describe(image, np.array(table, np.float32))
    assert len(rows) == len(positions) <= 4
    assert np.isfinite(rows).all()


def test_keypoints_at_the_border_are_described_or_left_out(descriptor):
    places = np.array([[x, y] for x in (0, 160, 319) for y in (0, 239)], np.float32)
    table = np.column_stack([places, np.full((6, 1), 8.0), np.zeros((6, 1)), np.ones((6, 1))]).astype(np.float32)
    rows, positions = descriptor.describe(scene(), table)
    assert len(rows) == len(positions) <= 6
    assert np.isfinite(rows).all()


def test_another_build_gives_the_same_bits_and_nothing_is_changed(spec, descriptor):
    image, keypoints = scene(), circles()
    before: tuple[Pixels, np.ndarray] = image.copy(), keypoints.copy()
    one, other = descriptor.describe(image, keypoints), spec.build("cpu", {}).describe(image, keypoints)
    assert [array.tobytes() for array in one] == [array.tobytes() for array in other]
    assert np.array_equal(image, before[0])
    assert np.array_equal(keypoints, before[1])


def test_rows_hardly_change_with_brightness_and_contrast(descriptor):
    image = scene()
    changed = (0.8 * image.astype(float) + 20).round().astype(np.uint8)
    plain, kept = descriptor.describe(image, circles())
    other, also_kept = descriptor.describe(changed, circles())
    _, one, two = np.intersect1d(kept, also_kept, return_indices=True)
    strangers = dissimilarity(plain[one], np.roll(plain[one], 1, axis=0))
    assert np.median(dissimilarity(plain[one], other[two])) < 0.35 * np.median(strangers)


def test_the_spec_tells_what_it_is(spec):
    assert type(spec)(**spec.model_dump()) == spec
    assert spec.paper
    assert type(spec).__doc__
