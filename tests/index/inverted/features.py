"""Local features for the tests of inverted files: clustered rows, images without any, ids neither dense nor sorted."""

import numpy as np

from cbir.types import FeatureBatch, Hits, Regions

DIM = 24
SEED = 5

CENTRES = np.random.default_rng(99).normal(size=(30, DIM))


def local_features(num_images: int, seed: int, most: int = 25) -> FeatureBatch:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most, num_images)
    counts[:2] = 0, most
    rows = CENTRES[rng.integers(0, 30, counts.sum())] + 0.4 * rng.normal(size=(counts.sum(), DIM))
    places, sizes = rng.uniform(0, 400, (len(rows), 2)), rng.uniform(2, 30, len(rows))
    ids = (10**12 + 3 * rng.permutation(num_images)).astype(np.int64)
    geometry = np.column_stack([places, sizes, rng.uniform(0, 360, len(rows))])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return FeatureBatch(ids, offsets, rows.astype(np.float32), geometry.astype(np.float32))


def with_regions(batch: FeatureBatch, boxes: list[list[float]]) -> FeatureBatch:
    """The same boxes in every image."""
    offsets = len(boxes) * np.arange(len(batch) + 1)
    return FeatureBatch(
        batch.image_ids,
        batch.offsets,
        batch.descriptors,
        batch.geometry,
        regions=Regions(offsets, np.tile(np.array(boxes, np.float32), (len(batch), 1))),
    )


def assert_same(left: Hits, right: Hits) -> None:
    np.testing.assert_array_equal(left.image_ids, right.image_ids)
    np.testing.assert_array_equal(left.scores, right.scores)
