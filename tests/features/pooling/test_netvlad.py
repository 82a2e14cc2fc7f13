"""NetVLAD against VLAD, its own formula, and the two initialisations written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.nn.functional import normalize

from cbir.errors import ConfigError
from cbir.features.networks.netvlad import NetVladLayer, initialised
from cbir.features.pooling.netvlad import NetVlad
from tests.features.pooling.maps import maps

WORDS = normalize(maps((4, 5), seed=3)).double() * torch.tensor([[0.5], [1.0], [1.5], [0.8]])
"""Of different lengths, so that |c| and |c|^2 differ."""

SAMPLE = normalize(maps((200, 5), seed=4)).double()


def places(activations: torch.Tensor) -> np.ndarray:
    """Unit vectors (N, P, C)."""
    return normalize(activations).flatten(2).transpose(1, 2).numpy()


def squared_distances(rows: np.ndarray, words: torch.Tensor = WORDS) -> np.ndarray:
    return ((rows[..., None, :] - words.numpy()) ** 2).sum(-1)


def layer_of(alpha: float) -> NetVladLayer:
    """w = 2 alpha c, b = -alpha |c|^2."""
    return NetVladLayer(WORDS, 2 * alpha * WORDS, -alpha * WORDS.square().sum(1))


def sums(layer: NetVladLayer, activations: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return layer.residual_sums(activations).numpy()


def test_a_hard_assignment_is_vlad():
    activations = maps().double()
    rows = places(activations)
    nearest = squared_distances(rows).argmin(-1)
    expected = np.zeros((3, 4, 5))
    for image in range(3):
        np.add.at(expected[image], nearest[image], rows[image] - WORDS.numpy()[nearest[image]])
    assert np.allclose(sums(layer_of(1e6), activations), expected, atol=1e-6)


def test_the_assignment_is_a_softmin_of_squared_distances():
    activations, alpha = maps().double(), 1.7
    rows = places(activations)
    shares = np.exp(-alpha * squared_distances(rows))
    shares /= shares.sum(-1, keepdims=True)
    expected = np.einsum("npw,npwc->nwc", shares, rows[:, :, None] - WORDS.numpy())
    assert np.allclose(sums(layer_of(alpha), activations), expected, atol=1e-12)


def test_words_then_the_whole_have_length_1():
    activations = maps().double()
    with torch.inference_mode():
        found = layer_of(1.7)(activations).numpy()
    blocks = sums(layer_of(1.7), activations)
    expected = (blocks / np.linalg.norm(blocks, axis=2, keepdims=True)).reshape(3, 20) / 2
    assert np.allclose(found, expected, atol=1e-12)


def test_the_order_of_places_does_not_matter():
    activations = maps().double()
    mixed = activations.flatten(2)[:, :, torch.randperm(63, generator=torch.Generator().manual_seed(0))]
    assert np.allclose(sums(layer_of(1.7), mixed.reshape(3, 5, 9, 7)), sums(layer_of(1.7), activations), atol=1e-12)


def test_quarters_add_up_to_the_whole():
    activations = maps((2, 5, 4, 6)).double()
    quarters = [activations[:, :, y : y + 2, x : x + 3] for y in (0, 2) for x in (0, 3)]
    layer = layer_of(1.7)
    assert np.allclose(sum(sums(layer, quarter) for quarter in quarters), sums(layer, activations), atol=1e-12)
    upper = sums(layer, activations[:, :, :2])
    assert np.allclose(sums(layer, quarters[0]) + sums(layer, quarters[1]), upper, atol=1e-12)


def test_initialised_by_distances_as_in_the_paper():
    """Of every row its two nearest words; the bias has the square of the length, not the length."""
    layer = initialised(WORDS, SAMPLE, "vladv2")
    nearest = np.sort(squared_distances(SAMPLE.numpy()), axis=1)
    alpha = -np.log(0.01) / np.mean(nearest[:, 1] - nearest[:, 0])
    assert np.allclose(layer.conv.weight.detach().numpy()[:, :, 0, 0], 2 * alpha * WORDS.numpy())
    assert np.allclose(layer.conv.bias.detach().numpy(), -alpha * (WORDS.numpy() ** 2).sum(1))
    wrong = NetVladLayer(WORDS, 2 * alpha * WORDS, -alpha * WORDS.norm(dim=1))
    assert not np.allclose(sums(wrong, maps().double()), sums(layer, maps().double()), atol=0.01)


def test_initialised_by_directions():
    layer = initialised(WORDS, SAMPLE, "vlad")
    directions = WORDS.numpy() / np.linalg.norm(WORDS.numpy(), axis=1, keepdims=True)
    dots = np.sort(SAMPLE.numpy() @ directions.T, axis=1)[:, ::-1]
    alpha = -np.log(0.01) / np.mean(dots[:, 0] - dots[:, 1])
    assert np.allclose(layer.conv.weight.detach().numpy()[:, :, 0, 0], alpha * directions)
    assert layer.conv.bias is None
    assert np.allclose(layer.centroids.detach().numpy(), WORDS.numpy())


@pytest.mark.parametrize("form", ["vlad", "vladv2"])
def test_the_second_nearest_word_is_a_hundredth_as_likely_on_average(form):
    layer = initialised(WORDS, SAMPLE, form)
    with torch.inference_mode():
        logits = layer.conv(SAMPLE[:, :, None, None])[:, :, 0, 0]
    best = logits.topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).mean().item() == pytest.approx(np.log(100))


@pytest.mark.parametrize(("words", "sample"), [(WORDS[:1].repeat(4, 1), SAMPLE), (WORDS, SAMPLE[:0])])
def test_words_that_the_sample_cannot_tell_apart_are_refused(words, sample):
    with pytest.raises(ValueError, match="as near to two words"):
        initialised(words, sample)


def test_the_layer_can_be_trained():
    layer = initialised(WORDS, SAMPLE)
    activations = maps((1, 5, 2, 2)).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (activations,))
    layer(activations).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def saved(path: Path, **changes: torch.Tensor) -> str:
    state = {
        name: value.float().detach().contiguous() for name, value in initialised(WORDS, SAMPLE).state_dict().items()
    }
    save_file({**state, **changes}, path)
    return str(path)


@pytest.mark.parametrize("form", ["vlad", "vladv2"])
def test_a_saved_layer_comes_back(tmp_path, form):
    layer = initialised(WORDS.float(), SAMPLE.float(), form).requires_grad_(False)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    spec = NetVlad(weights=str(tmp_path / "layer.safetensors"), words=4)
    assert spec.assets == {"weights": spec.weights}
    assert torch.equal(spec.build("cpu", {})(maps()), layer(maps()))
    remote = NetVlad(weights="s3://models/layer.safetensors", words=4)
    assert torch.equal(remote.build("cpu", {"weights": tmp_path / "layer.safetensors"})(maps()), layer(maps()))


def test_random_words_are_a_function_of_the_seed_and_draw_nothing_global():
    before = torch.random.get_rng_state()
    one, again, other = (NetVlad(weights="none", words=8, seed=seed).build("cpu", {})(maps()) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.shape == (3, 40)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)


def test_random_words_that_were_drawn_in_inference_serve_outside():
    pool = NetVlad(weights="none").build("cpu", {})
    with torch.inference_mode():
        pool(maps())
    activations = maps().requires_grad_()
    pool(activations).sum().backward()
    assert activations.grad is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": 64}, r"must hold centroids \(64, C\), .* set words if only their number differs"),
        ({"extra": torch.zeros(1)}, r"must hold centroids .* found \{.*'extra'"),
        ({"conv.weight": torch.zeros(4, 6, 1, 1)}, r"conv.weight \(4, C, 1, 1\)"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, changes, message):
    words = changes.pop("words", 4)
    spec = NetVlad(weights=saved(tmp_path / "layer.safetensors", **changes), words=words)
    with pytest.raises(ConfigError, match=rf"extractor.pooling.weights: .*{message}"):
        spec.build("cpu", {})


def test_words_of_another_backbone_are_refused(tmp_path):
    pool = NetVlad(weights=saved(tmp_path / "layer.safetensors"), words=4).build("cpu", {})
    with pytest.raises(ConfigError, match=r"extractor.pooling.weights: words of 5 numbers for 6 maps; name the file"):
        pool(maps((1, 6, 3, 3)))


def test_weights_must_be_named():
    with pytest.raises(ValidationError, match="weights"):
        NetVlad()
    with pytest.raises(ValidationError, match=r"weights must be the path or s3:// URI of a file .*, or 'none'"):
        NetVlad(weights="vgg16")
    with pytest.raises(ConfigError, match=r"extractor.pooling.weights: there is no file .*absent"):
        NetVlad(weights="/absent.safetensors").build("cpu", {})
