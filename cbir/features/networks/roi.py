"""From decoded images to pooled regions of a network's maps."""

import itertools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.ops import FeaturePyramidNetwork, roi_align

from cbir.errors import ConfigError
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.loading import load_weights, read_weights
from cbir.features.networks.scaling import scaled
from cbir.features.networks.vision import exactly
from cbir.features.pooling import Pooling
from cbir.features.regions.proposer import Proposer, regions_of, with_whole
from cbir.features.roi import Roi, pyramid_level
from cbir.types import FeatureBatch, Floats, ImageBatch, Int32s, Pixels

__all__ = ["Maps", "RoiExtractor"]

TRIAL = (151, 223)
"""Height and width of the trial image in pixels: sides that no patch or stride divides, as those of photographs."""

BLOCK = 64
"""Boxes at a time, so that their cells need little memory."""


class Maps:
    """The layers of a `Backbone`, through a feature pyramid where there are several; `strides` are powers of 2."""

    def __init__(self, spec: Roi, weights: Path | None, pyramid: Path | None, device: str) -> None:
        self._spec, self._device = spec, device
        self._backbone = Backbone(spec, weights, *spec.layers).to(device)
        shapes = self._trial()
        self.strides = tuple(2 ** round(np.log2(TRIAL[1] / shape[-1])) for shape in shapes)
        self._pyramid = _pyramid(spec, [shape[1] for shape in shapes], pyramid).to(device) if len(shapes) > 1 else None

    def of(self, image: Pixels) -> list[Tensor]:
        """(H, W, 3) uint8 -> maps (1, C, H', W') of one C, from fine to coarse."""
        maps = self._backbone.outputs(torch.tensor(image[None], device=self._device))
        if self._pyramid is None:
            return maps
        named = OrderedDict((str(number), found) for number, found in enumerate(maps))
        return list(self._pyramid(named).values())

    def _trial(self) -> list[tuple[int, ...]]:
        """Shapes of the layers of a black image, so that a network which refuses it does so before the run."""
        where = f"extractor.layers: {list(self._spec.layers) or 'the last map'} of backbone {self._spec.backbone!r}"
        try:
            with exactly():
                outputs = self._backbone.outputs(torch.zeros((1, *TRIAL, 3), dtype=torch.uint8, device=self._device))
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{where} fails: {error}. Choose layers that there are, and a network that takes images of any size"
            ) from error
        shapes = [tuple(output.shape) for output in outputs]
        are_maps = all(len(shape) == 4 for shape in shapes)
        if not are_maps or any(fine[-1] <= coarse[-1] for fine, coarse in itertools.pairwise(shapes)):
            raise ConfigError(f"{where} gives shapes {shapes}; choose maps (N, C, H, W), from fine to coarse")
        return shapes


def _pyramid(spec: Roi, channels: list[int], path: Path | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network: nn.Module = FeaturePyramidNetwork(channels, spec.pyramid_channels)
    if path is not None:
        owner = f"extractor.pyramid: {path} is not of maps of {channels} channels"
        advice = "Give the layers and pyramid_channels that it was trained with"
        load_weights(network, read_weights(path, "extractor.pyramid"), owner, advice)
    return network.eval().requires_grad_(False)


class RoiExtractor:
    """`Maps`, pooled in the boxes of a proposer; images pass one by one, as they differ in shape."""

    def __init__(self, spec: Roi, maps: Maps, proposer: Proposer, pooling: Pooling) -> None:
        self._spec, self._maps, self._proposer, self._pooling = spec, maps, proposer, pooling
        self._dim = self._trial()

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Unit rows (K, D) float32 with their regions; for `rows: mean` or `sum`, one row (N, D) per image."""
        proposed = self._proposer.propose(batch)
        boxes = [with_whole(proposed.of(i), size) for i, size in enumerate(batch.sizes)]
        rows = [self._rows(*image) for image in zip(batch.images, batch.sizes, boxes, strict=True)]
        stacked = np.concatenate([np.empty((0, self._dim), np.float32), *rows])
        if not self._spec.rows_are_regions:
            return FeatureBatch.of_global(batch.image_ids, stacked)
        regions = regions_of(boxes)
        return FeatureBatch(batch.image_ids, regions.offsets, stacked, sizes=batch.sizes, regions=regions)

    def _rows(self, image: Pixels, size: Int32s, boxes: Floats) -> Floats:
        """Those that an image is to have, of boxes (R, 4) in pixels of the upright original."""
        height, width = size.tolist()
        shares = (boxes / np.array([width, height, width, height])).astype(np.float32)
        rows = self._described(scaled(image, min(self._spec.size, max(image.shape[:2]))), shares)
        return rows if self._spec.rows_are_regions else _as_one(rows, unit=self._spec.rows == "sum")

    def _described(self, image: Pixels, shares: Floats) -> Floats:
        """Unit rows (R, D) of boxes (R, 4) in shares of the image's sides, each from the map for its size."""
        sides = (shares[:, 2:] - shares[:, :2]) * (image.shape[1], image.shape[0])
        levels = np.array([pyramid_level(w, h, self._maps.strides) for w, h in sides.tolist()], np.int64)
        rows: Floats = np.empty((len(shares), self._dim), np.float32)
        with exactly():
            for number, maps in enumerate(self._maps.of(image)):
                chosen = np.flatnonzero(levels == number)
                for start in range(0, len(chosen), BLOCK):
                    some = chosen[start : start + BLOCK]
                    rows[some] = self._pooled(maps, torch.from_numpy(shares[some]).to(maps.device)).cpu().numpy()
        return rows

    def _pooled(self, maps: Tensor, shares: Tensor) -> Tensor:
        """One map (1, C, H, W) and boxes (R, 4) -> unit rows (R, D)."""
        spec, (height, width) = self._spec, maps.shape[-2:]
        boxes = shares * shares.new_tensor([width, height, width, height])
        # Without `aligned`, boxes would lie half a place off.
        cells = roi_align(maps, [boxes], spec.parts * spec.grid, aligned=True)
        divided = cells.unflatten(3, (spec.parts, spec.grid)).unflatten(2, (spec.parts, spec.grid))
        parts = divided.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if spec.position_sensitive:
            num = parts.shape[1]
            parts = torch.stack([parts[:, part, part::num] for part in range(num)], dim=1)
        return normalize(self._pooling(parts.flatten(0, 1)).reshape(len(boxes), -1))

    def _trial(self) -> int:
        """D, found by a black image; ConfigError for cells that cannot be pooled as the settings say."""
        spec = self._spec
        with exactly():
            maps = self._maps.of(np.zeros((*TRIAL, 3), np.uint8))[0]
            if spec.position_sensitive and maps.shape[1] % spec.parts**2:
                raise ConfigError(
                    f"extractor.parts: {maps.shape[1]} maps cannot be divided among {spec.parts} x {spec.parts} parts "
                    "that are position sensitive; choose other parts, or a network that was trained so"
                )
            try:
                return self._pooled(maps, maps.new_tensor([[0.0, 0.0, 1.0, 1.0]])).shape[1]
            except (RuntimeError, ValueError, IndexError) as error:
                raise ConfigError(
                    f"extractor.pooling: fails on {maps.shape[1]} maps of {spec.grid} x {spec.grid} cells: {error}"
                ) from error


def _as_one(rows: Floats, *, unit: bool) -> Floats:
    """The mean of rows (R, D), or the unit vector along their sum, as (1, D)."""
    total = np.add.reduce(rows, axis=0, dtype=np.float64, keepdims=True)
    whole: Floats = (total / (max(float(np.linalg.norm(total)), 1e-12) if unit else len(rows))).astype(np.float32)
    return whole
