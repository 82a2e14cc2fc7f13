"""NetVLAD (Arandjelović et al. 2016): VLAD of a network's map as a layer that can be trained."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbir.errors import ConfigError
from cbir.features.networks.loading import read_weights

__all__ = ["NetVladLayer", "initialised", "loaded", "random_words"]

FIELD = "extractor.pooling.weights"

LEAST_SHARE = 0.01
"""Of the second nearest word in the assignment of an average place, relative to the nearest, at initialisation."""

RANDOM_ALPHA = 100.0


class NetVladLayer(nn.Module):
    """Words (W, C), and the 1 x 1 convolution that assigns places to them: weight (W, C), bias (W,) or None."""

    def __init__(self, centroids: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        words, channels = centroids.shape
        self.centroids = nn.Parameter(centroids)
        # On no device: nn.Conv2d's own initialisation would draw from the global generator.
        self.conv = nn.Conv2d(channels, words, 1, bias=bias is not None, device="meta")
        self.conv.weight = nn.Parameter(weight.reshape(words, channels, 1, 1))
        if bias is not None:
            self.conv.bias = nn.Parameter(bias)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, W * C): residual sums, l2-normalised by word, then as a whole."""
        return normalize(normalize(self.residual_sums(maps), dim=2).flatten(1))

    def residual_sums(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, W, C): over the places, l2-normalised before; additive over disjoint parts of a map."""
        if maps.shape[1] != self.centroids.shape[1]:
            raise ConfigError(
                f"{FIELD}: words of {self.centroids.shape[1]} numbers for {maps.shape[1]} maps; name the file that "
                "was made for this backbone"
            )
        places = normalize(maps)
        shares = self.conv(places).flatten(2).softmax(1)
        sums: Tensor = shares @ places.flatten(2).transpose(1, 2) - shares.sum(2, keepdim=True) * self.centroids
        return sums


def initialised(words: Tensor, sample: Tensor, form: Literal["vlad", "vladv2"] = "vladv2") -> NetVladLayer:
    """The layer of words (W, C), at least 2, whose assignment is nearly hard on a sample of unit rows (K, C).

    Both forms make the second nearest word of an average row a hundredth as likely as the nearest. `vladv2` is the
    paper's: weight 2 * alpha * c and bias -alpha * |c|^2, so that nearness is by distance; `vlad` is by direction, with
    weight alpha * c / |c| and no bias. ValueError where all rows are as near to two words.
    """
    if form == "vlad":
        weight, bias = normalize(words), None
        closeness = sample @ weight.T
    else:
        weight, bias = 2 * words, -words.square().sum(1)
        closeness = -torch.cdist(sample, words).square()
    best = closeness.topk(2, dim=1).values
    gap = float((best[:, 0] - best[:, 1]).mean())
    if not gap > 0:
        raise ValueError("every row of the sample is as near to two words: give distinct words and some rows")
    alpha = -math.log(LEAST_SHARE) / gap
    return NetVladLayer(words, alpha * weight, None if bias is None else alpha * bias)


def loaded(path: Path, words: int) -> NetVladLayer:
    """The layer of a file, frozen. ConfigError if it is not one of so many words."""
    state = read_weights(path, FIELD)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    channels = shapes.get("centroids", (0, 0))[-1]
    expected = {"centroids": (words, channels), "conv.weight": (words, channels, 1, 1), "conv.bias": (words,)}
    if shapes not in (expected, {key: expected[key] for key in ("centroids", "conv.weight")}):
        raise ConfigError(
            f"{FIELD}: {path} must hold centroids ({words}, C), conv.weight ({words}, C, 1, 1) and, if any, conv.bias "
            f"({words},), found {shapes}; set words if only their number differs"
        )
    return _frozen(NetVladLayer(state["centroids"], state["conv.weight"], state.get("conv.bias")))


def random_words(words: int, seed: int, device: str) -> Callable[[Tensor], Tensor]:
    """A layer of random unit words, drawn as soon as maps show how many numbers they have."""

    @functools.cache
    def layer(channels: int) -> NetVladLayer:
        # Also where the first maps come in inference mode: its tensors could not be used outside.
        with torch.inference_mode(False):
            drawn = torch.randn((words, channels), generator=torch.Generator().manual_seed(seed))
            centroids = normalize(drawn)
            bias = -RANDOM_ALPHA * centroids.square().sum(1)
            return _frozen(NetVladLayer(centroids, 2 * RANDOM_ALPHA * centroids, bias)).to(device)

    return lambda maps: layer(maps.shape[1])(maps)


def _frozen(layer: NetVladLayer) -> NetVladLayer:
    return layer.eval().requires_grad_(False)
