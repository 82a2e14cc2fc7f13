"""Networks of timm: created with random weights or those of its hub."""

import difflib
import inspect
from typing import Any

import timm
import torch
from torch import nn

from cbir.errors import ConfigError
from cbir.features.backbone import Layer, NetworkSpec
from cbir.features.networks.layers import CLASSIFIER_CODE
from cbir.features.networks.loading import Created

__all__ = ["create"]

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}
"""What lets a transformer take images of any size: it interpolates its position embedding and fills up patches."""


def create(spec: NetworkSpec, layers: tuple[Layer, ...]) -> Created:
    """The network, without its classifier unless a layer needs it. ConfigError for one that cannot be had."""
    name = spec.backbone
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists those that are known"
        raise ConfigError(f"extractor.backbone: timm has no model {name!r}; {hint}")
    described: Any = timm.get_pretrained_cfg(name)
    classifiers = _classifiers(described.classifier)
    with_classifier = not {CLASSIFIER_CODE, *classifiers}.isdisjoint(layers)
    defaults: dict[str, Any] = {} if with_classifier else {"num_classes": 0}
    network = _instance(spec, defaults)
    flexible = {key: value for key, value in ANY_SIZE.items() if _takes(network, key)}
    if flexible and "img_size" not in spec.backbone_args:
        network = _instance(spec, {**defaults, **flexible})
    cfg: Any = network.pretrained_cfg
    # With what stands between the classifier and the features.
    unused = () if with_classifier else tuple(f"{classifier.split('.')[0]}." for classifier in classifiers)
    return Created(network, layers, cfg["mean"], cfg["std"], unused)


def _classifiers(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the modules that turn features into classes."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _takes(network: nn.Module, argument: str) -> bool:
    return any(argument in inspect.signature(cls).parameters for cls in type(network).__mro__)


def _instance(spec: NetworkSpec, defaults: dict[str, Any]) -> nn.Module:
    arguments = {**defaults, **spec.backbone_args}
    try:
        if spec.weights == "none" or spec.weights_are_a_file:
            return _random(spec, arguments)
        return _from_hub(spec, arguments)
    except TypeError as error:
        raise ConfigError(f"extractor.backbone_args: {spec.backbone} refuses {spec.backbone_args}: {error}") from error


def _random(spec: NetworkSpec, arguments: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network: nn.Module = timm.create_model(spec.backbone, **arguments)
    return network


def _from_hub(spec: NetworkSpec, arguments: dict[str, Any]) -> nn.Module:
    name = spec.backbone if spec.weights == "hub" else f"{spec.backbone.split('.')[0]}.{spec.weights}"
    if not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{spec.backbone.split('.')[0]}.*") or ["none"]
        raise ConfigError(f"extractor.weights: the hub has no weights {name!r}; known are {', '.join(known)}")
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"extractor.weights: {name} could not be loaded from the hub ({error}); "
            "where the hub cannot be reached, give the path or s3:// URI of a .safetensors file"
        ) from error
    return network
