"""Sum poolings against their formulas, written out."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cbir.features.pooling.spoc import Crow, Interactive, Spoc
from tests.features.pooling.maps import maps, rectified


def gaussian(height: int, width: int, sigma: float) -> torch.Tensor:
    """exp(-((x - W/2)^2 + (y - H/2)^2) / 2 sigma^2) at the centres of places."""
    y, x = np.mgrid[:height, :width] + 0.5
    return torch.from_numpy(np.exp(-((x - width / 2) ** 2 + (y - height / 2) ** 2) / (2 * sigma**2)))


@pytest.mark.parametrize(("height", "width"), [(7, 7), (6, 9), (12, 5)])
def test_the_centre_prior_of_the_paper(height, width):
    """Sigma is a third of the distance from the centre to the nearest border."""
    activations = rectified((2, 5, height, width))
    weighted = (activations * gaussian(height, width, min(height, width) / 2 / 3)).sum((2, 3))
    assert torch.allclose(normalize(Spoc(centre_prior=1 / 3).pool(activations)), normalize(weighted), atol=1e-12)


def test_a_wide_prior_is_none_and_a_narrow_one_is_the_centre():
    activations = maps()
    assert torch.allclose(Spoc(centre_prior=1e6).pool(activations), Spoc().pool(activations), atol=1e-6)
    assert torch.allclose(Spoc(centre_prior=1e-6).pool(activations), activations[:, :, 3, 4])
    four = maps((2, 5, 4, 4))
    assert torch.allclose(Spoc(centre_prior=1e-6).pool(four), four[:, :, 1:3, 1:3].mean((2, 3)), atol=1e-6)


def crow(activations: np.ndarray) -> np.ndarray:
    """Of one image (C, H, W): Kalantidis et al., equations written out with a = b = 2."""
    sums = activations.sum(axis=0)
    places = (sums / (sums**2).sum() ** (1 / 2)) ** (1 / 2)
    nonzero = (activations > 0).mean(axis=(1, 2))
    rarity = np.array([np.log(nonzero.sum() / q) if q else 0.0 for q in nonzero])
    return (activations * places).sum(axis=(1, 2)) * rarity


def test_crow_is_its_formula():
    activations = rectified((3, 6, 7, 9))
    activations[:, 2] = 0
    activations[0, 4, 1:] = 0
    expected = np.stack([crow(image) for image in activations.numpy()])
    assert np.allclose(Crow().pool(activations).numpy(), expected, rtol=1e-12)


def test_uniform_sums_weigh_all_places_alike():
    """Two maps that add up to 1 everywhere: what is left are the weights of maps."""
    first = rectified((1, 1, 6, 6)) / 10
    activations = torch.cat([first, 1 - first], dim=1)
    nonzero = (activations > 0).double().mean((2, 3))
    expected = activations.sum((2, 3)) * (nonzero.sum() / nonzero).log()
    assert torch.allclose(normalize(Crow().pool(activations)), normalize(expected), atol=1e-12)


def test_maps_of_zeros_give_0_and_rare_maps_weigh_more():
    activations = torch.zeros(1, 3, 4, 4)
    activations[0, 0] = 1.0
    activations[0, 1, 0, 0] = 16.0
    pooled = Crow().pool(activations)[0]
    assert pooled[2] == 0
    assert pooled[1] > pooled[0] > 0


def test_crow_counts_negative_activations_as_0():
    assert torch.equal(Crow().pool(maps()), Crow().pool(maps().clamp(min=0)))


def test_all_maps_with_a_constant_sum_are_spoc():
    shares = maps((2, 5, 6, 7)).softmax(dim=1)
    assert torch.allclose(Interactive(strongest=5).pool(shares), Spoc().pool(shares), atol=1e-6)
    assert torch.equal(Interactive(strongest=99).pool(shares), Interactive(strongest=5).pool(shares))


def test_places_weigh_what_the_strongest_maps_say():
    activations = rectified((1, 4, 5, 5))
    activations[0, 2] += 10
    activations[0, 1] += 5
    weights = activations[0, 1] + activations[0, 2]
    expected = (activations[0] * weights).sum((1, 2)) / weights.sum()
    assert torch.allclose(Interactive(strongest=2).pool(activations)[0], expected, rtol=1e-12)


def test_of_equally_strong_maps_the_first_is_taken():
    activations = torch.zeros(1, 2, 1, 2)
    activations[0, 0, 0, 0] = activations[0, 1, 0, 1] = 1.0
    assert Interactive(strongest=1).pool(activations).tolist() == [[1.0, 0.0]]
