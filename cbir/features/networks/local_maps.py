"""From decoded images to the strongest places of a network's maps at several scales."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, normalize, softplus

from cbir.errors import ConfigError
from cbir.features.local_maps import LocalMapsSpec
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.loading import read_weights
from cbir.features.networks.receptive_field import ReceptiveField, receptive_field
from cbir.features.networks.scaling import scaled
from cbir.features.networks.vision import exactly
from cbir.types import FeatureBatch, Floats, ImageBatch, Int32s, Pixels

__all__ = ["Head", "LocalMapsExtractor", "TrainedAttention", "columns", "delf", "how"]

Head = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps (1, C, H, W) -> vectors of the places (1, C, H, W) and their scores (1, H, W)."""


def columns(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The places as they are, scored by the l2 norm."""
    return maps, maps.norm(dim=1)


def hypercolumn(layers: Sequence[Tensor]) -> Tensor:
    """Maps (N, C_l, H_l, W_l) -> (N, sum of C_l, H_1, W_1): unit vectors of the places of all layers side by side.

    Other maps than the first are resized to its grid; a place is as long as its vector in the first.
    """
    grid = layers[0].shape[-2:]
    resized = [layers[0], *(interpolate(maps, grid, mode="bilinear") for maps in layers[1:])]
    units = normalize(torch.cat([normalize(maps) for maps in resized], dim=1))
    columns_of_all: Tensor = units * layers[0].norm(dim=1, keepdim=True)
    return columns_of_all


def how(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Averages over 3 x 3 places, fewer at the border; scored by the l2 norm before averaging."""
    return avg_pool2d(maps, 3, 1, 1, count_include_pad=False), maps.norm(dim=1)


def delf(attention: nn.Module | None) -> Head:
    """Unit vectors, scored by the attention, or by the l2 norm without."""
    return lambda maps: (normalize(maps), attention(maps)[:, 0] if attention else maps.norm(dim=1))


class TrainedAttention(nn.Module):
    """The attention of DELF: two 1 x 1 convolutions, a ReLU between and a softplus after them."""

    def __init__(self, path: Path, field: str = "extractor.attention") -> None:
        super().__init__()
        state = read_weights(path, field)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        hidden, channels = shapes.get("conv1.weight", (0, 0))[:2]
        conv1, conv2 = (hidden, channels, 1, 1), (1, hidden, 1, 1)
        expected = {"conv1.weight": conv1, "conv1.bias": (hidden,), "conv2.weight": conv2, "conv2.bias": (1,)}
        if shapes != expected:
            raise ConfigError(
                f"{field}: {path} must hold conv1.weight (A, C, 1, 1), conv1.bias (A,), "
                f"conv2.weight (1, A, 1, 1) and conv2.bias (1,), found {shapes}"
            )
        self.conv1, self.conv2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, 1, 1)
        self.load_state_dict(state)
        self.eval().requires_grad_(False)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1, H, W), above 0."""
        scores: Tensor = softplus(self.conv2(torch.relu(self.conv1(maps))))
        return scores


class LocalMapsExtractor:
    """Places of the maps of a `Backbone`, scored by a head; images pass one by one, as they differ in shape."""

    def __init__(self, spec: LocalMapsSpec, weights: Path | None, device: str, head: Head) -> None:
        self._spec, self._head = spec, head
        self._device = torch.device(device)
        self._backbone = Backbone(spec, weights, *spec.map_layers).to(self._device)
        self._field, self._dim = self._trial(weights)

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """Descriptors (K, D) float32, geometry (K, 4) float32 in pixels of the upright originals."""
        if not len(batch):
            return FeatureBatch(batch.image_ids, np.zeros(1, np.int64), *self._no_rows())
        rows = [self._features(*pair) for pair in zip(batch.images, batch.sizes, strict=True)]
        descriptors, geometry = zip(*rows, strict=True)
        return FeatureBatch.of_images(batch.image_ids, descriptors, geometry)

    def _features(self, image: Pixels, original_size: Int32s) -> tuple[Floats, Floats]:
        # A plain image shows nothing; what a network makes of its borders would match that of every other one.
        if (image == image[:1, :1]).all():
            return self._no_rows()
        found = [self._at_scale(image, original_size, scale) for scale in self._spec.scales]
        descriptors, geometry, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        enough = scores > self._spec.least_score(float(scores.max(initial=0)))
        chosen = (enough & descriptors.any(axis=1)).nonzero()[0]
        # A stable order: of equal scores, the smaller scale, then the upper row come first.
        best = chosen[np.argsort(-scores[chosen], kind="stable")[: self._spec.max_features]]
        return descriptors[best], geometry[best]

    def _at_scale(self, image: Pixels, original_size: Int32s, scale: float) -> tuple[Floats, Floats, Floats]:
        """Vectors, geometry and scores of the best places at one scale."""
        longest = min(self._spec.size, int(original_size.max())) * scale
        seen = scaled(image, max(1, round(longest)))
        with exactly():
            vectors, scores = self._head(self._maps(torch.tensor(seen[None], device=self._device)))
            flat = scores[0].flatten().cpu().numpy()
            best = np.argsort(-flat, kind="stable")[: self._spec.max_features]
            rows = vectors[0].flatten(1)[:, torch.from_numpy(best).to(self._device)].T.contiguous().cpu().numpy()
        return rows, _geometry(best, scores.shape[-1], self._field, seen.shape, original_size), flat[best]

    def _maps(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, C, H', W')."""
        outputs = self._backbone.outputs(images)
        if any(output.ndim != 4 for output in outputs):
            raise ValueError("fully connected layers have no places")
        return hypercolumn(outputs) if len(outputs) > 1 else outputs[0]

    def _no_rows(self) -> tuple[Floats, Floats]:
        return np.empty((0, self._dim), np.float32), np.empty((0, 4), np.float32)

    def _trial(self, weights: Path | None) -> tuple[ReceptiveField, int]:
        """Found by black images, so that a network that refuses a layer or a size does so before the run."""
        spec = self._spec
        where = " ".join([spec.layers_key, *map(str, spec.map_layers), f"of backbone {spec.backbone!r}"])
        try:
            black = torch.zeros((1, 151, 223, 3), dtype=torch.uint8, device=self._device)
            with exactly():
                vectors, _ = self._head(self._maps(black))
            # Hypercolumns are on the grid of the first layer.
            first = Backbone(spec, weights, spec.map_layers[0]) if len(spec.map_layers) > 1 else self._backbone
            return receptive_field(first.to(self._device), self._device), vectors.shape[1]
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"extractor.{spec.layers_key}: {where} fails: {error}. Choose a stage or layers with maps, a network "
                "that takes images of any size, and an attention that was trained on this stage"
            ) from error


def _geometry(
    places: np.ndarray, columns: int, field: ReceptiveField, seen_size: tuple[int, ...], original_size: Int32s
) -> Floats:
    """x, y, size and angle (K, 4) of places of a map with so many columns, in pixels of the original."""
    ratio = original_size / seen_size[:2]
    cells = np.stack(np.divmod(places, columns), axis=1)
    centres = np.clip(field.first + cells * field.stride, 0, np.array(seen_size[:2]) - 1)
    y, x = ((centres + 0.5) * ratio - 0.5).T
    size = np.full(len(places), field.size * np.sqrt(ratio.prod()))
    return np.stack([x, y, size, np.zeros(len(places))], axis=1).astype(np.float32)
