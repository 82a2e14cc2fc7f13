"""Images at the size that a network is to see."""

import numpy as np
from PIL import Image

from cbir.types import Pixels

__all__ = ["SMALLEST_SIDE", "resized", "scaled"]

SMALLEST_SIDE = 32
"""Pixels. A network that halves its maps five times needs as many to have one place left."""


def resized(image: Pixels, height: int, width: int) -> Pixels:
    """The image at that size, by Pillow's antialiased bilinear filter; the same pixels where it has it already."""
    if image.shape[:2] == (height, width):
        return image
    made: Pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return made


def scaled(image: Pixels, longest: int) -> Pixels:
    """The image with that longest side, its aspect ratio kept but for very narrow pictures."""
    height, width = image.shape[:2]
    factor = longest / max(height, width)
    return resized(image, max(SMALLEST_SIDE, round(height * factor)), max(SMALLEST_SIDE, round(width * factor)))
