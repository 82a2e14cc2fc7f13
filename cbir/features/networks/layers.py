"""What chosen layers of a network give, all in one pass."""

import functools
from collections.abc import Sequence
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from cbir.errors import ConfigError
from cbir.features.backbone import Layer
from cbir.spec import nearest

__all__ = ["CLASSIFIER_CODE", "LayerReader"]

CLASSIFIER_CODE = "fc8"

CODES: dict[type[nn.Module], dict[str, str]] = {
    torchvision.models.AlexNet: {"fc6": "classifier.2", "fc7": "classifier.5", CLASSIFIER_CODE: "classifier.6"},
    torchvision.models.VGG: {"fc6": "classifier.1", "fc7": "classifier.4", CLASSIFIER_CODE: "classifier.6"},
    timm.models.vgg.VGG: {"fc6": "pre_logits.act1", "fc7": "pre_logits.act2", CLASSIFIER_CODE: "head.fc"},
}
"""Where the fully connected layers are, after their rectification."""


class _Complete(Exception):
    """The last of the named modules has been run."""


class LayerReader:
    """Layers of a network: numbered maps of timm, modules by their names, fully connected codes.

    ConfigError for a name that the network does not have, and for numbers where there are no numbered maps.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer], backbone: str) -> None:
        self._network: Any = network
        self._layers = layers
        self._codes = CODES.get(type(network), {})
        self._numbers = [layer for layer in layers if isinstance(layer, int)]
        self._names = [layer for layer in layers if isinstance(layer, str)]
        self._found: dict[str, Tensor] = {}
        if self._numbers and not hasattr(network, "forward_intermediates"):
            known = ", ".join(name for name, _ in network.named_children())
            raise ConfigError(
                f"extractor.backbone: timm gives no intermediate maps of {backbone!r}; choose layers by the names of "
                f"its modules ({known} and those in them)"
            )
        modules = dict(network.named_modules())
        for name in self._names:
            module = modules.get(self._codes.get(name, name))
            if module is None:
                hint = nearest(name, [*self._codes, *(known for known in modules if known)])
                raise ConfigError(f"extractor.layers: {backbone} has no layer {name!r}{_short(hint)}")
            module.register_forward_hook(functools.partial(self._keep, name))

    def read(self, pixels: Tensor) -> list[Tensor]:
        """Normalised pixels (N, 3, H, W) -> in the order of the layers, maps (N, C, H', W') or vectors (N, D)."""
        self._found.clear()
        try:
            numbered = dict(zip(self._numbers, self._run(pixels), strict=True))
        except _Complete:
            numbered = {}
        return [numbered[layer] if isinstance(layer, int) else self._output(layer) for layer in self._layers]

    def _run(self, pixels: Tensor) -> list[Tensor]:
        """One pass, as far as it is needed; the numbered maps."""
        if not self._numbers:
            self._network(pixels)
            return []
        options: dict[str, Any] = {"indices": self._numbers, "output_fmt": "NCHW"}
        if not self._names:
            only: list[Tensor] = self._network.forward_intermediates(
                pixels, **options, stop_early=True, intermediates_only=True
            )
            return only
        last, maps = self._network.forward_intermediates(pixels, **options)
        if len(self._found) < len(self._names):
            self._network.forward_head(last)
        return list(maps)

    def _keep(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # A copy: the module that follows may rectify its input in place.
        self._found.setdefault(name, output.clone())
        if len(self._found) == len(self._names) and not self._numbers:
            raise _Complete

    def _output(self, name: str) -> Tensor:
        found = self._found.get(name)
        if found is None or found.ndim not in (2, 4):
            shape = "nothing" if found is None else f"an output of shape {tuple(found.shape)}"
            raise ValueError(f"layer {name!r} gives {shape}, not maps (N, C, H, W) or vectors (N, D)")
        # timm's VGG applies its fully connected layers everywhere in larger images, and averages.
        return found.mean((-2, -1)) if name in self._codes and found.ndim == 4 else found


def _short(hint: str) -> str:
    """Without the list of all modules of a deep network."""
    return hint if "did you mean" in hint else "; choose one of its modules, as of network.named_modules()"
