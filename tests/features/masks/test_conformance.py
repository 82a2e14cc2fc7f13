"""What every mask owes: the role's specification, run on all registered masks."""

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

import cbir.features  # noqa: F401 - registers the masks
from cbir.spec import methods, one_of
from tests.features.test_conformance import GREY, PICTURES, batch

SETTINGS: dict[str, dict[str, Any]] = {"segmentation": {"weights": "none", "size": 96}}


def specs() -> list[Any]:
    params = []
    for name, cls in methods("mask").items():
        required = {key: field.examples[0] for key, field in cls.model_fields.items() if field.is_required()}
        params.append(pytest.param(cls(**{**required, **SETTINGS.get(name, {})}), id=name))
    return params


@pytest.fixture(scope="module", params=specs())
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def masker(spec):
    return spec.build("cpu", {})


def test_masks_are_two_dimensional_and_from_0_to_1(masker):
    masks = masker.masks(batch([*PICTURES, GREY]))
    assert len(masks) == len(PICTURES) + 1
    for mask in masks:
        assert mask.dtype == np.float32
        assert mask.ndim == 2
        assert mask.size
        assert ((mask >= 0) & (mask <= 1)).all()


def test_no_images_have_no_masks(masker):
    assert len(masker.masks(batch([]))) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (96, 2)])
def test_tiny_images_are_no_error(masker, shape):
    assert np.isfinite(masker.masks(batch([np.full((*shape, 3), 77, np.uint8)]))[0]).all()


def test_a_mask_does_not_depend_on_the_batch(spec, masker):
    together = masker.masks(batch(PICTURES))
    for image, mask in zip(PICTURES[::-1], together[::-1], strict=True):
        assert masker.masks(batch([image]))[0].tobytes() == mask.tobytes()
    assert spec.build("cpu", {}).masks(batch(PICTURES))[0].tobytes() == together[0].tobytes()


def test_the_spec_comes_back_from_json(spec):
    again = TypeAdapter(one_of("mask")).validate_json(spec.model_dump_json())
    assert again == spec
    assert again.identity() == spec.identity()


def test_the_method_is_documented(spec):
    assert 0 < spec.threshold <= 1
    assert spec.assets == {}
    assert spec.paper
    assert type(spec).__doc__
