"""Layers of networks against slices of the networks by hand; networks of torchvision and their weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.layers import LayerReader
from cbir.types import Floats, ImageBatch, Pixels
from tests.features.scenes import scene

TINY = {"backbone": "test_resnet", "weights": "none", "size": 96}
ALEXNET = {"backbone": "torchvision/alexnet", "weights": "none"}


def descriptor(picture: Pixels, **fields: Any) -> Floats:
    sizes = np.array([picture.shape[:2]], np.int32)
    extractor = Deep(**{**TINY, **fields}).build("cpu", {})
    return extractor.extract(ImageBatch(np.arange(1), [picture], sizes)).descriptors[0]


def outputs(picture: Pixels, *layers: int | str, **fields: Any) -> list[Tensor]:
    with torch.inference_mode():
        return Backbone(Deep(**{**TINY, **fields}), None, *layers).outputs(torch.from_numpy(picture[None].copy()))


def made(name: str, **arguments: Any) -> nn.Module:
    """What `weights: none` makes, by torchvision alone."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **arguments).eval()


def normalised(picture: Pixels, mean: Any = (0.485, 0.456, 0.406), std: Any = (0.229, 0.224, 0.225)) -> Tensor:
    pixels = torch.from_numpy(picture / 255).float().permute(2, 0, 1)[None]
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


@torch.inference_mode()
def test_fully_connected_codes_are_slices_of_alexnet():
    picture, network = scene(224, 224), made("alexnet")
    flat = torch.flatten(network.avgpool(network.features(normalised(picture))), 1)
    codes = outputs(picture, "fc6", "fc7", "fc8", "classifier.1", **ALEXNET)
    for code, end in zip(codes, (3, 6, 7, 2), strict=True):
        assert np.allclose(code, network.classifier[:end](flat), atol=1e-5)
    # What is before a rectification in place has negative values.
    assert [bool((code < 0).any()) for code in codes] == [False, False, True, True]


@torch.inference_mode()
def test_fully_connected_codes_are_slices_of_the_vgg_of_torchvision():
    network, pixels = made("vgg11", init_weights=False), torch.rand(1, 3, 64, 64)
    flat = torch.flatten(network.avgpool(network.features(pixels)), 1)
    expected = [network.classifier[:end](flat) for end in (2, 5, 7)]
    codes = LayerReader(network, ["fc6", "fc7", "fc8"], "torchvision/vgg11").read(pixels)
    assert all(np.allclose(*pair, atol=1e-5) for pair in zip(codes, expected, strict=True))


@torch.inference_mode()
def test_fully_connected_codes_are_slices_of_the_vgg_of_timm_averaged_in_larger_images():
    picture, arguments = scene(256, 256), {"mlp_ratio": 0.02}
    torch.manual_seed(0)
    network = timm.create_model("vgg11", **arguments).eval()
    fc6 = torch.relu(network.pre_logits.fc1(network.features(normalised(picture))))
    fc7 = torch.relu(network.pre_logits.fc2(fc6))
    assert fc6.shape == (1, 81, 2, 2)
    codes = outputs(picture, "fc6", "fc7", "fc8", backbone="vgg11", backbone_args=arguments)
    for code, expected in zip(
        codes, (fc6.mean((-2, -1)), fc7.mean((-2, -1)), network(normalised(picture))), strict=True
    ):
        assert np.allclose(code, expected, atol=1e-5)


def test_codes_are_descriptors_that_are_not_pooled():
    picture = scene(224, 224)
    (code,) = outputs(picture, "fc8", **ALEXNET)
    found = descriptor(picture, **ALEXNET, size=224, layers=["fc8"])
    assert np.allclose(found, unit(code[0].numpy()), atol=1e-6)


def test_the_mean_over_scales_of_codes_may_be_negative():
    """A cube root of a negative mean is no number, although the pooling is GeM."""
    found = descriptor(scene(224, 224), **ALEXNET, size=224, scales=(0.7071, 1.0), layers=["fc8"])
    assert (found < 0).any()
    assert np.isfinite(found).all()


@torch.inference_mode()
def test_a_module_gives_what_it_gives_in_the_network():
    picture = scene(96, 96)
    backbone = Backbone(Deep(**TINY), None)
    network, pixels = backbone.network, normalised(picture, (0.5,) * 3, (0.5,) * 3)
    expected = network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(pixels)))))
    (found,) = outputs(picture, "layer1")
    assert np.allclose(found, expected, atol=1e-5)
    assert torch.equal(found, outputs(picture, 1)[0])


def test_layers_in_one_pass_are_those_of_one_pass_each():
    picture = scene(96, 96)
    for layers, fields in [((-3, -1), {}), (("layer3", 1, 2, "conv1"), {}), (("features", "fc7"), ALEXNET)]:
        together = outputs(picture, *layers, **fields)
        for layer, found in zip(layers, together, strict=True):
            assert torch.equal(found, outputs(picture, layer, **fields)[0]), layer


def test_maps_and_codes_of_timms_vgg_come_from_one_pass():
    fields = {"backbone": "vgg11", "backbone_args": {"mlp_ratio": 0.02}}
    together = outputs(scene(96, 96), 4, "fc6", **fields)
    assert [found.ndim for found in together] == [4, 2]
    for layer, found in zip((4, "fc6"), together, strict=True):
        assert torch.equal(found, outputs(scene(96, 96), layer, **fields)[0])


def test_inner_products_of_several_layers_are_their_weighted_cosines():
    layers, weights = (1, 2, "layer4"), (0.5, 1.0, 2.0)
    pictures = [scene(96, 96, seed) for seed in (1, 2)]
    one, other = (descriptor(picture, layers=layers, layer_weights=weights) for picture in pictures)
    cosines = [np.dot(*(descriptor(picture, layers=[layer]) for picture in pictures)) for layer in layers]
    squares = np.square(weights)
    assert np.dot(one, other) == pytest.approx(np.dot(squares, cosines) / squares.sum(), abs=1e-6)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-6)
    assert len({round(float(cosine), 4) for cosine in cosines}) == 3


def test_layers_at_several_scales_stay_unit_vectors():
    fields = {"scales": (0.7071, 1.0), "size": 96}
    found = descriptor(scene(96, 96), layers=(2, "layer4"), layer_weights=(3, 4), **fields)
    first, second = (descriptor(scene(96, 96), layers=[layer], **fields) for layer in (2, "layer4"))
    assert np.allclose(found, np.concatenate([0.6 * first, 0.8 * second]), atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("alexnet", {}),
        ("squeezenet1_1", {}),
        ("shufflenet_v2_x0_5", {}),
        ("googlenet", {"aux_logits": False, "init_weights": False, "transform_input": True}),
    ],
)
def test_the_last_map_of_torchvisions_networks_is_what_they_pool(name, arguments):
    picture, network = scene(96, 128), made(name, **arguments)
    seen: list[Tensor] = []
    if name == "shufflenet_v2_x0_5":  # pools by a function
        network.conv5.register_forward_hook(lambda module, inputs, output: seen.append(output))
    else:
        pool = network.classifier if name.startswith("squeeze") else network.avgpool
        pool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network(normalised(picture))
    (found,) = outputs(picture, backbone=f"torchvision/{name}")
    assert np.allclose(found, seen[0], atol=1e-5)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    """A file like those of torchvision, with five classes."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    save_file(torchvision.models.alexnet(num_classes=5).state_dict(), path)
    return path


def test_weights_of_torchvision_are_loaded_and_its_classes_only_where_they_are_used(alexnet):
    picture, weights = scene(96, 96), str(alexnet)
    found = descriptor(picture, **{**ALEXNET, "weights": weights}, layers=["fc7"])
    assert not np.allclose(found, descriptor(picture, **ALEXNET, layers=["fc7"]), atol=1e-3)
    with pytest.raises(ConfigError, match=r"not of backbone .*of another shape \(classifier.6"):
        descriptor(picture, **{**ALEXNET, "weights": weights}, layers=["fc8"])
    args = {"num_classes": 5}
    assert len(descriptor(picture, **{**ALEXNET, "weights": weights}, layers=["fc8"], backbone_args=args)) == 5


def test_weights_of_another_network_are_refused(alexnet):
    with pytest.raises(ConfigError, match=r"not of backbone 'torchvision/squeezenet1_1': weights .* missing"):
        descriptor(scene(96, 96), backbone="torchvision/squeezenet1_1", weights=str(alexnet))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "torchvision/alex_net"}, r"extractor.backbone: there is no 'alex_net' .*did you mean 'alexnet'"),
        ({"backbone": "torchvision/resnet50"}, r"use that of timm, backbone: resnet50"),
        ({**ALEXNET, "weights": "hub"}, r"extractor.weights: nothing is downloaded .*alexnet-owt-.*\.pth"),
        ({**ALEXNET, "backbone_args": {"drop": 1}}, r"extractor.backbone_args: torchvision/alexnet refuses .*drop"),
        ({**ALEXNET, "layers": [-1]}, r"extractor.backbone: timm gives no intermediate maps .*\(features, avgpool"),
        ({"layers": ["fc6"]}, r"extractor.layers: test_resnet has no layer 'fc6'"),
        ({"layers": ["layer_4"]}, r"extractor.layers: test_resnet has no layer 'layer_4'; did you mean 'layer4'"),
        ({"layers": [9]}, r"extractor.layers: layers \[9\] of backbone .*index 9 is out of range"),
        ({"backbone": "test_vit", "layers": ["blocks.0"]}, r"'blocks.0' gives an output of shape .*, not maps"),
    ],
)
def test_layers_and_networks_that_there_are_not_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        descriptor(scene(96, 96), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [2, 1]}, "their numbers rise"),
        ({"layers": [1, -1]}, "all from the first"),
        ({"layers": ["fc6", "fc6"]}, "must differ"),
        ({"layers": [1], "layer_weights": (1, 2)}, "2 weights for 1 layers"),
    ],
)
def test_impossible_choices_of_layers_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Deep(**{**TINY, **fields})


def test_a_licence_is_kept_with_the_settings_and_changes_no_feature():
    noted, plain = Deep(**TINY, licence="CC-BY-4.0"), Deep(**TINY)
    assert noted.model_dump()["licence"] == "CC-BY-4.0"
    assert noted.identity() == plain.identity()
