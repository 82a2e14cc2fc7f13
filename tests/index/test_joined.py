"""Partitions of an inverted file that are searched as one."""

import gc
import itertools
from typing import Any

import numpy as np
import pytest

from cbir.index.ivf import InvertedFile, JoinedPartition
from cbir.index.ivfaq import IvfAq
from cbir.index.ivfflat import IvfFlat
from cbir.index.ivfpq import IvfPq
from cbir.index.ivfrabitq import IvfRabitq
from cbir.types import FeatureBatch, Hits

LISTS = {"lists": 16, "probes": 5, "iterations": 4}


def batch_of(num: int, seed: int) -> FeatureBatch:
    """Unit vectors with ids in no order of their values."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num, 32)).astype(np.float32)
    return FeatureBatch.of_global(
        np.sort(rng.permutation(10 * num)[:num]), rows / np.linalg.norm(rows, axis=1)[:, None]
    )


def partitions_of(spec: InvertedFile, batch: FeatureBatch, num: int) -> list[Any]:
    """Partitions by ranges of ids; the last one is empty."""
    index = spec.train(batch, seed=0)
    edges = np.linspace(0, len(batch), num).astype(int)
    ranges = [*itertools.pairwise(edges), (0, 0)]
    return [index.build(index.entries(batch.take(np.arange(low, high)))) for low, high in ranges]


@pytest.mark.parametrize(
    "spec",
    [
        IvfPq(bytes=8, bits=6, **LISTS),
        IvfPq(bytes=8, bits=6, metric="l2", **LISTS),
        IvfPq(bytes=8, bits=6, opq=True, **LISTS),
        IvfPq(bytes=8, bits=6, coarse="hnsw", **LISTS),
        IvfAq(bytes=4, bits=4, **LISTS),
        IvfRabitq(**LISTS),
    ],
    ids=["ivfpq", "l2", "opq", "hnsw", "ivfaq", "ivfrabitq"],
)
def test_a_joined_index_answers_like_its_partitions_together(spec: InvertedFile) -> None:
    parts, queries = partitions_of(spec, batch_of(2000, 0), 5), batch_of(30, 1)
    expected = Hits.merge([part.search(queries, 12) for part in parts], 12)
    entries = [part.entries().num_rows for part in parts]
    joined = parts[0].joined(parts[1:])
    assert isinstance(joined, JoinedPartition)
    assert [part.entries().num_rows for part in parts] == entries, "they stay as they are"
    del parts
    gc.collect()
    found = joined.search(queries, 12)
    np.testing.assert_array_equal(found.image_ids, expected.image_ids)
    np.testing.assert_array_equal(found.scores, expected.scores)
    alone = joined.search(queries.take(np.array([4])), 12)
    np.testing.assert_array_equal(alone.scores[0], expected.scores[4])


@pytest.mark.parametrize(
    "spec",
    [
        IvfFlat(**LISTS),
        IvfPq(bytes=8, bits=4, fast_scan=True, **LISTS),
        IvfPq(bytes=8, bits=6, refine="sq8", **LISTS),
    ],
    ids=["ivfflat", "fast_scan", "refined"],
)
def test_families_that_read_their_lists_otherwise_stay_apart(spec: InvertedFile) -> None:
    first, *others = partitions_of(spec, batch_of(700, 0), 3)
    assert first.joined(others) is None
