"""From decoded images to global descriptors with a network on a torch device."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.scaling import resized, scaled
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels

__all__ = ["DeepExtractor"]


class DeepExtractor:
    """Pooled, l2-normalised maps of a `Backbone`, averaged over scales."""

    def __init__(self, spec: Deep, weights: Path | None, device: str) -> None:
        self._spec = spec
        self._device = torch.device(device)
        self._backbone = Backbone(spec, weights).to(self._device)
        # A CPU's kernels round differently in batches of 16 than of 1. Passes of 4 would be 13 to 25 % faster than
        # of 1 and those of 16 slower, but a single query would pay for four.
        self._pass_size = 1 if self._device.type == "cpu" else spec.batch
        self._dim = max(self._trial(*shape) for shape in self._trial_shapes())

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """One row (N, D) float32 of length 1 per image."""
        by_scale = [self._pooled(self._inputs(batch, scale)) for scale in self._spec.scales]
        descriptors = np.empty((len(batch), self._dim), np.float32)
        for i in range(len(batch)):
            # Image by image: vectorised powers may round differently at another place of a longer array.
            descriptors[i] = _power_mean(np.stack([rows[i] for rows in by_scale]), self._spec.pooling.scale_power)
        return FeatureBatch.of_global(batch.image_ids, descriptors)

    def _inputs(self, batch: ImageBatch, scale: float) -> list[Pixels]:
        side = self._spec.side(scale)
        if self._spec.fit == "stretch":
            return [resized(image, side, side) for image in batch.images]
        originals = batch.sizes.max(axis=1) if len(batch) else batch.sizes
        # Scale 1 of a picture smaller than `size` is the picture itself.
        sides = [min(side, max(1, round(int(original) * scale))) for original in originals]
        return [scaled(image, longest) for image, longest in zip(batch.images, sides, strict=True)]

    def _pooled(self, images: Sequence[Pixels]) -> Floats:
        """l2-normalised pooled maps (N, D) of images of any shapes."""
        rows = np.empty((len(images), self._dim), np.float32)
        for group in _groups(images, self._pass_size):
            rows[group] = self._forward(np.stack([images[i] for i in group]))
        return rows

    def _forward(self, images: Pixels) -> Floats:
        missing = self._pass_size - len(images)
        padded = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images
        # Deterministic kernels in full float32 precision: the defaults of cuDNN round inputs to 10 bits.
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), flags:
            maps = self._backbone(torch.from_numpy(padded).to(self._device))
            pooled = torch.nn.functional.normalize(self._spec.pooling.pool(maps))
        rows: Floats = pooled[: len(images)].cpu().numpy()
        return rows

    def _trial_shapes(self) -> list[tuple[int, int]]:
        if self._spec.fit == "stretch":
            return [(side, side) for side in sorted({self._spec.side(scale) for scale in self._spec.scales})]
        # Sides that no patch or stride divides, as those of photographs.
        return [(min(self._spec.size, 223), min(self._spec.size, 151))]

    def _trial(self, height: int, width: int) -> int:
        """D, found by a black image, so that a network which refuses the size does so before the run."""
        where = f"backbone {self._spec.backbone!r} at {height} x {width} pixels"
        try:
            return int(self._forward(np.zeros((1, height, width, 3), np.uint8)).shape[1])
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"extractor.size: {where} fails: {error}. Choose sizes, scales and a fit that the network takes "
                "(multiple_of: 14 for patches of 14 pixels), or pass it backbone_args such as img_size"
            ) from error


def _groups(images: Sequence[Pixels], most: int) -> Iterator[list[int]]:
    """Positions of images of equal shape, at most so many together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(i)
    for positions in by_shape.values():
        for start in range(0, len(positions), most):
            yield positions[start : start + most]


def _power_mean(rows: Floats, power: float) -> Floats:
    """The l2-normalised power mean over scales (S, D) -> (D,); one row is returned as it is."""
    if len(rows) == 1:
        only: Floats = rows[0]
        return only
    mean: Floats = np.mean(rows.astype(np.float64) ** power, axis=0) ** (1 / power)
    unit: Floats = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
    return unit
