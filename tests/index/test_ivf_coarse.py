"""Coarse quantisers against all centroids, and against faiss."""

import faiss
import numpy as np
import pytest

from cbir.index.coarse import FlatCoarse, HnswCoarse, MultiIndex, coarse_of, restore_coarse
from cbir.index.nearest import nearest_centroid


def rows_of(num: int, seed: int, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_graph_finds_nearly_always_the_nearest_list(metric):
    centroids, rows = rows_of(2000, 0), rows_of(500, 1)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    graph = HnswCoarse.build(centroids, metric)
    exact = FlatCoarse(centroids, metric)
    assert (graph.nearest(rows) == nearest_centroid(rows, centroids, metric)).mean() > 0.97
    found, distances = graph.nearest_lists(rows, 8)
    best, to_best = exact.nearest_lists(rows, 8)
    assert (found == best).mean() > 0.95
    np.testing.assert_array_equal(distances[found == best], to_best[found == best])


def test_a_graph_does_not_depend_on_threads():
    centroids = rows_of(400, 0)
    graphs = [HnswCoarse.build(centroids, "l2").state()["graph"] for _ in range(2)]
    np.testing.assert_array_equal(*graphs)


def multi_index(num_words: int = 8, dim: int = 16) -> MultiIndex:
    return MultiIndex(np.stack([rows_of(num_words, 3, dim // 2), rows_of(num_words, 4, dim // 2)]))


@pytest.mark.parametrize("num", [1, 2, 7, 30, 64])
def test_a_multi_index_finds_the_nearest_pairs(num):
    """Babenko and Lempitsky 2012: their multi-sequence against the distances to all pairs of words."""
    coarse, rows = multi_index(), rows_of(300, 1)
    centroids = coarse.centroids_of(np.arange(64))
    distances = ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    best = np.argsort(distances, axis=1)[:, :num]
    lists, found = coarse.nearest_lists(rows, num)
    np.testing.assert_array_equal(lists, best)
    np.testing.assert_allclose(found, np.take_along_axis(distances, best, 1), rtol=1e-5)
    np.testing.assert_array_equal(coarse.nearest(rows), best[:, 0])


def test_a_multi_index_is_that_of_faiss():
    coarse, rows = multi_index(), rows_of(300, 1)
    quantiser = coarse.faiss_index()
    distances, lists = quantiser.search(rows, 10)
    found, to_lists = coarse.nearest_lists(rows, 10)
    np.testing.assert_array_equal(found, lists)
    np.testing.assert_allclose(to_lists, distances, rtol=1e-4)
    np.testing.assert_array_equal(quantiser.reconstruct(19), coarse.centroids_of(np.array([19]))[0])


@pytest.mark.parametrize("kind", ["flat", "hnsw", "imi"])
def test_a_restored_coarse_quantiser_and_that_of_a_faiss_index_find_the_same(kind):
    rows, centroids = rows_of(50, 1), rows_of(40, 0)
    coarse = {"flat": FlatCoarse(centroids, "l2"), "hnsw": HnswCoarse.build(centroids, "l2"), "imi": multi_index()}[
        kind
    ]
    again = restore_coarse(coarse.state(), "l2")
    index = faiss.deserialize_index(faiss.serialize_index(coarse.faiss_index()))
    for other in (again, coarse_of(index, "l2")):
        assert type(other) is type(coarse)
        assert (other.num_lists, other.dim) == (coarse.num_lists, 16)
        for mine, theirs in zip(coarse.nearest_lists(rows, 5), other.nearest_lists(rows, 5), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(other.nearest(rows), coarse.nearest(rows))
