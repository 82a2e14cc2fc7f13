"""Classification networks of torchvision: AlexNet, GoogLeNet and others that timm does not have."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from cbir.errors import ConfigError
from cbir.features.backbone import TORCHVISION, Layer, NetworkSpec
from cbir.features.networks.layers import CLASSIFIER_CODE
from cbir.features.networks.loading import Created
from cbir.spec import nearest

__all__ = ["create"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as of all weights of torchvision."""


@dataclass(frozen=True)
class _Family:
    """Names of modules of related networks, and their arguments."""

    last_map: str
    """What has the last map as its output."""
    classifier: str
    """What turns features into classes."""
    training_only: tuple[str, ...] = ()
    """Prefixes of weights that nothing but training needs."""
    arguments: dict[str, bool] = field(default_factory=dict)
    """As of the published weights."""


GOOGLENET = {"aux_logits": False, "init_weights": False, "transform_input": True}

FAMILIES = {
    "alexnet": _Family("features", "classifier.6"),
    "googlenet": _Family("inception5b", "fc", ("aux1.", "aux2."), GOOGLENET),
    "shufflenet_v2": _Family("conv5", "fc"),
    "squeezenet": _Family("features", "classifier"),
    "vgg": _Family("features", "classifier.6"),
}


def create(spec: NetworkSpec, layers: tuple[Layer, ...]) -> Created:
    """The network, random, without its classifier unless a layer needs it. ConfigError for one that is not known."""
    name = spec.backbone.removeprefix(TORCHVISION)
    family = _family(name)
    _check_weights(spec, name)
    network = _random(spec, name, family)
    unused = family.training_only
    if {CLASSIFIER_CODE, family.classifier}.isdisjoint(layers):
        network.set_submodule(family.classifier, nn.Identity())
        unused += (f"{family.classifier}.",)
    return Created(network, layers or (family.last_map,), MEAN, STD, unused)


def _family(name: str) -> _Family:
    known = [known for known in torchvision.models.list_models(torchvision.models) if known.startswith(tuple(FAMILIES))]
    if name not in known:
        hint = f"; use that of timm, backbone: {name}" if timm.is_model(name) else nearest(name, known)
        raise ConfigError(f"extractor.backbone: there is no {name!r} among the networks taken from torchvision{hint}")
    return next(family for prefix, family in FAMILIES.items() if name.startswith(prefix))


def _check_weights(spec: NetworkSpec, name: str) -> None:
    if spec.weights != "none" and not spec.weights_are_a_file:
        source = torchvision.models.get_model_weights(name).DEFAULT.url
        raise ConfigError(
            f"extractor.weights: nothing is downloaded for {spec.backbone}; give the path or s3:// URI of a file such "
            f"as {source}, or none for a random network, found {spec.weights!r}"
        )


def _random(spec: NetworkSpec, name: str, family: _Family) -> nn.Module:
    arguments: dict[str, Any] = {"weights": None, **family.arguments, **spec.backbone_args}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            network: nn.Module = torchvision.models.get_model(name, **arguments)
        except TypeError as error:
            message = f"extractor.backbone_args: {spec.backbone} refuses {spec.backbone_args}: {error}"
            raise ConfigError(message) from error
    return network
