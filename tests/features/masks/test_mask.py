"""Masks as keypoint filters: which features they drop, and what happens where they would drop all."""

import warnings

import numpy as np
import pytest

from cbir.features.masks.mask import drop_masked, usable_masks
from cbir.types import FeatureBatch, Regions

HEIGHT, WIDTH = 60, 80


def features(counts: tuple[int, ...] = (40, 0, 25), seed: int = 0) -> FeatureBatch:
    rng = np.random.default_rng(seed)
    num = sum(counts)
    geometry = np.column_stack(
        [rng.uniform(-0.5, WIDTH - 0.5, num), rng.uniform(-0.5, HEIGHT - 0.5, num), np.ones((num, 2))]
    )
    return FeatureBatch(
        np.arange(len(counts)) + 100,
        np.concatenate([[0], np.cumsum(counts)]),
        rng.integers(0, 255, (num, 8), np.uint8),
        geometry.astype(np.float32),
        np.tile(np.array([HEIGHT, WIDTH], np.int32), (len(counts), 1)),
        Regions(np.arange(len(counts) + 1), np.tile(np.float32([0, 0, WIDTH, HEIGHT]), (len(counts), 1))),
    )


def assert_same(left: FeatureBatch, right: FeatureBatch) -> None:
    assert left.to_arrow().equals(right.to_arrow(), check_metadata=True)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, 1), (7, 200)])
def test_a_mask_of_ones_is_the_identity(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(drop_masked(features(), [np.ones(shape, np.float32)] * 3, 1.0), features())


def test_a_zero_mask_falls_back_to_the_whole_image_with_a_warning():
    zero, left = np.zeros((6, 8), np.float32), np.zeros((6, 8), np.float32)
    left[:, :4] = 1
    with pytest.warns(RuntimeWarning, match="image 102: the mask leaves none of its 25 features, all are kept") as seen:
        kept = drop_masked(features(), [left, zero, zero], 0.5)
    assert len(seen) == 1
    assert kept.counts[0] < 40
    assert kept.counts[1:].tolist() == [0, 25]


@pytest.mark.parametrize("block", [1, 4, 8])
def test_features_stay_where_the_mask_is_at_least_the_threshold(block):
    """The same mask smaller than the image, of its size and larger."""
    coarse = np.random.default_rng(1).random((HEIGHT // 4, WIDTH // 4), np.float32)
    batch = features((200,))
    kept = drop_masked(batch, [np.kron(coarse, np.ones((block, block), np.float32))], 0.6)
    expected = [
        row
        for row, (x, y) in enumerate(batch.geometry[:, :2])
        if coarse[int((y + 0.5) // 4), int((x + 0.5) // 4)] >= np.float32(0.6)
    ]
    assert 20 < len(expected) < 180
    assert np.array_equal(kept.geometry, batch.geometry[expected])
    assert np.array_equal(kept.descriptors, batch.descriptors[expected])


def test_places_a_little_outside_are_at_the_rim():
    batch = features((4,))
    outside = np.float32([[-2, 3], [WIDTH + 1, 3], [3, -2], [3, HEIGHT + 1]])
    batch.geometry[:, :2] = outside
    mask = np.zeros((HEIGHT, WIDTH), np.float32)
    mask[:, 0] = mask[0] = 1
    assert drop_masked(batch, [mask], 0.5).geometry[:, :2].tolist() == [outside[0].tolist(), outside[2].tolist()]


def test_no_images():
    none = features().take(np.arange(0))
    assert_same(drop_masked(none, [], 0.5), none)


def test_a_batch_may_be_cut_anywhere():
    rng = np.random.default_rng(2)
    batch, masks = features((30, 0, 20, 10)), [rng.random((6, 8), np.float32) for _ in range(4)]
    parts = [drop_masked(batch.take(np.array([i])), [masks[i]], 0.3) for i in range(4)]
    assert_same(FeatureBatch.concatenate(parts), drop_masked(batch, masks, 0.3))


def test_a_mask_that_nowhere_reaches_the_threshold_is_not_used():
    masks = [np.float32([[0.2, 0.5]]), np.float32([[0.2, 0.4]]), np.zeros((3, 2), np.float32)]
    with pytest.warns(RuntimeWarning, match="image 1[12]: the mask leaves no place, the whole image is used") as seen:
        used = usable_masks(np.array([10, 11, 12]), masks, 0.5)
    assert len(seen) == 2
    assert used[0] is masks[0]
    assert (used[1].tolist(), used[2].tolist()) == ([[1, 1]], [[1, 1], [1, 1], [1, 1]])
