"""Attention poolings: what is given more weight, and which files hold the weights."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.nn.functional import avg_pool2d, softplus

from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.delf import Delf
from cbir.features.pooling.attention import Attention, WeightedSpoc
from cbir.features.pooling.spoc import Spoc
from tests.features.pooling.maps import maps
from tests.features.test_conformance import PICTURES, batch

CHANNELS = 5


def layers(channels: int = CHANNELS, factor: float = 1.0) -> dict[str, torch.Tensor]:
    shapes = {"conv1.weight": (8, channels, 1, 1), "conv1.bias": (8,), "conv2.weight": (1, 8, 1, 1), "conv2.bias": (1,)}
    return {name: factor * maps(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def saved(path: Path, state: dict[str, torch.Tensor]) -> str:
    save_file(state, path)
    return str(path)


def attended(weights: str, activations: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return Attention(weights=weights).build("cpu", {})(activations)


def test_a_place_weighs_as_much_as_its_vector_is_long():
    activations = maps()
    places = activations.flatten(2)
    norms = places.square().sum(1, keepdim=True).sqrt()
    expected = (places * norms).sum(2) / norms.sum(2)
    assert torch.allclose(attended("norm", activations), expected, rtol=1e-5, atol=1e-6)


def test_equal_weights_are_spoc(tmp_path):
    level = saved(tmp_path / "level.safetensors", layers(factor=0.0))
    assert torch.allclose(attended(level, maps()), Spoc().pool(maps()), atol=1e-6)
    unit = torch.nn.functional.normalize(maps())
    assert torch.allclose(attended("norm", unit), Spoc().pool(unit), atol=1e-6)


def test_the_trained_attention_is_the_softplus_of_delfs_layers(tmp_path):
    activations, state = maps(), layers()
    places = activations.flatten(2).transpose(1, 2)
    hidden = torch.relu(places @ state["conv1.weight"][:, :, 0, 0].T + state["conv1.bias"])
    scores = softplus(hidden @ state["conv2.weight"][:, :, 0, 0].T + state["conv2.bias"])
    expected = (places * scores).sum(1) / scores.sum(1)
    found = attended(saved(tmp_path / "head.safetensors", state), activations)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, Spoc().pool(activations), atol=1e-3)


def test_the_file_of_delf_serves_here_too(tmp_path):
    path = saved(tmp_path / "head.safetensors", layers(96))
    delf = Delf(backbone="test_resnet", weights="none", size=96, scales=(1.0,), stage=-1, attention=path)
    deep = Deep(backbone="test_resnet", weights="none", size=96, pooling=Attention(weights=path))
    assert delf.build("cpu", {}).extract(batch(PICTURES[:1])).descriptors.shape[1] == 96
    assert deep.build("cpu", {}).extract(batch(PICTURES[:1])).descriptors.shape == (1, 96)


def test_weights_of_other_maps_are_refused(tmp_path):
    weights = saved(tmp_path / "head.safetensors", layers(7))
    with pytest.raises(ConfigError, match=r"extractor.pooling.weights: an attention of 7 maps for 5; name the file"):
        attended(weights, maps())


def test_other_files_are_refused(tmp_path):
    weights = saved(tmp_path / "head.safetensors", {"conv.weight": torch.zeros(1, 5, 1, 1)})
    with pytest.raises(ConfigError, match=r"extractor.pooling.weights: .* must hold conv1.weight \(A, C, 1, 1\)"):
        attended(weights, maps())
    with pytest.raises(ConfigError, match=r"extractor.pooling.weights: there is no file .*absent.pth"):
        attended(str(tmp_path / "absent.pth"), maps())
    with pytest.raises(
        ValidationError, match="weights must be 'norm' or the path or s3:// URI of a file, found 'nrom'"
    ):
        Attention(weights="nrom")


def test_weighted_spoc_averages_neighbours_before_it_weighs():
    activations = maps()
    norms = activations.norm(dim=1, keepdim=True)
    around = avg_pool2d(activations, 3, 1, 1, count_include_pad=False)
    expected = (around * norms).sum((2, 3)) / norms.sum((2, 3))
    assert torch.allclose(WeightedSpoc().pool(activations), expected, rtol=1e-6)
