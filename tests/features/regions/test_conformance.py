"""What every proposer owes: the role's specification, run on all registered proposers."""

import itertools
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

import cbir.features  # noqa: F401 - registers the proposers
from cbir.spec import methods, one_of
from cbir.types import ImageBatch, Regions
from tests.features.test_conformance import GREY, PICTURES, batch, picture

PROPOSERS = methods("proposer")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "grid": [{}, {"levels": (1, 2, 3, 4), "overlap": 0.5}],
    "sliding_window": [{}, {"whole": False, "aspect_ratios": (0.25, 1, 4), "stride": 1.0}],
    "mser": [{"min_area": 0.005}, {"whole": False}],
    "selective_search": [{}, {"whole": False, "max_boxes": 5}],
    "edge_boxes": [{}, {"whole": False}],
    "rpn": [{"model": "fasterrcnn_mobilenet_v3_large_320_fpn", "weights": "none", "num_classes": 2}],
    "detector": [{"model": "ssdlite320_mobilenet_v3_large", "weights": "none", "num_classes": 2}],
}


def specs() -> list[Any]:
    params = []
    for name, cls in PROPOSERS.items():
        required = {key: field.examples[0] for key, field in cls.model_fields.items() if field.is_required()}
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            params.append(pytest.param(cls(**{**required, **settings}), id=f"{name}-{number}"))
    return params


@pytest.fixture(scope="module", params=specs())
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def proposer(spec):
    return spec.build("cpu", {})


def assert_same_bits(left: Regions, right: Regions) -> None:
    for name in ("offsets", "boxes"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


def assert_well_formed(regions: Regions, images: ImageBatch) -> None:
    assert regions.offsets.dtype == np.int64
    assert regions.offsets.shape == (len(images) + 1,)
    assert (np.diff(regions.offsets) >= 1).all()
    assert regions.boxes.dtype == np.float32
    assert regions.boxes.shape == (regions.offsets[-1], 4)
    assert regions.boxes.flags.c_contiguous
    for i, (height, width) in enumerate(images.sizes):
        left, top, right, bottom = regions.of(i).T
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left < right).all()
        assert (top < bottom).all()
        assert (right <= width).all()
        assert (bottom <= height).all()


def test_boxes_lie_in_the_originals_and_every_image_has_one(proposer):
    images = batch([*PICTURES, GREY])
    assert_well_formed(proposer.propose(images), images)


def test_no_images_have_no_regions(proposer):
    none = proposer.propose(batch([]))
    assert none.offsets.tolist() == [0]
    assert none.offsets.dtype == np.int64
    assert none.boxes.shape == (0, 4)
    assert none.boxes.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (96, 2), (5, 7)])
def test_tiny_images_are_no_error(proposer, shape):
    images = batch([np.full((*shape, 3), 77, np.uint8)])
    assert_well_formed(proposer.propose(images), images)


def test_the_whole_image_comes_first_if_it_is_asked_for(spec, proposer):
    if not getattr(spec, "whole", True):
        pytest.skip("not asked for")
    images = batch([*PICTURES, GREY])
    regions = proposer.propose(images)
    for i, (height, width) in enumerate(images.sizes):
        whole = (regions.of(i) == [0, 0, width, height]).all(axis=1)
        assert whole[0]
        assert whole.sum() == 1


def test_boxes_are_in_pixels_of_the_original(proposer):
    """What was decoded at half size is found at twice the coordinates."""
    image = PICTURES[1]
    decoded = ImageBatch(np.zeros(1, np.int64), [image], np.array([image.shape[:2]], np.int32))
    whole = ImageBatch(np.zeros(1, np.int64), [image], np.array([image.shape[:2]], np.int32) * 2)
    np.testing.assert_allclose(proposer.propose(whole).boxes, 2 * proposer.propose(decoded).boxes, rtol=1e-6)


def test_an_image_does_not_depend_on_its_neighbours(proposer):
    images = batch([*PICTURES[:3], GREY, *PICTURES[3:]])
    whole = proposer.propose(images)
    for sizes in ([1] * 6, [2, 4]):
        for a, b in itertools.pairwise(np.cumsum([0, *sizes])):
            part = proposer.propose(batch(list(images.images[a:b])))
            assert_same_bits(part, whole.take(np.arange(a, b)))


def test_another_build_gives_the_same_bits(spec, proposer):
    assert_same_bits(spec.build("cpu", {}).propose(batch(PICTURES)), proposer.propose(batch(PICTURES)))


def test_images_are_not_changed(proposer):
    images = [picture(96, 96, 7)]
    before = images[0].copy()
    proposer.propose(batch(images))
    assert np.array_equal(images[0], before)


def test_the_spec_comes_back_from_json(spec):
    again = TypeAdapter(one_of("proposer")).validate_json(spec.model_dump_json())
    assert again == spec
    assert again.identity() == spec.identity()


def test_the_method_is_documented(spec):
    assert spec.assets == {}
    assert spec.paper
    assert type(spec).__doc__
