"""Random networks whose outputs differ from place to place.

Without statistics of what passes through it, a deep random network maps every image to nearly the same numbers.
"""

import torch
from torch import nn


def lively(network: nn.Module, images: torch.Tensor | list[torch.Tensor]) -> nn.Module:
    """The network after one look at the images, with which every batch normalisation does its work."""
    network.eval()
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    with torch.inference_mode():
        network(images)
    for layer in layers:
        layer.eval()
    return network
