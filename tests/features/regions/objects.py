"""Two objects on a plain, slightly noisy ground, and how well boxes fit them."""

import cv2
import numpy as np

from cbir.features.regions.proposer import ProposerSpec
from cbir.types import Array, Floats, ImageBatch, Pixels

OBJECTS = np.array([(40, 45, 141, 116), (180, 104, 281, 197)])
"""Left, top, right, bottom of an ellipse and of a turned square."""


def scene() -> Pixels:
    image = np.full((240, 320, 3), (120, 110, 100), np.int16) + np.random.default_rng(0).integers(-6, 7, (240, 320, 3))
    pixels = image.astype(np.uint8)
    cv2.ellipse(pixels, (90, 80), (50, 35), 0, 0, 360, (220, 60, 40), -1)
    cv2.fillPoly(pixels, [cv2.boxPoints(((230, 150), (80, 60), 30)).astype(np.int32)], (30, 60, 200))
    return pixels


def proposed(spec: ProposerSpec, image: Pixels, enlarged: int = 1) -> Floats:
    """The boxes in an image that was decoded from one so many times as large."""
    size = np.array([image.shape[:2]], np.int32) * enlarged
    return spec.build("cpu", {}).propose(ImageBatch(np.zeros(1, np.int64), [image], size)).boxes


def overlap(boxes: Array, one: Array) -> Array:
    """Intersection by union of boxes (R, 4) with one: (R,)."""
    sides = np.minimum(boxes[:, 2:], one[2:]) - np.maximum(boxes[:, :2], one[:2])
    shared = np.maximum(sides, 0).prod(axis=1)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (one[2:] - one[:2]).prod() - shared)
