"""Sum, democratic and generalised max pooling."""

import numpy as np
import pytest

from cbir.encoding.democratic import Democratic, democratic_weights
from cbir.encoding.gmp import Gmp, gmp_weights
from cbir.encoding.weighted_sum import Sum, gram
from cbir.types import FeatureBatch

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(12, 40)).astype(np.float32)


def pooled(spec, rows):
    return (
        spec.fit(FeatureBatch.of_images(np.arange(1), [rows]), 0)
        .encode(FeatureBatch.of_images(np.arange(1), [rows]))
        .descriptors[0]
    )


def unit(v):
    return v / np.linalg.norm(v)


def test_a_sum_is_a_sum():
    np.testing.assert_allclose(pooled(Sum(l2=False), ROWS), ROWS.sum(axis=0), atol=1e-5)
    total = ROWS.sum(axis=0)
    np.testing.assert_allclose(pooled(Sum(alpha=0.5), ROWS), unit(np.sign(total) * np.sqrt(np.abs(total))), atol=1e-6)


def test_democratic_weights_are_a_fixed_point():
    similarities = gram(ROWS)
    weights = democratic_weights(similarities, 2000)
    np.testing.assert_allclose(weights * (np.maximum(similarities, 0) @ weights), 1, atol=1e-9)
    np.testing.assert_array_equal(democratic_weights(similarities, 0), np.ones(12))
    coarse, fine = (
        np.abs(w * (np.maximum(similarities, 0) @ w) - 1).max()
        for w in (democratic_weights(similarities, number) for number in (1, 10))
    )
    assert fine < coarse


def test_a_burst_of_equal_features_has_less_say():
    rows = np.eye(3, 8, dtype=np.float32)[[0] * 50 + [1, 2]]
    expected = {"sum": 50, "democratic": np.sqrt(50), "gmp": 1}
    for spec in (Sum(), Democratic(iterations=100), Gmp(regularisation=1e-6)):
        found = pooled(spec, rows)
        np.testing.assert_allclose(found[0] / found[1:3], expected[spec.name], rtol=1e-4)


def test_every_feature_has_the_same_share_of_a_democratic_vector():
    rows = np.abs(ROWS)
    total = pooled(Democratic(iterations=2000, l2=False), rows).astype(np.float64)
    shares = democratic_weights(gram(rows), 2000) * (rows @ total)
    np.testing.assert_allclose(shares, 1, rtol=1e-5)


def test_rows_without_direction_have_no_say():
    rows = np.concatenate([ROWS, np.zeros((3, 40), np.float32)])
    for spec in (Democratic(), Gmp(), Sum()):
        np.testing.assert_allclose(pooled(spec, rows), pooled(spec, ROWS), atol=1e-6)


def test_gmp_is_ridge_regression_in_both_forms():
    for regularisation in (0.5, 3.0):
        wide = ROWS.astype(np.float64)
        primal = np.linalg.solve(wide.T @ wide + regularisation * np.eye(40), wide.T @ np.ones(12))
        np.testing.assert_allclose(pooled(Gmp(regularisation=regularisation, l2=False), ROWS), primal, atol=1e-5)
        tall = ROWS.T.copy()
        dual = tall.T.astype(np.float64) @ gmp_weights(gram(tall), regularisation)
        np.testing.assert_allclose(pooled(Gmp(regularisation=regularisation, l2=False), tall), dual, atol=1e-5)


def test_the_limits_of_gmp():
    every = pooled(Gmp(regularisation=1e-9, l2=False), ROWS)
    np.testing.assert_allclose(ROWS @ every, 1, atol=1e-4)
    assert pooled(Gmp(regularisation=1e9), ROWS) @ pooled(Sum(), ROWS) == pytest.approx(1, abs=1e-6)


def test_one_feature_is_itself():
    for spec in (Democratic(), Gmp(), Sum()):
        np.testing.assert_allclose(pooled(spec, ROWS[:1]), unit(ROWS[0]), atol=1e-6)
