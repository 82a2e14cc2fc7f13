import numpy as np
import pytest

from cbir.encoding.pca import Pca, principal_components
from cbir.errors import DataError
from cbir.types import FeatureBatch


def sample(num_rows=2000, dim=10, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, dim)) @ rng.normal(size=(dim, dim)) + 5).astype(np.float32)


def batch(rows):
    return FeatureBatch.of_global(np.arange(len(rows)), rows)


def encode(spec, rows, trained_on=None):
    return spec.fit(batch(rows if trained_on is None else trained_on), 0).encode(batch(rows)).descriptors


def test_whitened_covariance_is_the_identity():
    whitened = encode(Pca(dim=10, whiten=True, l2=False), sample())
    np.testing.assert_allclose(np.cov(whitened.T.astype(np.float64)), np.eye(10), atol=1e-4)
    np.testing.assert_allclose(whitened.mean(axis=0), np.zeros(10), atol=1e-5)


def test_without_whitening_the_covariance_is_the_spectrum():
    encoder = Pca(dim=6, l2=False).fit(batch(sample()), 0)
    covariance = np.cov(encoder.encode(batch(sample())).descriptors.T.astype(np.float64))
    np.testing.assert_allclose(covariance, np.diag(encoder.state()["variances"]), atol=1e-3)


def test_shrinkage_goes_from_plain_pca_to_full_whitening():
    rows = sample()
    none, half, full = (encode(Pca(dim=6, whiten=True, shrinkage=s, l2=False), rows) for s in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(none, encode(Pca(dim=6, l2=False), rows))
    np.testing.assert_allclose(half.astype(np.float64) ** 2, none.astype(np.float64) * full, rtol=1e-4, atol=1e-9)


def test_dual_and_primal_find_the_same_components():
    rows = sample(40, 40, 1).astype(np.float64)
    rows[:, 30:] = 0  # D = 40 > n by the zero columns only
    wide = np.pad(rows, ((0, 0), (0, 5)))
    primal_mean, primal, primal_variances = principal_components(rows, 20)
    dual_mean, dual, dual_variances = principal_components(wide, 20)
    np.testing.assert_allclose(dual_mean[:40], primal_mean, atol=1e-12)
    np.testing.assert_allclose(dual[:, :40], primal, atol=1e-8)
    np.testing.assert_allclose(dual_variances, primal_variances, rtol=1e-9)


@pytest.mark.parametrize(("num_rows", "dim"), [(300, 12), (12, 300), (12, 12)])
def test_components_are_orthonormal_and_their_largest_entry_is_positive(num_rows, dim):
    _, components, variances = principal_components(sample(num_rows, dim, 2), 9)
    np.testing.assert_allclose(components @ components.T, np.eye(9), atol=1e-9)
    assert (components[np.arange(9), np.abs(components).argmax(axis=1)] > 0).all()
    assert (np.diff(variances) <= 0).all()


@pytest.mark.parametrize(("num_rows", "dim"), [(300, 12), (12, 300)])
def test_the_reconstruction_error_is_the_sum_of_the_discarded_variances(num_rows, dim):
    rows = sample(num_rows, dim, 3).astype(np.float64)
    mean, components, variances = principal_components(rows, 11)
    kept = components[:4]
    error = (rows - mean) - (rows - mean) @ kept.T @ kept
    total = ((rows - mean) ** 2).sum() / (num_rows - 1)
    np.testing.assert_allclose((error**2).sum() / (num_rows - 1), total - variances[:4].sum(), rtol=1e-6)
    if dim == 12:
        np.testing.assert_allclose(total - variances.sum(), principal_components(rows, 12)[2][-1], rtol=1e-6)


def test_directions_without_variance_stay_orthonormal_and_finite():
    rows = np.repeat(sample(4, 30, 4), 5, axis=0)  # rank 3
    _, components, variances = principal_components(rows, 10)
    np.testing.assert_allclose(components @ components.T, np.eye(10), atol=1e-9)
    np.testing.assert_allclose(variances[3:], 0, atol=1e-9)
    whitened = encode(Pca(dim=10, whiten=True, l2=False), rows)
    assert np.isfinite(whitened).all()
    assert np.abs(whitened).max() < 100


def test_cropping_the_components_is_training_with_fewer():
    rows = sample()
    np.testing.assert_array_equal(
        encode(Pca(dim=10, whiten=True, l2=False), rows)[:, :3], encode(Pca(dim=3, whiten=True, l2=False), rows)
    )


def test_l2_gives_unit_vectors_of_the_same_direction():
    plain, unit = (encode(Pca(dim=5, whiten=True, l2=l2), sample()) for l2 in (False, True))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, rtol=1e-4, atol=1e-5)


def test_a_zero_row_stays_zero():
    rows = np.concatenate([np.zeros((1, 10), np.float32), sample(5)])
    encoded = encode(Pca(dim=4), rows, trained_on=sample())
    assert not encoded[0].any()
    assert encoded[1:].all()


@pytest.mark.parametrize(("num_rows", "dim", "largest"), [(30, 10, 10), (8, 10, 7), (1, 10, 0)])
def test_more_components_than_the_sample_has_are_refused_with_the_largest_number(num_rows, dim, largest):
    with pytest.raises(DataError, match=rf"dim: {largest + 1} components .* {num_rows} rows .* at most {largest}"):
        Pca(dim=largest + 1).fit(batch(sample(num_rows, dim)), 0)
    if largest:
        assert encode(Pca(dim=largest), sample(num_rows, dim)).shape == (num_rows, largest)


def test_a_sample_that_is_not_finite_or_cannot_be_whitened_is_refused():
    rows = sample(20)
    rows[3, 2] = np.inf
    with pytest.raises(DataError, match="NaN or infinite"):
        Pca(dim=2).fit(batch(rows), 0)
    with pytest.raises(DataError, match="all rows of the sample are equal"):
        Pca(dim=2, whiten=True).fit(batch(np.ones((20, 10), np.float32)), 0)
