"""The nearest centroid, by float32 and by products of 8-bit integers: always the exact one."""

from collections.abc import Callable

import numpy as np
import pytest

from cbir.index import nearest
from cbir.index.nearest import nearest_centroid
from cbir.types import Floats, Int64s

METRICS = pytest.mark.parametrize("metric", ["ip", "l2"])
WAYS = pytest.mark.parametrize("way", ["_by_float32", "_by_int8"])

Way = Callable[[Floats, Floats, str], Int64s]


def exact(rows: Floats, centroids: Floats, metric: str) -> np.ndarray:
    """All scores in double precision."""
    left, right = rows.astype(np.float64), centroids.astype(np.float64)
    return left @ right.T if metric == "ip" else -((left[:, None] - right) ** 2).sum(2)


@METRICS
@WAYS
def test_the_first_of_the_nearest_is_found_where_rounding_cannot_tell(way: str, metric: str) -> None:
    """Groups of centroids closer together than float32 can resolve, and equal ones; whatever the batch."""
    rng, find = np.random.default_rng(0), getattr(nearest, way)
    near = np.repeat(rng.normal(size=(20, 24)), 4, axis=0) * (1 + 1e-7 * rng.integers(-2, 3, (80, 1)))
    rows, centroids = rng.normal(size=(3000, 24)).astype(np.float32), near.astype(np.float32)
    scores, found = exact(rows, centroids, metric), find(rows, centroids, metric)
    np.testing.assert_allclose(scores[np.arange(3000), found], scores.max(1), rtol=1e-12)
    first = np.array([np.flatnonzero((centroids == centroids[number]).all(1))[0] for number in found])
    np.testing.assert_array_equal(found, first)
    alone = np.concatenate([find(rows[n : n + 1], centroids, metric) for n in range(300)])
    np.testing.assert_array_equal(found[:300], alone)


@METRICS
@pytest.mark.parametrize("how", ["int8", "float32", "device"])
@pytest.mark.parametrize(
    ("spread", "offset", "dim", "words"),
    [(1.0, 0.0, 17, 130), (1e-3, 50.0, 8, 64), (1e4, 0.0, 33, 65), (1.0, 3.0, 128, 2), (1e-20, 0.0, 4, 9)],
)
def test_the_processor_never_shows_at_any_scale(
    metric: str, spread: float, offset: float, dim: int, words: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the processor under another name."""
    monkeypatch.setattr(nearest, "_multiplies_int8", lambda: how == "int8")
    monkeypatch.setattr(nearest, "_device", "cpu:0" if how == "device" else "cpu")
    monkeypatch.setattr(nearest, "_MANY_CENTROIDS", 2)
    rng = np.random.default_rng(1)
    rows, centroids = (
        (offset + spread * rng.normal(size=(num, dim)) * rng.random((num, 1))).astype(np.float32)
        for num in (500, words)
    )
    rows[3], rows[4], rows[5] = 0, centroids[-1], 1e-25 * rows[5]
    np.testing.assert_array_equal(nearest_centroid(rows, centroids, metric), exact(rows, centroids, metric).argmax(1))


@METRICS
def test_whole_numbers_with_many_ties(metric: str) -> None:
    rng = np.random.default_rng(2)
    rows, centroids = (rng.integers(0, 3, (num, 6)).astype(np.float32) for num in (2000, 300))
    expected = exact(rows, centroids, metric).argmax(1)
    np.testing.assert_array_equal(nearest._by_int8(rows, centroids, metric), expected)
    np.testing.assert_array_equal(nearest._by_device(rows, centroids, metric, "cpu"), expected)
    np.testing.assert_array_equal(nearest._by_float32(rows, centroids, metric), expected)


@METRICS
def test_few_centroids_none_and_no_rows(metric: str) -> None:
    rows = np.random.default_rng(4).normal(size=(5, 3)).astype(np.float32)
    assert nearest_centroid(rows, rows[:1], metric).tolist() == [0] * 5
    assert nearest_centroid(rows[:0], rows, metric).tolist() == []


def test_what_is_no_number_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_MANY_CENTROIDS", 2)
    rows = np.random.default_rng(5).normal(size=(5, 3)).astype(np.float32)
    broken = rows.copy()
    broken[2, 1] = np.nan
    found = nearest_centroid(broken, rows, "l2")
    assert found[2] == -1
    assert np.delete(found, 2).tolist() == [0, 1, 3, 4]
