"""From keypoints to the vectors of networks for patches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from kornia import feature
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbir.features.descriptors.patches import PatchNetworkSpec
from cbir.features.networks.loading import load_weights, read_weights
from cbir.features.networks.vision import exactly
from cbir.features.opencv import grey
from cbir.features.patches import normalised_patches, pyramid
from cbir.types import Floats, Int64s, Pixels

__all__ = ["PASS", "SIDE", "PatchDescriptor", "multiple_kernels", "passed", "patch_network"]

SIDE = 32

PASS = 64
"""Patches of a pass, always as many, so that no descriptor depends on its neighbours."""

PLAIN = 1.0
"""Grey levels between the darkest and the brightest pixel of a patch that shows nothing."""

NETWORKS = {"hardnet": feature.HardNet, "sosnet": feature.SOSNet, "tfeat": feature.TFeat}


def patch_network(spec: PatchNetworkSpec, weights: Path | None) -> nn.Module:
    """The network of this name: patches (K, 1, 32, 32) -> (K, 128). ConfigError for weights of another one."""
    name: str = spec.model_dump()["name"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network: nn.Module = NETWORKS[name](pretrained=False)
    if weights is not None:
        state = read_weights(weights, "extractor.descriptor.weights", spec.weights_sha256)
        owner = f"extractor.descriptor.weights: {weights} is not of {name}"
        load_weights(network, state, owner, f"Get {spec.source}")
    return network


def multiple_kernels(kernels: str) -> nn.Module:
    """The kernels without whitening, which needs no file: patches (K, 1, 32, 32) -> (K, D)."""
    made: nn.Module = feature.MKDDescriptor(SIDE, kernels, whitening=None)  # type: ignore[arg-type]
    return made


class PatchDescriptor:
    """A network for patches on a device."""

    dtype = np.dtype(np.float32)

    def __init__(self, network: nn.Module, reach: float, device: str) -> None:
        self._network = network.eval().requires_grad_(False).to(device)
        self._reach, self._device = reach, device
        self.dim = self._rows(np.empty((0, SIDE, SIDE), np.float32)).shape[1]

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Floats, Int64s]:
        """Unit rows (k, D) of the keypoints whose patches are not plain, and their positions (k,)."""
        levels = pyramid(grey(image))
        rows, positions = [np.empty((0, self.dim), np.float32)], [np.empty(0, np.int64)]
        for start in range(0, len(keypoints), PASS):
            patches = normalised_patches(levels, keypoints[start : start + PASS], SIDE, self._reach)
            shown = (np.ptp(patches, axis=(1, 2)) > PLAIN).nonzero()[0]
            rows.append(self._rows(patches[shown]))
            positions.append(start + shown)
        return np.concatenate(rows), np.concatenate(positions)

    def _rows(self, patches: Floats) -> Floats:
        """Unit vectors (k, D) of at most PASS patches (k, SIDE, SIDE) of grey levels."""
        return passed(lambda filled: normalize(self._network(filled)), patches / np.float32(255), self._device)


def passed(network: Callable[[Tensor], Tensor], patches: Floats, device: str) -> Floats:
    """What a network makes of at most PASS patches (k, SIDE, SIDE) -> (k, ...)."""
    filled = np.zeros((PASS, 1, SIDE, SIDE), np.float32)
    filled[: len(patches), 0] = patches
    with exactly():
        made = network(torch.from_numpy(filled).to(device))
        return np.asarray(made[: len(patches)].cpu().numpy())
