import faiss
import numpy as np
import pytest

from cbir.encoding.codebook import Codebook
from cbir.encoding.vlad import Vlad, VladEncoder, residual_sums
from cbir.types import FeatureBatch

WORDS, DIM = 8, 16


@pytest.fixture(autouse=True)
def _one_thread():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def rows(seed, num_rows=60):
    return np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)


@pytest.fixture
def codebook():
    return Codebook(rows(99, WORDS))


def raw(codebook, descriptors):
    return residual_sums(descriptors, codebook.assign(descriptors), codebook.centroids)


def vlad(spec, codebook, *images):
    batch = FeatureBatch.of_images(np.arange(len(images)), images)
    return VladEncoder(spec, codebook).encode(batch).descriptors


def unit(v):
    return v / max(np.linalg.norm(v), 1e-12)


def test_the_definition_written_as_loops(codebook):
    sums = np.zeros((WORDS, DIM))
    for x in rows(0):
        word = ((x - codebook.centroids) ** 2).sum(axis=1).argmin()
        sums[word] += x.astype(np.float64) - codebook.centroids[word]
    np.testing.assert_allclose(raw(codebook, rows(0)), sums, atol=1e-5)
    square_rooted = np.sign(sums) * np.sqrt(np.abs(sums))
    for ssr, intra in ((False, False), (True, False), (False, True), (True, True)):
        expected = square_rooted if ssr else sums
        expected = unit(np.concatenate([unit(block) if intra else block for block in expected]))
        found = vlad(Vlad(words=WORDS, ssr=ssr, intra=intra), codebook, rows(0))
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_residual_sums_are_additive_over_disjoint_sets(codebook):
    a, b = rows(1), rows(2, 50)
    np.testing.assert_allclose(raw(codebook, np.concatenate([a, b])), raw(codebook, a) + raw(codebook, b), atol=1e-12)


def test_features_that_are_the_centroids_give_zero(codebook):
    np.testing.assert_array_equal(raw(codebook, codebook.centroids), np.zeros((WORDS, DIM)))
    np.testing.assert_array_equal(vlad(Vlad(words=WORDS), codebook, codebook.centroids), np.zeros((1, WORDS * DIM)))


def test_adapting_the_words_needs_only_counts_and_sums(codebook):
    """All about VLAD: with the means of the cells as words the residual sums become V - n (mean - word)."""
    descriptors = rows(3, 400)
    words = codebook.assign(descriptors)
    counts = np.bincount(words, minlength=WORDS)
    means = np.stack([descriptors[words == word].mean(axis=0, dtype=np.float64) for word in range(WORDS)])
    image = descriptors[:30]
    adapted = sum_by_word(image - means[words[:30]], words[:30])
    held = residual_sums(image, words[:30], codebook.centroids)
    n = np.bincount(words[:30], minlength=WORDS)[:, None]
    np.testing.assert_allclose(held - n * (means - codebook.centroids), adapted, atol=1e-5)
    assert counts.min() > 0


def sum_by_word(residuals, words):
    return np.stack([residuals[words == word].sum(axis=0) for word in range(WORDS)])


def test_intra_normalisation_gives_every_word_in_use_the_same_share(codebook):
    few = rows(4)[codebook.assign(rows(4)) < 5]
    for ssr in (False, True):
        blocks = vlad(Vlad(words=WORDS, ssr=ssr), codebook, few).reshape(WORDS, DIM)
        norms = np.linalg.norm(blocks, axis=1)
        used = norms > 0
        assert 1 < used.sum() <= 5
        np.testing.assert_allclose(norms[used], 1 / np.sqrt(used.sum()), rtol=1e-6)


def test_ssr_is_undone_by_squaring(codebook):
    plain = vlad(Vlad(words=WORDS, ssr=False, intra=False), codebook, rows(5))[0]
    rooted = vlad(Vlad(words=WORDS, ssr=True, intra=False), codebook, rows(5))[0]
    np.testing.assert_allclose(unit(np.sign(rooted) * rooted**2), plain, atol=1e-6)


def test_vectors_are_unit_and_an_image_without_features_is_zero(codebook):
    encoded = vlad(Vlad(words=WORDS), codebook, rows(6), rows(7, 0), rows(8, 1))
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), [1, 0, 1], rtol=1e-6)


def test_the_order_of_the_features_of_an_image_does_not_matter(codebook):
    np.testing.assert_allclose(
        vlad(Vlad(words=WORDS), codebook, rows(9)), vlad(Vlad(words=WORDS), codebook, rows(9)[::-1]), atol=1e-6
    )


def test_fit_trains_the_codebook_of_the_sample():
    sample = FeatureBatch.of_global(np.arange(500), rows(10, 500))
    encoder = Vlad(words=WORDS, iterations=7).fit(sample, 3)
    np.testing.assert_array_equal(
        encoder.state()["centroids"], Codebook.train(sample.descriptors, WORDS, 7, 3).centroids
    )
