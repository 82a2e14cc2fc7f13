"""What every pooling owes: the role's specification, run on all registered poolings."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

import cbir.features  # noqa: F401 - registers the poolings
from cbir.features.deep import Deep
from cbir.features.pooling import PoolingSpec
from cbir.spec import methods, one_of
from tests.features.pooling.maps import maps
from tests.features.test_conformance import GREY, PICTURES, batch

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "gem": [{}, {"p": (1.0, 2.0, 3.0, 4.0, 5.0)}],
    "rmac": [{}, {"whole": True, "levels": 4}],
    "spoc": [{}, {"centre_prior": 0.333}],
    "blockwise_max": [{}, {"rows": 3, "columns": 1}],
}
TINY = {"backbone": "test_resnet", "weights": "none", "size": 96}


def made(name: str, settings: dict[str, Any]) -> PoolingSpec:
    fields = methods("pooling")[name].model_fields
    required = {key: field.examples[0] for key, field in fields.items() if field.is_required()}
    return methods("pooling")[name](**{**required, **settings})


def specs() -> list[Any]:
    return [
        pytest.param(made(name, settings), id=f"{name}-{number}")
        for name in methods("pooling")
        for number, settings in enumerate(SETTINGS.get(name, [{}]))
    ]


@pytest.fixture(scope="module", params=specs())
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def pool(spec):
    return spec.build("cpu", {})


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 5, 12, 4), (1, 5, 1, 1), (2, 5, 1, 3)])
def test_every_image_has_one_finite_vector(pool, shape):
    pooled = pool(maps(shape))
    assert (pooled.ndim, len(pooled), pooled.dtype) == (2, shape[0], torch.float32)
    assert torch.isfinite(pooled).all()
    assert pooled.shape[1] == pool(maps((1, 5, 8, 8))).shape[1]


@pytest.mark.parametrize("activations", [torch.zeros(2, 5, 4, 3), -maps((2, 5, 4, 3)).abs()], ids=["zeros", "negative"])
def test_maps_without_activations_give_no_nan(pool, activations):
    assert torch.isfinite(pool(activations)).all()


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_tiny_and_huge_activations_give_no_nan(pool, factor):
    assert torch.isfinite(pool(maps() * factor)).all()


def test_a_vector_depends_on_its_own_image_alone(pool):
    other = torch.cat([maps()[:1], maps(seed=1), torch.zeros(1, 5, 7, 9)])
    assert torch.allclose(pool(other)[0], pool(maps())[0], rtol=1e-6)


def test_other_images_have_other_vectors(pool):
    one, other = torch.nn.functional.normalize(pool(maps((2, 5, 7, 9)).abs()))
    assert one @ other < 0.9999


def test_the_power_of_scales_suits_the_signs(spec, pool):
    """Negative values have no root."""
    assert spec.scale_power == 1 or (pool(maps()) >= 0).all()


def test_the_layout_in_memory_does_not_matter(pool):
    turned = maps().to(memory_format=torch.channels_last)
    assert torch.allclose(pool(turned), pool(maps()), rtol=1e-5, atol=1e-6)


def test_the_spec_comes_back_from_json(spec):
    again = TypeAdapter(one_of("pooling")).validate_json(spec.model_dump_json())
    assert again == spec
    assert again.identity() == spec.identity()


def test_the_method_is_documented(spec):
    assert spec.assets == {}
    assert spec.paper
    assert type(spec).__doc__


@pytest.mark.parametrize("name", list(methods("pooling")))
@pytest.mark.parametrize("settings", [{}, {"fit": "longest", "scales": (0.7071, 1.0)}], ids=["square", "longest"])
def test_descriptors_have_length_1_and_do_not_depend_on_the_batch(name, settings):
    extractor = Deep(**TINY, **settings, pooling=made(name, {})).build("cpu", {})
    together = extractor.extract(batch([*PICTURES, GREY])).descriptors
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    for image, row in zip(PICTURES[::-1], together[len(PICTURES) - 1 :: -1], strict=True):
        assert extractor.extract(batch([image])).descriptors[0].tobytes() == row.tobytes()
