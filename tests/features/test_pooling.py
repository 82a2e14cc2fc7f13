import pytest
import torch

from cbir.features.pooling import GeM, Mac, Spoc
from cbir.spec import methods

POOLINGS = methods("pooling")


def maps(shape: tuple[int, ...] = (3, 5, 7, 9), seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(POOLINGS))
def pooling(request):
    fields = POOLINGS[request.param].model_fields
    return POOLINGS[request.param](**{key: field.examples[0] for key, field in fields.items() if field.is_required()})


def test_every_pooling_gives_one_finite_value_per_map(pooling):
    pooled = pooling.pool(maps())
    assert (pooled.shape, pooled.dtype) == ((3, 5), torch.float32)
    assert torch.isfinite(pooled).all()


def test_every_pooling_takes_one_place_and_maps_of_zeros(pooling):
    assert torch.allclose(pooling.pool(maps((2, 4, 1, 1)).abs()), maps((2, 4, 1, 1)).abs()[..., 0, 0])
    assert torch.isfinite(pooling.pool(torch.zeros(1, 4, 3, 3))).all()


def test_every_pooling_comes_back_from_json(pooling):
    assert type(pooling).model_validate_json(pooling.model_dump_json()) == pooling


def test_gem_is_the_mean_of_powers():
    activations = maps().abs().double() + 0.1
    expected = activations.pow(2.5).mean((2, 3)).pow(1 / 2.5)
    assert torch.allclose(GeM(p=2.5).pool(activations), expected, rtol=1e-12)


def test_gem_of_power_1_is_the_average():
    activations = maps().abs()
    assert torch.allclose(GeM(p=1).pool(activations), Spoc().pool(activations), rtol=1e-6)


def test_gem_of_a_growing_power_rises_to_the_maximum():
    activations = 1000 * maps().abs()
    low, middle, high = (GeM(p=p).pool(activations) for p in (3, 30, 10_000))
    assert (low < middle).all()
    assert (middle < high).all()
    assert torch.allclose(high, Mac().pool(activations), rtol=1e-3)


def test_gem_counts_negative_activations_as_eps():
    activations = maps()
    assert torch.equal(GeM(eps=0.25).pool(activations), GeM(eps=0.25).pool(activations.clamp(min=0.25)))
    assert torch.allclose(GeM(eps=0.25).pool(-activations.abs()), torch.tensor(0.25))


def test_gem_has_the_gradient_of_its_formula():
    activations = (maps((1, 2, 3, 3)).abs().double() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(GeM().pool, (activations,))


def test_mac_does_not_change_under_a_cyclic_shift():
    activations = maps()
    assert torch.equal(Mac().pool(activations), Mac().pool(activations.roll((2, 3), (2, 3))))
    assert torch.equal(Mac().pool(activations), activations.reshape(3, 5, -1).max(dim=2).values)


def test_only_gem_averages_scales_by_its_power():
    assert (GeM(p=4).scale_power, Mac().scale_power, Spoc().scale_power) == (4, 1, 1)
