import functools
import operator

import numpy as np
import pytest

from cbir.encoding.moments import Moments


def sample(num_rows=5000, dim=7):
    rng = np.random.default_rng(num_rows)
    return (rng.normal(size=(num_rows, dim)) @ rng.normal(size=(dim, dim)) + 3).astype(np.float32)


def test_mean_and_covariance_are_those_of_numpy():
    rows = sample()
    moments = Moments.of(rows)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.astype(np.float64).T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_shards", [1, 7, 40])
def test_merged_shards_are_the_single_pass(num_shards):
    rows, rng = sample(), np.random.default_rng(num_shards)
    cuts = np.sort(rng.integers(0, len(rows), num_shards - 1))
    shards = np.split(rows[rng.permutation(len(rows))], cuts)
    merged, whole = functools.reduce(operator.add, map(Moments.of, shards)), Moments.of(rows)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def test_whole_numbers_merge_exactly_and_do_not_overflow():
    rows = np.random.default_rng(0).integers(0, 256, (9000, 5), np.uint8)
    merged, whole = Moments.of(rows[:4000]) + Moments.of(rows[4000:]), Moments.of(rows)
    np.testing.assert_array_equal(merged.outer, whole.outer)
    np.testing.assert_array_equal(whole.outer, rows.astype(np.int64).T @ rows.astype(np.int64))


def test_no_rows_are_the_neutral_element():
    nothing, some = Moments.of(np.empty((0, 7), np.float32)), Moments.of(sample(10))
    merged = nothing + some
    assert merged.count == 10
    np.testing.assert_array_equal(merged.outer, some.outer)
    np.testing.assert_array_equal(merged.total, some.total)


def test_too_few_rows_for_a_mean_or_a_covariance():
    with pytest.raises(ValueError, match="no rows"):
        _ = Moments.of(np.empty((0, 3))).mean
    with pytest.raises(ValueError, match="two rows, found 1"):
        _ = Moments.of(np.ones((1, 3))).covariance
