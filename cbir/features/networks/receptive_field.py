"""Where in the image a place of a network's map looks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbir.features.networks.backbone import Backbone

__all__ = ["ReceptiveField", "receptive_field"]

SIDE = 224
"""Pixels of the trial image; strides of 2 to 32 and patches of 14 and 16 divide it."""


@dataclass(frozen=True)
class ReceptiveField:
    """Place i of a map sees `size` pixels around pixel `first` + i * `stride`, by rows and by columns."""

    size: float
    stride: int
    first: float


def receptive_field(backbone: Backbone, device: torch.device) -> ReceptiveField:
    """The field of the convolutions and maximum poolings, one after the other (Araujo, Norris, Sim 2019).

    Each is counted with the stride at its input. Exact where no two branches both look around and where strides divide
    the sides; global parts (attention, squeeze and excitation) and average poolings are left out.
    """
    trace = _Trace()
    layers = [module for module in backbone.modules() if isinstance(module, nn.Conv2d | nn.MaxPool2d)]
    hooks = [layer.register_forward_hook(trace.add) for layer in layers]
    try:
        with torch.inference_mode():
            maps = backbone(torch.zeros((1, SIDE, SIDE, 3), dtype=torch.uint8, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return ReceptiveField(trace.size, round(SIDE / maps.shape[-1]), trace.first)


class _Trace:
    """Size and first centre of the field, grown by each layer that is run."""

    def __init__(self) -> None:
        self.size, self.first = 1.0, 0.0

    def add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before, after = inputs[0].shape[-1], output.shape[-1]
        stride = max(1, round(SIDE / before))
        reach = _last(layer.dilation) * (_last(layer.kernel_size) - 1)
        # Layers that fill up their input by themselves ("same" of TensorFlow) say that they do not.
        filled_up = max(0, (after - 1) * _last(layer.stride) + reach + 1 - before) // 2
        padding = _last(layer.padding) or filled_up
        self.size += reach * stride
        self.first += (reach / 2 - padding) * stride


def _last(value: Any) -> int:
    """Of a layer's setting: the number itself, or that of the columns."""
    if isinstance(value, str):
        return 0
    return int(value[-1] if isinstance(value, tuple) else value)
