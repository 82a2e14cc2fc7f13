from dataclasses import replace

import numpy as np
import pytest

from cbir.encoding.fisher import Fisher, FisherEncoder, fisher_vector
from cbir.encoding.gmm import Gmm
from cbir.encoding.residuals import residual_sums
from cbir.errors import DataError
from cbir.types import FeatureBatch

WORDS, DIM, NUM = 4, 5, 30


@pytest.fixture
def mixture():
    rng = np.random.default_rng(1)
    weights = rng.random(WORDS) + 0.2
    return Gmm(weights / weights.sum(), rng.normal(size=(WORDS, DIM)), rng.random((WORDS, DIM)) + 0.5)


@pytest.fixture
def rows():
    return np.random.default_rng(2).normal(size=(NUM, DIM))


def derivative(rows, mixture, field, values, place, step=1e-5):
    """Of the rows' likelihood by one mean or deviation."""
    likelihoods = []
    for sign in (1, -1):
        moved = values.copy()
        moved[place] += sign * step
        changed = replace(mixture, **{field: moved if field == "means" else moved**2})
        likelihoods.append(changed.log_likelihoods(rows).sum())
    return (likelihoods[0] - likelihoods[1]) / (2 * step)


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (3, 4)])
def test_the_blocks_are_scaled_gradients_of_the_likelihood(mixture, rows, place):
    """By finite differences; the sign of the second block is where implementations differ."""
    found = fisher_vector(rows, mixture, weights=False).reshape(2, WORDS, DIM)
    deviations = np.sqrt(mixture.variances)
    by_mean = derivative(rows, mixture, "means", mixture.means, place)
    by_deviation = derivative(rows, mixture, "variances", deviations, place)
    scale = deviations[place] / (NUM * np.sqrt(mixture.weights[place[0]]))
    assert found[0][place] == pytest.approx(by_mean * scale, rel=1e-5)
    assert found[1][place] == pytest.approx(by_deviation * scale / np.sqrt(2), rel=1e-5)


def test_the_weight_block(mixture, rows):
    found = fisher_vector(rows, mixture, weights=True)
    posteriors = mixture.posteriors(rows)
    expected = (posteriors - mixture.weights).sum(axis=0) / (NUM * np.sqrt(mixture.weights))
    np.testing.assert_allclose(found[:WORDS], expected)
    np.testing.assert_array_equal(found[WORDS:], fisher_vector(rows, mixture, weights=False))


def test_as_scikit_image_but_for_the_sign_of_the_deviations(mixture, rows):
    feature = pytest.importorskip("skimage.feature")
    sklearn_mixture = pytest.importorskip("sklearn.mixture")
    model = sklearn_mixture.GaussianMixture(WORDS, covariance_type="diag")
    model.weights_, model.means_, model.covariances_ = mixture.weights, mixture.means, mixture.variances
    model.precisions_cholesky_ = 1 / np.sqrt(mixture.variances)
    theirs = feature.fisher_vector(rows, model, improved=False, alpha=0.5)
    ours = fisher_vector(rows, mixture, weights=True)
    means, deviations = slice(WORDS, WORDS + WORDS * DIM), slice(WORDS + WORDS * DIM, None)
    np.testing.assert_allclose(ours[means], theirs[means], rtol=1e-6)
    np.testing.assert_allclose(ours[deviations], -theirs[deviations], rtol=1e-6)


def test_narrow_gaussians_of_one_width_give_vlad(mixture, rows):
    narrow = Gmm(np.full(WORDS, 1 / WORDS), mixture.means, np.full((WORDS, DIM), 1e-4))
    words = ((rows[:, None] - mixture.means) ** 2).sum(axis=2).argmin(axis=1)
    found = fisher_vector(rows, narrow, weights=False)[: WORDS * DIM]
    vlad = residual_sums(rows, words, mixture.means.astype(np.float32)).ravel()
    np.testing.assert_allclose(found / np.linalg.norm(found), vlad / np.linalg.norm(vlad), atol=1e-6)


def test_over_the_rows_of_training_the_gradient_vanishes():
    points = np.random.default_rng(3).normal(size=(400, 3))
    model = Gmm.train(points, 2, 300, 0)
    assert np.abs(fisher_vector(points, model, weights=True)).max() < 1e-3
    assert np.abs(fisher_vector(points[:20], model, weights=True)).max() > 0.05


def batch_of(counts, seed=4, sizes=(200, 400)):
    rng = np.random.default_rng(seed)
    total = sum(counts)
    geometry = np.concatenate([rng.random((total, 2)) * [400, 200], rng.random((total, 2)) * 30 + 1], axis=1)
    return FeatureBatch(
        np.arange(len(counts)),
        np.concatenate([[0], np.cumsum(counts)]),
        rng.normal(size=(total, DIM)).astype(np.float32),
        geometry.astype(np.float32),
        np.tile(np.array(sizes, np.int32), (len(counts), 1)),
    )


def test_power_and_length(mixture):
    batch = batch_of([20, 0, 7])
    for alpha in (0.5, 0.2, 1.0):
        encoder = FisherEncoder(Fisher(gaussians=WORDS, alpha=alpha), mixture, np.ones(1))
        encoded = encoder.encode(batch).descriptors
        raw = fisher_vector(batch.descriptors[:20], mixture, weights=False)
        expected = np.sign(raw) * np.abs(raw) ** alpha
        np.testing.assert_allclose(encoded[0], expected / np.linalg.norm(expected), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), [1, 0, 1], rtol=1e-6)


def test_places_are_shares_of_the_image():
    batch = batch_of([40, 30])
    spec = Fisher(gaussians=2, spatial="xys", spatial_weight=0.5)
    augmented = spec.augmented(batch, np.array([3.0]))
    x, y, size = batch.geometry.T[:3]
    np.testing.assert_allclose(augmented[:, DIM], 3 * ((x + 0.5) / 400 - 0.5), atol=1e-5)
    np.testing.assert_allclose(augmented[:, DIM + 1], 3 * ((y + 0.5) / 200 - 0.5), atol=1e-5)
    np.testing.assert_array_equal(np.argsort(augmented[:, DIM + 2]), np.argsort(size))
    lengths = np.linalg.norm(batch.descriptors.astype(np.float64), axis=1)
    assert spec.fit(batch, 0).state()["scale"][0] == pytest.approx(0.5 * lengths.mean())


def test_places_tell_apart_what_descriptors_do_not():
    batch = batch_of([60, 60])
    same = batch.with_descriptors(np.concatenate([batch.descriptors[:60]] * 2))
    apart = Fisher(gaussians=WORDS, spatial="xy").fit(same, 0).encode(same).descriptors
    alike = Fisher(gaussians=WORDS).fit(same, 0).encode(same).descriptors
    assert alike[0] @ alike[1] == pytest.approx(1, abs=1e-6)
    assert apart[0] @ apart[1] < 0.95
    assert apart.shape == (2, 2 * WORDS * (DIM + 2))


def test_images_of_another_size_have_the_same_places():
    batch = batch_of([50])
    geometry = batch.geometry.copy()
    geometry[:, :3] = (geometry[:, :3] + [0.5, 0.5, 0]) * 2 - [0.5, 0.5, 0]
    twice = replace(batch, geometry=geometry, sizes=batch.sizes * 2)
    encoder = Fisher(gaussians=WORDS, spatial="xys").fit(batch_of([80, 70], 5), 0)
    np.testing.assert_allclose(encoder.encode(twice).descriptors, encoder.encode(batch).descriptors, atol=1e-5)
    unknown = replace(batch, sizes=np.zeros((1, 2), np.int32))
    assert np.isfinite(encoder.encode(unknown).descriptors).all()


@pytest.mark.parametrize("spatial", ["xy", "xys"])
def test_the_laws_hold_with_places(spatial):
    batch = batch_of([20, 0, 1, 33])
    encoder = Fisher(gaussians=WORDS, spatial=spatial, weights=True).fit(batch, 0)
    parts = [encoder.encode(batch.take(np.array([i]))).descriptors for i in range(4)]
    assert np.concatenate(parts).tobytes() == encoder.encode(batch).descriptors.tobytes()
    assert encoder.encode(batch).descriptors.shape[1] == encoder.spec.output_dim(DIM)
    restored = encoder.spec.restore(encoder.state())
    assert restored.encode(batch).descriptors.tobytes() == encoder.encode(batch).descriptors.tobytes()


def test_places_need_geometry():
    plain = FeatureBatch.of_global(np.arange(9), np.ones((9, DIM), np.float32))
    with pytest.raises(DataError, match="spatial: xy needs features with geometry"):
        Fisher(gaussians=2, spatial="xy").fit(plain, 0)
