"""Affine shape of blobs by a network."""

from pathlib import Path

import numpy as np
import torch
from kornia.feature import LAFAffNetShapeEstimator
from torch import Tensor

from cbir.features.keypoints import as_ellipses
from cbir.features.networks.loading import load_weights, read_weights
from cbir.features.networks.patches import PASS, SIDE, passed
from cbir.features.patches import normalised_patches, pyramid
from cbir.features.shape import RATIO, Matrices, reshaped
from cbir.types import Floats, Pixels

__all__ = ["AffNet"]

REACH = 6.0
"""Half the side of the patch that the network sees, in scales, as in its training."""

FIELD = "extractor.detector.weights"


class AffNet:
    """AffNet (Mishkin, Radenović, Matas 2018): the shape of a blob from its patch, trained for matching."""

    def __init__(self, weights: Path | None, sha256: str | None, seed: int, max_axis_ratio: float, device: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            estimator = LAFAffNetShapeEstimator(pretrained=False)
        if weights is not None:
            load_weights(estimator, read_weights(weights, FIELD, sha256), f"{FIELD}: {weights} is not AffNet", "")
        self._layers = estimator.eval().requires_grad_(False).to(device).features
        self._max_axis_ratio, self._device = max_axis_ratio, device

    def ellipses(self, picture: Pixels, blobs: Floats) -> Floats:
        """Those that are not too long."""
        levels, ellipses = pyramid(picture), as_ellipses(blobs)
        for start in range(0, len(blobs), PASS):
            rows = slice(start, start + PASS)
            patches = normalised_patches(levels, blobs[rows], SIDE, REACH)
            ellipses[rows] = reshaped(ellipses[rows], _of_determinant_1(passed(self._predicted, patches, self._device)))
        return ellipses[ellipses[:, RATIO] * self._max_axis_ratio >= 1]

    def _predicted(self, patches: Tensor) -> Tensor:
        """Patches (K, 1, SIDE, SIDE) -> the differences (K, 3) of xx, yx and yy from those of the circle."""
        std, mean = torch.std_mean(patches, dim=(-3, -2, -1), keepdim=True)
        predicted: Tensor = self._layers((patches - mean) / (std + 1e-6))
        return predicted.flatten(1)


def _of_determinant_1(predicted: Floats) -> Matrices:
    """Lower triangular shapes (K, 2, 2), which leave verticals vertical."""
    xx, yx, yy = predicted.astype(np.float64).T
    shapes = np.stack([np.stack([1 + xx, 0 * xx], axis=1), np.stack([yx, 1 + yy], axis=1)], axis=1)
    # Tanh ends at -1, where a shape has no area; such a one is too long.
    return np.asarray(shapes / np.sqrt(np.maximum((1 + xx) * (1 + yy), 1e-12))[:, None, None])
