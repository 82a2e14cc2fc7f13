import numpy as np
import pytest

from cbir.encoding.democratic import democratic_weights
from cbir.encoding.gmp import gmp_weights
from cbir.encoding.triangulation import TriangulationEmbedding, directions
from cbir.types import FeatureBatch

WORDS, DIM = 5, 8
DIMS = (WORDS - 1) * DIM


def batch(seed, counts):
    rng = np.random.default_rng(seed)
    return FeatureBatch.of_images(
        np.arange(len(counts)), [rng.gamma(1.0, size=(count, DIM)).astype(np.float32) for count in counts]
    )


@pytest.fixture(scope="module")
def sample():
    return batch(0, [700, 0, 800])


def encoder_of(sample, **settings):
    return TriangulationEmbedding(words=WORDS, **settings).fit(sample, 3)


def test_directions_are_unit_vectors_from_every_word():
    centroids = batch(1, [WORDS]).descriptors
    rows = batch(2, [20]).descriptors
    found = directions(rows, centroids)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.sqrt(WORDS))
    differences = rows[:, None].astype(np.float64) - centroids
    expected = differences / np.linalg.norm(differences, axis=2, keepdims=True)
    np.testing.assert_allclose(found, expected.reshape(20, -1), rtol=1e-12)
    assert directions(centroids, centroids).reshape(WORDS, WORDS, DIM)[range(WORDS), range(WORDS)].any() == 0


def test_over_the_sample_the_embedding_is_white(sample):
    embedded = encoder_of(sample).embed(sample.descriptors)
    assert embedded.shape == (1500, DIMS)
    np.testing.assert_allclose(embedded.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(embedded.T @ embedded / len(embedded), np.eye(DIMS), atol=1e-4)


def test_the_strongest_components_are_dropped(sample):
    encoder = encoder_of(sample)
    raw = directions(sample.descriptors, encoder.codebook.centroids)
    variances, vectors = np.linalg.eigh(np.cov(raw, rowvar=False, bias=True))
    dropped = vectors.T[::-1][:DIM]
    assert np.abs(encoder.state()["projection"] @ dropped.T).max() < 1e-4
    norms = np.linalg.norm(encoder.state()["projection"], axis=1)
    np.testing.assert_allclose(norms, 1 / np.sqrt(variances[::-1][DIM:]), rtol=1e-4)


def test_the_sum_is_projected_once(sample):
    encoder = encoder_of(sample, alpha=1.0, l2=False)
    image = batch(4, [30])
    expected = encoder.embed(image.descriptors).sum(axis=0)
    np.testing.assert_allclose(encoder.encode(image).descriptors[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggregation", ["democratic", "gmp"])
def test_the_other_aggregations(sample, aggregation):
    encoder = encoder_of(sample, aggregation=aggregation, regularisation=0.5)
    image = batch(5, [30])
    embedded = encoder.embed(image.descriptors)
    similarities = embedded @ embedded.T
    weights = (
        democratic_weights(similarities, 10) if aggregation == "democratic" else gmp_weights(similarities, 0.5 * DIMS)
    )
    total = weights @ embedded
    expected = np.sign(total) * np.sqrt(np.abs(total))
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(encoder.encode(image).descriptors[0], expected, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["democratic", "gmp"])
def test_the_laws_hold_for_the_other_aggregations(sample, aggregation):
    encoder, images = encoder_of(sample, aggregation=aggregation), batch(6, [20, 0, 1, 33, 50])
    parts = [encoder.encode(images.take(np.array(some))).descriptors for some in ([0], [1, 2], [3, 4])]
    whole = encoder.encode(images).descriptors
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert encoder.spec.restore(encoder.state()).encode(images).descriptors.tobytes() == whole.tobytes()
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), [1, 0, 1, 1, 1], rtol=1e-5)


def test_a_sample_with_fewer_rows_than_directions_stays_finite():
    small = batch(7, [20])
    encoded = encoder_of(small).encode(batch(8, [10, 3])).descriptors
    assert np.isfinite(encoded).all()
    assert encoded.shape == (2, DIMS)
