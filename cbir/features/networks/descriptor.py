"""From decoded images to global descriptors with a network on a torch device."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cbir.errors import ConfigError, DataError
from cbir.features.blocks import side_by_side
from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.runtime import Passes, network_on
from cbir.features.networks.scaling import resized, scaled
from cbir.features.pooling import Pooling
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels

__all__ = ["DeepExtractor"]

AnyArray = TypeVar("AnyArray", Pixels, Floats)


class DeepExtractor:
    """Pooled, l2-normalised maps of a `Backbone`, averaged over scales; several layers side by side."""

    def __init__(self, spec: Deep, weights: Path | None, pooling: Pooling, device: str) -> None:
        self._spec, self._pool = spec, pooling
        self._device = torch.device(device)
        backbone, shapes = Backbone(spec, weights, *spec.layers), self._trial_shapes()
        with self._explained(*shapes[-1]):
            self._network = network_on(backbone, spec, shapes[-1], self._device)
        # A CPU's kernels round differently in batches of 16 than of 1. Passes of 4 would be 13 to 25 % faster than
        # of 1 and those of 16 slower, but a single query would pay for four.
        self.passes = Passes(self._rows, self._device, 1 if self._device.type == "cpu" else spec.batch)
        self._powers: list[float] = []  # of the mean of each layer over scales; known after the first pass
        self._dims = [self._trial(*shape) for shape in shapes][-1]

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """One row (N, D) float32 of length 1 per image."""
        return self._extracted(batch, None)

    def extract_masked(self, batch: ImageBatch, masks: Sequence[Floats]) -> FeatureBatch:
        """The same, with maps multiplied by masks (h, w) from 0 to 1, in steps of 1/255, stretched over the images.

        ConfigError for a layer without places.
        """
        return self._extracted(batch, masks)

    def _extracted(self, batch: ImageBatch, masks: Sequence[Floats] | None) -> FeatureBatch:
        descriptors = self._described(batch, masks)
        if self._spec.flip:
            seen_mirrored = replace(batch, images=_mirrored(batch.images))
            for i, mirrored in enumerate(self._described(seen_mirrored, masks and _mirrored(masks))):
                descriptors[i] = _power_mean(np.stack([descriptors[i], mirrored]), 1.0)
        return FeatureBatch.of_global(batch.image_ids, descriptors)

    def _described(self, batch: ImageBatch, masks: Sequence[Floats] | None) -> Floats:
        """The rows (N, D) of the images as they are."""
        seen = [self._inputs(batch, scale) for scale in self._spec.scales]
        by_scale = [self._pooled(images if masks is None else _with_masks(images, masks)) for images in seen]
        descriptors = np.empty((len(batch), sum(self._dims)), np.float32)
        for i in range(len(batch)):
            # Image by image: vectorised powers may round differently at another place of a longer array.
            means = [
                _power_mean(np.stack([rows[i] for rows in scales]), power)
                for power, *scales in zip(self._powers, *by_scale, strict=True)
            ]
            descriptors[i] = side_by_side(means, self._spec.layer_weights)
        return descriptors

    def _inputs(self, batch: ImageBatch, scale: float) -> list[Pixels]:
        side = self._spec.side(scale)
        if self._spec.fit == "stretch":
            return [resized(image, side, side) for image in batch.images]
        originals = batch.sizes.max(axis=1) if len(batch) else batch.sizes
        # Scale 1 of a picture smaller than `size` is the picture itself.
        sides = [min(side, max(1, round(int(original) * scale))) for original in originals]
        return [scaled(image, longest) for image, longest in zip(batch.images, sides, strict=True)]

    def _pooled(self, images: Sequence[Pixels]) -> list[Floats]:
        """l2-normalised rows (N, D) of each layer, of images of any shapes."""
        layers = [np.empty((len(images), dim), np.float32) for dim in self._dims]
        groups = list(_groups(images, self.passes.size))
        for group, found in zip(groups, self.passes.rows([images[i] for i in group] for group in groups), strict=True):
            for rows, some in zip(layers, found, strict=True):
                rows[group] = some
        if self._spec.precision == "float16" and not all(np.isfinite(rows).all() for rows in layers):
            raise DataError(
                f"extractor.precision: numbers beyond the range of float16 in backbone {self._spec.backbone!r}; use "
                "bfloat16, which has the range of float32"
            )
        return layers

    def _rows(self, images: Tensor) -> list[Tensor]:
        """(N, H, W, 3 or, with masks, 4) uint8 -> l2-normalised rows (N, D): maps pooled, vectors as they are."""
        outputs = self._network(images[..., :3].contiguous())
        if images.shape[-1] > 3:
            outputs = [_masked(output, images[..., 3]) for output in outputs]
        self._powers = [1.0 if output.ndim == 2 else self._spec.pooling.scale_power for output in outputs]
        pooled = [output if output.ndim == 2 else self._pool(output) for output in outputs]
        return [torch.nn.functional.normalize(rows) for rows in pooled]

    def _trial_shapes(self) -> list[tuple[int, int]]:
        if self._spec.fit == "stretch":
            return [(side, side) for side in sorted({self._spec.side(scale) for scale in self._spec.scales})]
        # Sides that no patch or stride divides, as those of photographs.
        return [(min(self._spec.size, 223), min(self._spec.size, 151))]

    def _trial(self, height: int, width: int) -> list[int]:
        """D of each layer, found by a black image, so that a network which refuses the size or has no such layer does
        so before the run; so is the size of a pass that fits into memory."""
        with self._explained(height, width):
            (found,) = self.passes.rows([[np.zeros((height, width, 3), np.uint8)]])
            return [rows.shape[1] for rows in found]

    @contextlib.contextmanager
    def _explained(self, height: int, width: int) -> Iterator[None]:
        """What a network says to a size or layer that it does not have, as a ConfigError."""
        spec = self._spec
        layers = f"layers {list(spec.layers)} of " if spec.layers else ""
        try:
            yield
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"extractor.{'layers' if spec.layers else 'size'}: {layers}backbone {spec.backbone!r} at {height} x "
                f"{width} pixels fails: {error}. Choose layers, sizes, scales and a fit that the network takes "
                "(multiple_of: 14 for patches of 14 pixels), or pass it backbone_args such as img_size"
            ) from error


def _with_masks(images: Sequence[Pixels], masks: Sequence[Floats]) -> list[Pixels]:
    """Images with their masks (h, w) from 0 to 1 as a fourth channel: (H, W, 4)."""
    levels = [np.round(mask * np.float32(255)).astype(np.uint8) for mask in masks]
    return [np.dstack([image, resized(level, *image.shape[:2])]) for image, level in zip(images, levels, strict=True)]


def _masked(maps: Tensor, levels: Tensor) -> Tensor:
    """Maps (N, C, H', W') by the means of masks (N, H, W), from 0 to 255, over what a place of the map covers."""
    if maps.ndim == 2:
        raise ConfigError(
            "mask: a fully connected layer has no places to weigh; remove the mask, or choose other extractor.layers"
        )
    height, width = maps.shape[-2:]
    return maps * torch.nn.functional.adaptive_avg_pool2d(levels[:, None].float() / 255, (height, width))


def _mirrored(images: Sequence[AnyArray]) -> list[AnyArray]:
    """Left and right of images or masks exchanged."""
    return [np.ascontiguousarray(image[:, ::-1]) for image in images]


def _groups(images: Sequence[Pixels], most: int) -> Iterator[list[int]]:
    """Positions of images of equal shape, at most so many together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    for positions in by_shape.values():
        for start in range(0, len(positions), most):
            yield positions[start : start + most]


def _power_mean(rows: Floats, power: float) -> Floats:
    """The l2-normalised power mean over scales or mirror images (S, D) -> (D,); one row is returned as it is."""
    if len(rows) == 1:
        only: Floats = rows[0]
        return only
    mean: Floats = np.mean(rows.astype(np.float64) ** power, axis=0) ** (1 / power)
    unit: Floats = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
    return unit
