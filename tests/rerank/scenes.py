"""Planted scenes for the tests of geometric verification: images whose features move by one transform."""

from dataclasses import dataclass, field

import numpy as np

from cbir.types import FeatureBatch, Hits, Int64s

AFFINE = np.array([[1.1, -0.3, 40.0], [0.25, 0.9, -20.0], [0, 0, 1]])
SIMILARITY = np.array([[0.9, -0.5, 120.0], [0.5, 0.9, -30.0], [0, 0, 1]])
HOMOGRAPHY = np.array([[1.1, -0.2, 30.0], [0.15, 0.9, 10.0], [2e-4, -1e-4, 1.0]])
NUM_FEATURES = 120


@dataclass(frozen=True)
class Stored:
    """Queries and stored images, whose signatures are the features themselves; `asked` notes every call."""

    queries: FeatureBatch
    database: FeatureBatch
    asked: list[list[int]] = field(default_factory=list)

    def query_features(self, channel: str) -> FeatureBatch:
        assert channel == "local"
        return self.queries

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        assert channel == "local"
        self.asked.append(image_ids.tolist())
        return self.database.take(image_ids)

    query_signatures, signatures = query_features, features


def mapped(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    wide = np.hstack([points, np.ones((len(points), 1))]) @ transform.T
    return wide[:, :2] / wide[:, 2:]


def sift_like(num: int, rng: np.random.Generator) -> np.ndarray:
    return rng.gamma(0.5, 30, (num, 128)).clip(0, 255).astype(np.uint8)


def moved(geometry: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Features after the transform: sizes and angles are those of the similarity that is nearest to its linear part."""
    cosine, sine = transform[0, 0] + transform[1, 1], transform[1, 0] - transform[0, 1]
    there = geometry.astype(np.float64)
    there[:, :2] = mapped(transform, there[:, :2])
    there[:, 2] *= np.hypot(cosine, sine) / 2
    there[:, 3] = (there[:, 3] + np.degrees(np.arctan2(sine, cosine))) % 360
    return there


def planted(
    num_true: int, transform: np.ndarray = AFFINE, seed: int = 0, upright: bool = False
) -> tuple[FeatureBatch, FeatureBatch]:
    """Two images whose features match one to one; the first `num_true` by the transform, the others far from it.

    A feature's word is its number, which both images share, and its descriptor is good for a code.
    """
    rng, num = np.random.default_rng(seed), NUM_FEATURES
    descriptors, order = sift_like(num, rng), rng.permutation(num)
    columns = rng.uniform(0, 600, (num, 2)), rng.uniform(3, 30, num), rng.uniform(0, 360, num)
    here = np.column_stack(columns).astype(np.float32)
    there = moved(here, transform)
    there[:, :2] += rng.uniform(-0.3, 0.3, (num, 2))
    away, angles = rng.uniform(60, 300, (num, 2)) * rng.choice([-1, 1], (num, 2)), rng.uniform(0, 360, num)
    there[num_true:, :2] += away[num_true:]
    there[num_true:, 3] = angles[num_true:]
    if upright:
        here[:, 3] = there[:, 3] = 0
    words = np.arange(NUM_FEATURES, dtype=np.int32)
    return image(here, descriptors, words), image(there[order], descriptors[order], words[order])


def image(geometry: np.ndarray, descriptors: np.ndarray, words: np.ndarray | None = None) -> FeatureBatch:
    ends = np.array([0, len(descriptors)])
    return FeatureBatch(np.array([0]), ends, descriptors, geometry.astype(np.float32), words=words)


def stored(numbers: dict[int, int], num_images: int = 12) -> Stored:
    """One query; image n has numbers[n] true matches, none if it is not named."""
    pairs = [planted(numbers.get(n, 0)) for n in range(num_images)]
    together = FeatureBatch.concatenate([database for _, database in pairs])
    words = together.words
    rows = together.offsets, together.descriptors, together.geometry
    return Stored(pairs[0][0], FeatureBatch(np.arange(num_images), *rows, words=words))


def hits(ids: list[int]) -> Hits:
    return Hits(np.array([ids], np.int64), np.linspace(1, 0.5, len(ids), dtype=np.float32)[None])
