"""SIFT with colour: OpponentSIFT, HSV-SIFT and HueSIFT."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import numpy as np

from cbir.features.descriptors.descriptor import DescriptorSpec
from cbir.features.descriptors.sift import DIM, SiftDescriptor
from cbir.features.opencv import grey
from cbir.features.patches import blocks, normalised_patches, pyramid
from cbir.types import Floats, Int64s, Pixels

__all__ = ["ChannelSift", "HsvSift", "HueSift", "HueSiftDescriptor", "OpponentSift"]

HUE_BINS, HUE_LENGTH = 36, 255
SIDE, REACH = 20, 6.0  # the window of SIFT


class OpponentSift(DescriptorSpec):
    """OpponentSIFT (van de Sande et al. 2010): SIFT of (R - G) / √2, (R + G - 2B) / √6 and (R + G + B) / √3, 384-d.

    A block without gradient, as the two colour blocks of a grey picture, is zero.
    """

    name: Literal["opponent_sift"] = "opponent_sift"
    paper: ClassVar[str] = "van de Sande, Gevers, Snoek, Evaluating color descriptors, TPAMI 2010"

    def build(self, device: str, assets: Mapping[str, Path]) -> "ChannelSift":  # noqa: ARG002 - runs on the CPU
        """SIFT of the three channels."""
        return ChannelSift(opponent_pixels)


class HsvSift(DescriptorSpec):
    """HSV-SIFT (Bosch et al. 2008): SIFT of hue, saturation and value, 384-d.

    Hue is taken as a number from 0 to 255, so that a reddish surface may have edges where its hue passes the end.
    """

    name: Literal["hsv_sift"] = "hsv_sift"
    paper: ClassVar[str] = "Bosch, Zisserman, Muñoz, Scene classification using a hybrid approach, TPAMI 2008"

    def build(self, device: str, assets: Mapping[str, Path]) -> "ChannelSift":  # noqa: ARG002 - runs on the CPU
        """SIFT of the three channels."""
        return ChannelSift(lambda image: np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)))


class HueSift(DescriptorSpec):
    """HueSIFT (van de Weijer and Schmid 2006): SIFT and a histogram of 36 hues, weighted by saturation, 164-d.

    The hue is the angle of the opponent colours, the saturation their length; the histogram, over SIFT's window under
    the same Gaussian, has length 255, or 0 where all is grey.
    """

    name: Literal["hue_sift"] = "hue_sift"
    paper: ClassVar[str] = "van de Weijer and Schmid, Coloring local feature extraction, ECCV 2006"

    def build(self, device: str, assets: Mapping[str, Path]) -> "HueSiftDescriptor":  # noqa: ARG002 - runs on the CPU
        """SIFT and the hues."""
        return HueSiftDescriptor()


class ChannelSift:
    """SIFT of the three channels that a function makes of an RGB image, one after the other."""

    dim, dtype = 3 * DIM, np.dtype(np.uint8)

    def __init__(self, channels: Callable[[Pixels], Pixels]) -> None:
        self._channels, self._sift = channels, SiftDescriptor()

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Pixels, Int64s]:
        """Rows (K, 384) of all keypoints."""
        planes = np.ascontiguousarray(self._channels(image).transpose(2, 0, 1))
        rows = np.hstack([self._sift.describe_grey(plane, keypoints) for plane in planes])
        return rows, np.arange(len(keypoints), dtype=np.int64)


class HueSiftDescriptor:
    """SIFT of the luma, and hues."""

    dim, dtype = DIM + HUE_BINS, np.dtype(np.uint8)

    def __init__(self) -> None:
        self._sift = SiftDescriptor()

    def describe(self, image: Pixels, keypoints: Floats) -> tuple[Pixels, Int64s]:
        """Rows (K, 164) of all keypoints."""
        rows = np.hstack([self._sift.describe_grey(grey(image), keypoints), hue_histograms(image, keypoints)])
        return rows, np.arange(len(keypoints), dtype=np.int64)


def opponents(image: Pixels) -> tuple[Floats, Floats, Floats]:
    """(R - G) / √2, (R + G - 2B) / √6 and (R + G + B) / √3 of an RGB image."""
    red, green, blue = np.moveaxis(image.astype(np.float32), 2, 0)
    return (red - green) / np.sqrt(2), (red + green - 2 * blue) / np.sqrt(6), (red + green + blue) / np.sqrt(3)


def opponent_pixels(image: Pixels) -> Pixels:
    """The opponent colours, each stretched to 0..255: SIFT does not change with contrast and brightness."""
    first, second, third = opponents(image)
    stretched = first * (np.sqrt(2) / 2) + 127.5, second * (np.sqrt(6) / 4) + 127.5, third / np.sqrt(3)
    return np.asarray(np.rint(np.stack(stretched, axis=2)), np.uint8)


def hue_histograms(image: Pixels, keypoints: Floats) -> Pixels:
    """Hues (K, 36) in the windows of keypoints."""
    first, second, _ = opponents(image)
    levels, rows = (pyramid(first), pyramid(second)), [np.empty((0, HUE_BINS), np.uint8)]
    for block in blocks(len(keypoints)):
        pair = (normalised_patches(level, keypoints[block], SIDE, REACH) for level in levels)
        rows.append(_histograms(*(patches.reshape(len(patches), -1) for patches in pair)))
    return np.concatenate(rows)


def _histograms(first: Floats, second: Floats) -> Pixels:
    """Of opponent colours (K, P) -> (K, 36)."""
    saturation, hue = cv2.cartToPolar(second, first)
    bins = np.floor(hue * (HUE_BINS / (2 * np.pi))).astype(np.int64) % HUE_BINS
    rows = np.arange(len(bins))[:, None] * HUE_BINS + bins
    counts = np.bincount(rows.ravel(), (saturation * _WINDOW).ravel(), len(bins) * HUE_BINS).reshape(-1, HUE_BINS)
    lengths = np.linalg.norm(counts, axis=1, keepdims=True)
    # Below one grey level on average, the hue is that of rounding.
    lengths[lengths < _WINDOW.sum() / np.sqrt(HUE_BINS)] = np.inf
    return np.asarray(np.rint(counts * (HUE_LENGTH / lengths)), np.uint8)


def _window() -> Floats:
    """Weights (P,): SIFT's Gaussian, whose std is half the window."""
    offsets = (np.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 2)
    profile = np.exp(-(offsets**2) / 2)
    return np.asarray(np.outer(profile, profile).ravel(), np.float32)


_WINDOW = _window()
