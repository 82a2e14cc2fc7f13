"""Where in the image a place of a network's map looks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbir.features.networks.backbone import Backbone

__all__ = ["ReceptiveField", "receptive_field"]

SIDE = 224
"""Height of the trial images in pixels, and the difference of their widths; strides of 2 to 32 and patches of 14 and 16
divide it."""


@dataclass(frozen=True)
class ReceptiveField:
    """Place i of a map sees `size` pixels around pixel `first` + i * `stride`, by rows and by columns."""

    size: float
    stride: int
    first: float


def receptive_field(backbone: Backbone, device: torch.device) -> ReceptiveField:
    """The field of the convolutions and maximum poolings, one after the other (Araujo, Norris, Sim 2019).

    Each is counted with the stride at its input: by how much its input grows in a wider image. Exact where no two
    branches both look around; global parts (attention, squeeze and excitation) and average poolings are left out.
    """
    (narrow, columns), (wide, more_columns) = (_run(backbone, width, device) for width in (SIDE, 2 * SIDE))
    size, first = 1.0, 0.0
    for (layer, before, after), (_, wider, _) in zip(narrow, wide, strict=True):
        if wider == before:  # what is pooled already has no places to look around
            continue
        stride = round(SIDE / (wider - before))
        reach = _last(layer.dilation) * (_last(layer.kernel_size) - 1)
        # Layers that fill up their input by themselves ("same" of TensorFlow) say that they do not.
        filled_up = max(0, (after - 1) * _last(layer.stride) + reach + 1 - before) // 2
        padding = _last(layer.padding) or filled_up
        size += reach * stride
        first += (reach / 2 - padding) * stride
    return ReceptiveField(size, round(SIDE / (more_columns - columns)), first)


def _run(backbone: Backbone, width: int, device: torch.device) -> tuple[list[tuple[Any, int, int]], int]:
    """The layers that look around, with the columns of their input and output, and those of the map."""
    calls: list[tuple[Any, int, int]] = []

    def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, inputs[0].shape[-1], output.shape[-1]))

    layers = [module for module in backbone.modules() if isinstance(module, nn.Conv2d | nn.MaxPool2d)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        with torch.inference_mode():
            maps = backbone(torch.zeros((1, SIDE, width, 3), dtype=torch.uint8, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return calls, maps.shape[-1]


def _last(value: Any) -> int:
    """Of a layer's setting: the number itself, or that of the columns."""
    if isinstance(value, str):
        return 0
    return int(value[-1] if isinstance(value, tuple) else value)
