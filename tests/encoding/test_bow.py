import numpy as np
import pytest

from cbir.encoding.bow import Bow, BowEncoder, soft_weights
from cbir.encoding.codebook import Codebook
from cbir.types import FeatureBatch

WORDS, DIM = 12, 8


def images(seed=0, counts=(40, 0, 25, 60)):
    rng = np.random.default_rng(seed)
    return FeatureBatch.of_images(
        np.arange(len(counts)), [rng.normal(size=(count, DIM)).astype(np.float32) for count in counts]
    )


@pytest.fixture
def codebook():
    return Codebook(np.random.default_rng(3).normal(size=(WORDS, DIM)).astype(np.float32))


def encoder_of(spec, codebook, sigma=1.0, weights=None):
    return BowEncoder(spec, codebook, np.array([sigma]), np.ones(WORDS) if weights is None else weights)


def test_the_histogram_counts_features_by_word(codebook):
    batch = images()
    counts = np.stack(
        [np.bincount(codebook.assign(batch.descriptors[batch.rows(i)]), minlength=WORDS) for i in range(4)]
    )
    np.testing.assert_array_equal(encoder_of(Bow(words=WORDS), codebook).histograms(batch), counts)
    l1 = encoder_of(Bow(words=WORDS, norm="l1"), codebook).encode(batch).descriptors
    np.testing.assert_allclose(l1, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), rtol=1e-6)
    l2 = encoder_of(Bow(words=WORDS), codebook).encode(batch).descriptors
    np.testing.assert_allclose(np.linalg.norm(l2, axis=1), [1, 0, 1, 1], rtol=1e-6)


def test_the_product_is_the_score_of_an_inverted_file():
    """tf-idf: only words that both images have are visited."""
    database, query = images(1, (30, 20, 50, 10, 25)), images(2, (35,))
    encoder = Bow(words=WORDS, idf=True).fit(database, 4)
    codebook, idf = Codebook(encoder.state()["centroids"]), encoder.state()["weights"]

    def histogram(batch, i):
        return np.bincount(codebook.assign(batch.descriptors[batch.rows(i)]), minlength=WORDS)

    postings = {word: {} for word in range(WORDS)}
    for i in range(5):
        for word in np.flatnonzero(histogram(database, i)):
            postings[int(word)][i] = histogram(database, i)[word]
    np.testing.assert_allclose(idf, [np.log(5 / max(len(postings[word]), 1)) for word in range(WORDS)])
    assert (idf > 0).any()
    scores, norms, asked = np.zeros(5), np.zeros(5), histogram(query, 0) * idf
    for word, found in postings.items():
        for i, count in found.items():
            scores[i] += asked[word] * count * idf[word]
            norms[i] += (count * idf[word]) ** 2
    expected = scores / np.maximum(np.sqrt(norms) * np.linalg.norm(asked), 1e-12)
    found = encoder.encode(database).descriptors @ encoder.encode(query).descriptors[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_soft_assignment_is_philbins(codebook):
    batch = images(5, (30,))
    squares = ((batch.descriptors[:, None].astype(np.float64) - codebook.centroids) ** 2).sum(axis=2)
    words = np.argsort(squares, axis=1)[:, :3]
    near = np.take_along_axis(squares, words, 1)
    expected = np.exp(-near / (2 * 0.9**2))
    expected /= expected.sum(axis=1, keepdims=True)
    found = soft_weights(batch.descriptors, words, codebook.centroids, 0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    histogram = np.zeros(WORDS)
    np.add.at(histogram, words, expected)
    encoder = encoder_of(Bow(words=WORDS, neighbours=3), codebook, 0.9)
    np.testing.assert_allclose(encoder.histograms(batch)[0], histogram, rtol=1e-5)


def test_without_range_soft_assignment_is_hard(codebook):
    hard = encoder_of(Bow(words=WORDS), codebook).encode(images())
    soft = encoder_of(Bow(words=WORDS, neighbours=4), codebook, 1e-9).encode(images())
    assert soft.descriptors.tobytes() == hard.descriptors.tobytes()
    wide = encoder_of(Bow(words=WORDS, neighbours=WORDS, norm="l1"), codebook, 1e6).encode(images(6, (9,)))
    np.testing.assert_allclose(wide.descriptors, 1 / WORDS, rtol=1e-5)


def test_the_range_is_philbins_for_sift_and_scales_with_it():
    rows = np.abs(images(7, (300,)).descriptors)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for length in (512.0, 1.0):
        batch = FeatureBatch.of_global(np.arange(300), (rows * length).astype(np.float32))
        sigma = Bow(words=WORDS, neighbours=3).fit(batch, 0).state()["sigma"]
        assert sigma[0] ** 2 == pytest.approx(6250 * (length / 512) ** 2, rel=1e-5)
    assert Bow(words=WORDS, sigma=3.5).fit(batch, 0).state()["sigma"].tolist() == [3.5]
