"""From decoded images to masks by a torchvision segmentation network."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import segmentation

from cbir.features.masks.segmentation import Segmentation
from cbir.features.networks.vision import create, exactly, pixels_on
from cbir.types import Floats, ImageBatch, Pixels

__all__ = ["SegmentationMasker"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in 0..1, with which torchvision trains all of its segmentation models."""

SMALLEST_SIDE = 32
"""Pixels; smaller images are enlarged, so that maps at an eighth of their size have more than a few places."""


class SegmentationMasker:
    """A segmentation network on a device; images pass one by one, so that none depends on its neighbours."""

    def __init__(self, spec: Segmentation, weights: Path | None, device: str) -> None:
        self._spec, self._device = spec, device
        self._network = create(spec, segmentation, weights, device)
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def masks(self, batch: ImageBatch) -> Sequence[Floats]:
        """(h, w) float32 at the size that the network saw: one minus the probabilities of the dropped classes."""
        return [self._mask(_resized(image, self._spec.size)) for image in batch.images]

    def _mask(self, image: Pixels) -> Floats:
        with exactly():
            pixels = (pixels_on(self._device, image) - self._mean) / self._std
            likely = self._network(pixels[None])["out"][0].softmax(0)
            mask = 1 - likely[list(self._spec.drop)].sum(0)
        return np.asarray(mask.clamp(0, 1).cpu().numpy(), np.float32)


def _resized(image: Pixels, longest: int) -> Pixels:
    """At most so many pixels on the longest side, at least 32 on each."""
    ratio = min(1.0, longest / max(image.shape[:2]))
    height, width = (max(SMALLEST_SIDE, round(side * ratio)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))
