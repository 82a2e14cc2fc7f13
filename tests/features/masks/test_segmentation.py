"""Semantic masks against plain torchvision."""

import functools

import numpy as np
import pytest
import torch
import torchvision

from cbir.errors import ConfigError
from cbir.features.masks.segmentation import Segmentation
from cbir.types import Floats, ImageBatch, Pixels
from tests.features.lively import lively

MODEL = "lraspp_mobilenet_v3_large"
TINY = {"model": MODEL, "weights": "none"}
IMAGE: Pixels = np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8)


@functools.cache
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        made = torchvision.models.get_model(MODEL, weights=None, weights_backbone=None, num_classes=21)
        return lively(made, torch.randn(4, 3, 64, 96))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that also holds what only training needs."""
    path = tmp_path_factory.mktemp("segmentation") / "weights.pth"
    torch.save({**network().state_dict(), "aux_classifier.0.weight": torch.zeros(2)}, path)
    return str(path)


def mask(image: Pixels = IMAGE, **fields: object) -> Floats:
    batch = ImageBatch(np.zeros(1, np.int64), [image], np.array([image.shape[:2]], np.int32))
    return Segmentation(**{**TINY, **fields}).build("cpu", {}).masks(batch)[0]


def test_the_mask_is_one_minus_the_probability_of_the_dropped_classes(weights: str):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.tensor(IMAGE).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode():
        likely = network()(pixels[None])["out"][0].softmax(0)
    expected = 1 - (likely[3] + likely[20]).numpy()
    found = mask(drop=(3, 20), weights=weights)
    assert found.shape == IMAGE.shape[:2]
    assert np.ptp(found) > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_without_the_dropped_classes_nothing_is_left(weights: str):
    assert mask(drop=tuple(range(21)), weights=weights).max() < 1e-5


def test_the_network_sees_at_most_size_pixels():
    assert mask(size=48).shape == (32, 48)
    assert mask(size=4000).shape == (64, 96)


def test_weights_of_another_network_are_refused(weights: str):
    assert Segmentation(**{**TINY, "weights": weights}).assets == {"weights": weights}
    with pytest.raises(ConfigError, match=r"mask.weights: .* is not of lraspp.* with 20 classes"):
        mask(weights=weights, num_classes=20)


def test_what_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"mask.model: torchvision has no such model 'lraspp'"):
        mask(model="lraspp")
    with pytest.raises(ValueError, match="drop: no class 21; the classes are 0 to 20"):
        Segmentation(**TINY, drop=(21,))
