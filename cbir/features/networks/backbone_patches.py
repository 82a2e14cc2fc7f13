"""From keypoints to what a network for whole images makes of the patches around them."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from cbir.errors import ConfigError
from cbir.features.descriptors.backbone import BackboneDescriptor
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.patches import PASS, PLAIN
from cbir.features.networks.vision import exactly
from cbir.features.patches import normalised_patches, pyramid
from cbir.types import Floats, Int64s, Pixels

__all__ = ["BackbonePatches"]


class BackbonePatches:
    """A `Backbone` on a device, in passes of always as many patches, so that no row depends on its neighbours."""

    dtype = np.dtype(np.float32)

    def __init__(self, spec: BackboneDescriptor, weights: Path | None, device: str) -> None:
        self._spec, self._device = spec, device
        self._backbone = Backbone(spec, weights, *spec.layers).to(device)
        try:
            self.dim = self._rows(np.empty((0, spec.side, spec.side, 3), np.float32)).shape[1]
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"extractor.side: {spec.backbone} fails for patches of {spec.side} x {spec.side} pixels: {error}. "
                "Choose a side and a layer that the network has"
            ) from error

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Floats, Int64s]:
        """Unit rows (k, D) of the keypoints whose patches are not plain, and their positions (k,)."""
        colours = [pyramid(np.ascontiguousarray(image[..., colour])) for colour in range(3)]
        rows, positions = [np.empty((0, self.dim), np.float32)], [np.empty(0, np.int64)]
        for start in range(0, len(keypoints), PASS):
            some = keypoints[start : start + PASS]
            seen = [normalised_patches(levels, some, self._spec.side, self._spec.reach) for levels in colours]
            patches = np.stack(seen, axis=-1)
            shown = (np.ptp(patches, axis=(1, 2)).max(axis=1) > PLAIN).nonzero()[0]
            rows.append(self._rows(patches[shown]))
            positions.append(start + shown)
        return np.concatenate(rows), np.concatenate(positions)

    def _rows(self, patches: Floats) -> Floats:
        """Unit vectors (k, D) of at most PASS patches (k, side, side, 3) of pixels."""
        filled = np.zeros((PASS, *patches.shape[1:]), np.float32)
        filled[: len(patches)] = patches
        with exactly():
            output = self._backbone(torch.from_numpy(filled).to(self._device))
            pooled = output if output.ndim == 2 else output.mean((-2, -1))
            return np.asarray(normalize(pooled)[: len(patches)].cpu().numpy())
