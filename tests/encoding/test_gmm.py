import itertools

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from cbir.encoding.gmm import FLOOR, Gmm
from cbir.errors import DataError

MEANS = np.array([[0.0, 0.0, 5.0], [6.0, -3.0, 0.0]])
DEVIATIONS = np.array([[0.5, 1.0, 2.0], [1.5, 0.3, 1.0]])


def rows(num=2000, seed=0):
    rng = np.random.default_rng(seed)
    which = (rng.random(num) < 0.3).astype(int)
    return MEANS[which] + DEVIATIONS[which] * rng.normal(size=(num, 3)), which


def mixture(seed=1, gaussians=4, dim=5):
    rng = np.random.default_rng(seed)
    weights = rng.random(gaussians) + 0.1
    return Gmm(weights / weights.sum(), rng.normal(size=(gaussians, dim)), rng.random((gaussians, dim)) + 0.5)


def test_densities_are_those_of_normal_distributions():
    model, points = mixture(), np.random.default_rng(2).normal(size=(30, 5))
    shares = np.stack(
        [
            weight * multivariate_normal(mean, np.diag(variance)).pdf(points)
            for weight, mean, variance in zip(model.weights, model.means, model.variances, strict=True)
        ],
        axis=1,
    )
    np.testing.assert_allclose(model.log_likelihoods(points), np.log(shares.sum(axis=1)))
    np.testing.assert_allclose(model.posteriors(points), shares / shares.sum(axis=1, keepdims=True))


def test_posteriors_are_taken_in_log_space():
    far = np.full((1, 5), 1e4)
    assert np.isfinite(mixture().log_likelihoods(far)).all()
    np.testing.assert_allclose(mixture().posteriors(far).sum(), 1)


def test_the_likelihood_never_falls():
    points = np.random.default_rng(3).gamma(1.0, size=(600, 4))
    floor = FLOOR * points.var(axis=0)
    models = [Gmm.train(points, 6, 0, 1)]
    for _ in range(40):
        models.append(models[-1].improved(points, floor))
    likelihoods = [model.log_likelihoods(points).sum() for model in models]
    assert all(later > earlier - 1e-7 * abs(earlier) for earlier, later in itertools.pairwise(likelihoods))
    assert likelihoods[-1] > likelihoods[0] + 1
    again = Gmm.train(points, 6, 40, 1)
    np.testing.assert_array_equal(again.means, models[-1].means)


def test_it_finds_the_gaussians_that_made_the_rows():
    points, which = rows()
    found = Gmm.train(points, 2, 50, 0)
    order = np.argsort(found.means[:, 0])
    np.testing.assert_allclose(found.means[order], MEANS, atol=0.2)
    np.testing.assert_allclose(np.sqrt(found.variances[order]), DEVIATIONS, rtol=0.1)
    np.testing.assert_allclose(found.weights[order], [0.7, 0.3], atol=0.05)
    assert (found.posteriors(points)[:, order].argmax(axis=1) == which).mean() > 0.99


def test_one_gaussian_has_the_moments_of_the_rows():
    points = rows(1000)[0]
    found = Gmm.train(points, 1, 3, 0)
    np.testing.assert_allclose(found.means[0], points.mean(axis=0))
    np.testing.assert_allclose(found.variances[0], points.var(axis=0))


def test_variances_have_a_floor():
    points = np.repeat(rows(5)[0], 40, axis=0)
    found = Gmm.train(points, 5, 20, 0)
    assert (found.variances >= 0.999 * FLOOR * points.var(axis=0)).all()
    same = Gmm.train(np.ones((50, 3)), 4, 10, 0)
    assert np.isfinite(same.posteriors(np.ones((2, 3)))).all()
    assert (same.variances > 0).all()


def test_weights_sum_to_one_and_stay_positive():
    found = Gmm.train(np.repeat(np.eye(3), 30, axis=0), 8, 20, 0)
    assert found.weights.sum() == pytest.approx(1)
    assert (found.weights > 0).all()


def test_more_rows_than_needed_are_sampled_by_the_seed():
    points = np.random.default_rng(4).normal(size=(3000, 2))
    one, same, other = (Gmm.train(points, 2, 3, seed).means.tobytes() for seed in (1, 1, 2))
    assert one == same != other


def test_too_few_rows_are_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"gaussians: 9 Gaussians need .* the sample has 8; set gaussians to at most 8"):
        Gmm.train(np.ones((8, 3)), 9, 1, 0)
    with pytest.raises(DataError, match="D = 4"):
        mixture().posteriors(np.ones((2, 4)))
