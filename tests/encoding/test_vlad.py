import faiss
import numpy as np
import pytest

from cbir.encoding.codebook import Codebook
from cbir.encoding.residuals import NearestWords, Residuals, residual_sums
from cbir.encoding.vlad import Cells, Vlad, VladEncoder, local_bases, normalised_vlad
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
    return VladEncoder(spec, [Cells(spec.residuals(codebook))]).encode(batch).descriptors


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


def test_other_powers_than_the_square_root(codebook):
    sums = raw(codebook, rows(11))
    for alpha in (0.2, 0.7, 1.0):
        expected = unit((np.sign(sums) * np.abs(sums) ** alpha).reshape(-1))
        found = vlad(Vlad(words=WORDS, alpha=alpha, intra=False), codebook, rows(11))[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(
        vlad(Vlad(words=WORDS, alpha=1.0), codebook, rows(11)), vlad(Vlad(words=WORDS, ssr=False), codebook, rows(11))
    )


def test_several_vocabularies_are_concatenated():
    sample = FeatureBatch.of_images(np.arange(2), [rows(12, 300), rows(13, 10)])
    two = Vlad(words=WORDS, vocabularies=2).fit(sample, 5)
    first, second = (Vlad(words=WORDS).fit(sample, seed) for seed in (5, 6))
    joined = np.concatenate([part.encode(sample).descriptors for part in (first, second)], axis=1) / np.sqrt(2)
    np.testing.assert_allclose(two.encode(sample).descriptors, joined, atol=1e-7)
    np.testing.assert_array_equal(two.state()["centroids"][:WORDS], first.state()["centroids"])
    assert not np.array_equal(first.state()["centroids"], second.state()["centroids"])
    restored = two.spec.restore(two.state())
    assert restored.encode(sample).descriptors.tobytes() == two.encode(sample).descriptors.tobytes()


def test_one_vocabulary_is_plain_vlad():
    sample = FeatureBatch.of_global(np.arange(300), rows(12, 300))
    one, plain = Vlad(words=WORDS, vocabularies=1).fit(sample, 5), Vlad(words=WORDS).fit(sample, 5)
    assert one.encode(sample).descriptors.tobytes() == plain.encode(sample).descriptors.tobytes()


def test_normalised_residuals_count_one_each(codebook):
    for x in rows(14, 5):
        sums, counts = Residuals(codebook, unit=True).sums(x[None], codebook.assign(x[None])[:, None])
        assert np.linalg.norm(sums) == pytest.approx(1)
        assert counts.sum() == 1
    sums, _ = Residuals(codebook, unit=True).sums(codebook.centroids, np.arange(WORDS)[:, None])
    assert not sums.any()


def test_local_bases_are_orthogonal_and_sorted_by_variance(codebook):
    descriptors = rows(15, 900) * np.linspace(3, 0.1, DIM, dtype=np.float32)
    words = codebook.assign(descriptors)
    for unit_residuals in (False, True):
        bases = local_bases(descriptors, codebook, unit=unit_residuals).astype(np.float64)
        np.testing.assert_allclose(bases @ bases.transpose(0, 2, 1), np.tile(np.eye(DIM), (WORDS, 1, 1)), atol=1e-5)
        for word in np.flatnonzero(np.bincount(words) > DIM):
            residuals = descriptors[words == word] - codebook.centroids[word]
            turned = (unit_rows(residuals) if unit_residuals else residuals) @ bases[word].T
            covariance = np.cov(turned, rowvar=False)
            assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-4 * covariance.max()
            assert (np.diff(np.diag(covariance)) <= 1e-6).all()


def unit_rows(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_cell_that_the_sample_leaves_empty_keeps_its_coordinates(codebook):
    few = rows(16, 400)
    few = few[codebook.assign(few) > 0]
    np.testing.assert_array_equal(local_bases(few, codebook, unit=False)[0], np.eye(DIM))


def test_local_coordinates_turn_every_residual_and_keep_norms():
    sample = FeatureBatch.of_global(np.arange(400), rows(17, 400))
    spec = Vlad(words=WORDS, local_coordinates=True, ssr=False, intra=False)
    encoder = spec.fit(sample, 1)
    centroids, bases = encoder.state()["centroids"], encoder.state()["bases"].astype(np.float64)
    image = rows(18)
    expected = np.zeros((WORDS, DIM))
    for x in image:
        word = ((x - centroids) ** 2).sum(axis=1).argmin()
        expected[word] += bases[word] @ (x.astype(np.float64) - centroids[word])
    found = encoder.encode(FeatureBatch.of_images(np.arange(1), [image])).descriptors[0]
    np.testing.assert_allclose(found, unit(expected.reshape(-1)), atol=1e-6)
    plain = residual_sums(image, encoder.vocabularies[0].residuals.assign(image)[:, 0], centroids)
    turned = encoder.vocabularies[0].sums(image, encoder.vocabularies[0].residuals.assign(image))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(plain, axis=1), rtol=1e-5)
    restored = spec.restore(encoder.state())
    assert restored.encode(sample).descriptors.tobytes() == encoder.encode(sample).descriptors.tobytes()


def test_the_nearest_words_come_in_order_and_the_first_of_equal_ones_first(codebook):
    order = np.argsort(((rows(19)[:, None] - codebook.centroids) ** 2).sum(axis=2), axis=1)
    for num in (1, 2, 5, WORDS, WORDS + 3):
        np.testing.assert_array_equal(NearestWords(codebook, num)(rows(19)), order[:, :num])
    twice = Codebook(np.concatenate([codebook.centroids, codebook.centroids]))
    found = NearestWords(twice, 2)(codebook.centroids)
    np.testing.assert_array_equal(found, np.arange(WORDS)[:, None] + [0, WORDS])


def test_rank_weights(codebook):
    image = rows(20)
    weights = (1.0, 0.5, 0.25)
    order = np.argsort(((image[:, None] - codebook.centroids) ** 2).sum(axis=2), axis=1)
    expected = sum(
        weight * residual_sums(image, order[:, rank], codebook.centroids) for rank, weight in enumerate(weights)
    )
    soft = Residuals(codebook, weights)
    sums, counts = soft.sums(image, soft.assign(image))
    np.testing.assert_allclose(sums, expected, atol=1e-10)
    assert counts.sum() == pytest.approx(60 * 1.75)
    hard = Vlad(words=WORDS, rank_weights=(1.0, 0.0, 0.0))
    assert vlad(hard, codebook, image).tobytes() == vlad(Vlad(words=WORDS), codebook, image).tobytes()
    assert (
        vlad(Vlad(words=WORDS, rank_weights=weights), codebook, image).tobytes()
        != vlad(hard, codebook, image).tobytes()
    )


def test_far_features_are_left_out(codebook):
    image = rows(21)
    distances = np.sqrt(((image - codebook.centroids[codebook.assign(image)]) ** 2).sum(axis=1))
    limit = float(np.median(distances)) + 1e-4
    near = vlad(Vlad(words=WORDS), codebook, image[distances <= limit])
    np.testing.assert_array_equal(vlad(Vlad(words=WORDS, max_distance=limit), codebook, image), near)
    np.testing.assert_array_equal(
        vlad(Vlad(words=WORDS, max_distance=1e9), codebook, image), vlad(Vlad(words=WORDS), codebook, image)
    )
    assert not vlad(Vlad(words=WORDS, max_distance=1e-6), codebook, image).any()


def test_the_order_of_normalisations_is_that_of_vlfeat():
    sums = np.array([[3.0, -4.0], [0.0, 16.0]])
    root, half = np.sqrt(3 / 7), np.sqrt(4 / 7)
    np.testing.assert_allclose(normalised_vlad(sums, 0.5, True), np.array([root, -half, 0, 1]) / np.sqrt(2))
    both = normalised_vlad(np.stack([sums, 2 * sums]), 0.5, True)
    np.testing.assert_allclose(both[0], both[1])
