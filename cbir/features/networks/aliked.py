"""From decoded images to the keypoints and descriptors of ALIKED."""

from pathlib import Path

import numpy as np
import torch
from kornia.feature import ALIKED
from torch import Tensor

from cbir.features.aliked import Aliked
from cbir.features.keypoints import in_original_pixels
from cbir.features.networks.loading import load_weights, read_weights
from cbir.features.networks.scaling import scaled
from cbir.features.networks.vision import exactly, pixels_on
from cbir.types import FeatureBatch, Floats, ImageBatch, Int32s, Pixels

__all__ = ["AlikedExtractor"]

MAXIMA = 20_000
"""Local maxima that are refined; more than photographs of a megapixel have above the usual threshold."""

NOMINAL_SIZE = 32.0
"""Pixels, the stride of the coarsest maps."""


class AlikedExtractor:
    """ALIKED on a device; images pass one by one, so that none depends on its neighbours."""

    def __init__(self, spec: Aliked, weights: Path | None, device: str) -> None:
        self._spec, self._device = spec, device
        self._network = _network(spec, weights).to(device)
        self._dim = self._network.desc_head.sf_conv.out_channels

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Descriptors (K, 128 or 64) float32, geometry (K, 4) float32 in pixels of the upright originals."""
        if not len(batch):
            return FeatureBatch(batch.image_ids, np.zeros(1, np.int64), *self._no_rows())
        rows = [self._features(*pair) for pair in zip(batch.images, batch.sizes, strict=True)]
        descriptors, geometry = zip(*rows, strict=True)
        return FeatureBatch.of_images(batch.image_ids, descriptors, geometry)

    def _features(self, image: Pixels, original_size: Int32s) -> tuple[Floats, Floats]:
        # On a plain image the only maxima are what the network makes of its borders.
        if (image == image[:1, :1]).all():
            return self._no_rows()
        seen = scaled(image, max(image.shape[:2]))
        with exactly():
            points, descriptors = self._found(pixels_on(self._device, seen)[None])
        keypoints = np.zeros((len(points), 4), np.float32)
        keypoints[:, :2], keypoints[:, 2] = points, NOMINAL_SIZE
        return descriptors, in_original_pixels(keypoints, seen.shape[:2], original_size)

    def _found(self, pixels: Tensor) -> tuple[Floats, Floats]:
        """Places in pixels (K, 2) and descriptors (K, D) of an image (1, 3, H, W), by falling score."""
        maps, score_map = self._network.extract_dense_map(pixels)
        (places,), (scores,), _ = self._network.dkd(score_map)
        best = torch.from_numpy(_strongest(places, scores, self._spec)).to(pixels.device)
        if not len(best):
            return np.empty((0, 2), np.float32), self._no_rows()[0]
        chosen = places[best]
        (descriptors,), _ = self._network.desc_head(maps, [chosen])
        height, width = pixels.shape[-2:]
        corner = chosen.new_tensor([width - 1, height - 1])
        return ((chosen + 1) / 2 * corner).cpu().numpy(), descriptors.cpu().numpy()

    def _no_rows(self) -> tuple[Floats, Floats]:
        return np.empty((0, self._dim), np.float32), np.empty((0, 4), np.float32)


def _network(spec: Aliked, weights: Path | None) -> ALIKED:
    """In its mode of a number of strongest maxima: the mode of a threshold falls back to another where all are weak."""
    maxima = max(MAXIMA, spec.max_features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        network = ALIKED(spec.model, max_num_keypoints=maxima, detection_threshold=0.0, nms_radius=spec.nms_radius)
    if weights is not None:
        state = read_weights(weights, "extractor.weights", spec.weights_sha256)
        owner = f"extractor.weights: {weights} is not of {spec.model}"
        # The offsets of the soft maximum follow from the radius, and are not in the published files.
        load_weights(network, state, owner, "Name the model that they belong to", optional=("dkd.",))
    return network.eval().requires_grad_(False)


def _strongest(places: Tensor, scores: Tensor, spec: Aliked) -> np.ndarray:
    """Positions of the best keypoints above the threshold, by falling score; ties by row and column."""
    (x, y), found = places.cpu().numpy().T, scores.cpu().numpy()
    order = np.lexsort((x, y, -found))
    return order[found[order] > spec.threshold][: spec.max_features]
