"""Vectors that the tests of indexes are made of, and how answers are compared."""

import numpy as np
import pyarrow as pa

from cbir.types import FeatureBatch, Hits

DIM = 32


def descriptors(counts: list[int], seed: int, first_id: int = 0) -> FeatureBatch:
    """Unit vectors in a few clusters, with a zero vector and repeated vectors, ids neither dense nor sorted."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(20, DIM))
    rows = centres[rng.integers(0, 20, sum(counts))] + 0.5 * rng.normal(size=(sum(counts), DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if len(rows) > 9:
        rows[3], rows[5], rows[7] = 0, rows[4], rows[4]
    ids = first_id + 10**12 + 3 * rng.permutation(len(counts))
    return FeatureBatch(ids.astype(np.int64), np.concatenate([[0], np.cumsum(counts)]), rows.astype(np.float32))


def one_each(num_images: int, seed: int, first_id: int = 0) -> FeatureBatch:
    return descriptors([1] * num_images, seed, first_id)


def assert_same(left: Hits, right: Hits) -> None:
    np.testing.assert_array_equal(left.image_ids, right.image_ids)
    np.testing.assert_array_equal(left.scores, right.scores)


def scores_by_image(hits: Hits) -> np.ndarray:
    """The scores (Q, R) of each query in the order of the images' ids."""
    return np.take_along_axis(hits.scores, np.argsort(hits.image_ids, axis=1), 1)


def words_of(entries: pa.Table, num_words: int, bits: int) -> np.ndarray:
    """The words (n, num_words) that codes hold, unpacked by hand."""
    codes = np.frombuffer(b"".join(entries["code"].to_pylist()), np.uint8).reshape(len(entries), -1)
    flags = np.unpackbits(codes, axis=1, bitorder="little")[:, : num_words * bits].reshape(-1, num_words, bits)
    return flags @ (1 << np.arange(bits))
