import pytest
import torch

from cbir.errors import ConfigError
from cbir.features.pooling.gem import GeM
from cbir.features.pooling.mac import Mac
from cbir.features.pooling.spoc import Spoc
from tests.features.pooling.maps import maps


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


def test_a_number_is_a_list_of_one():
    assert GeM(p=3) == GeM(p=[3.0]) == GeM()


@pytest.mark.parametrize("p", [3.0, (1.5, 4.0)])
def test_gem_has_the_gradient_of_its_formula(p):
    activations = (maps((1, 2, 3, 3)).abs().double() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(GeM(p=p).pool, (activations,))


def test_one_exponent_per_map_is_each_map_with_its_own():
    activations = maps().abs()
    exponents = (1.0, 2.0, 3.0, 10.0, 0.5)
    expected = torch.stack([GeM(p=p).pool(activations)[:, i] for i, p in enumerate(exponents)], dim=1)
    assert torch.allclose(GeM(p=exponents).pool(activations), expected, rtol=1e-6)


def test_as_many_exponents_as_maps_are_needed():
    with pytest.raises(ConfigError, match=r"extractor.pooling.p: 2 exponents for 5 maps; give one number"):
        GeM(p=(1.0, 2.0)).pool(maps())


def test_only_gem_with_one_exponent_averages_scales_by_its_power():
    assert (GeM(p=4).scale_power, GeM(p=(4.0, 4.0)).scale_power, Mac().scale_power, Spoc().scale_power) == (4, 1, 1, 1)
