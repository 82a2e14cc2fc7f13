import faiss
import numpy as np
import pytest

from cbir.encoding.codebook import Codebook
from cbir.errors import DataError


@pytest.fixture(autouse=True)
def _one_thread():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def clusters(num_words=12, per_word=40, dim=16, noise=0.05):
    rng = np.random.default_rng(num_words)
    centres = rng.normal(size=(num_words, dim)).astype(np.float32)
    labels = np.repeat(np.arange(num_words), per_word)
    return centres, labels, (centres[labels] + noise * rng.normal(size=(len(labels), dim))).astype(np.float32)


def brute_force(rows, centroids):
    wide = rows.astype(np.float64)[:, None] - centroids.astype(np.float64)
    return (wide**2).sum(axis=2).argmin(axis=1)


def inertia(rows, codebook):
    return float(((rows - codebook.centroids[codebook.assign(rows)]) ** 2).sum())


def test_the_word_is_the_nearest_centroid():
    rng = np.random.default_rng(0)
    codebook = Codebook(rng.normal(size=(33, 20)).astype(np.float32))
    rows = rng.normal(size=(3000, 20)).astype(np.float32)
    np.testing.assert_array_equal(codebook.assign(rows), brute_force(rows, codebook.centroids))


def test_far_from_the_origin_words_are_still_told_apart():
    _, labels, rows = clusters()
    centroids = np.stack([rows[labels == word].mean(axis=0) for word in range(12)]) + 1000
    np.testing.assert_array_equal(Codebook(centroids).assign(rows + 1000), labels)


def test_every_centroid_is_its_own_word_and_of_equal_ones_the_first_wins():
    centres, _, _ = clusters()
    np.testing.assert_array_equal(Codebook(centres).assign(centres), np.arange(12))
    np.testing.assert_array_equal(Codebook(np.concatenate([centres, centres])).assign(centres), np.arange(12))


def test_training_lowers_the_inertia_to_that_of_well_parted_clusters():
    centres, labels, rows = clusters(num_words=3)
    by_iterations = [inertia(rows, Codebook.train(rows, 8, iterations, 3)) for iterations in (1, 2, 4, 8, 16)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    assert by_iterations[-1] < by_iterations[0]
    best = min(inertia(rows, Codebook.train(rows, 3, 25, seed)) for seed in range(20))
    assert best < 1.05 * float(((rows - centres[labels]) ** 2).sum())


def test_after_convergence_a_centroid_is_the_mean_of_its_rows():
    _, _, rows = clusters(noise=0.3)
    codebook = Codebook.train(rows, 6, 100, 1)
    words = codebook.assign(rows)
    means = np.stack([rows[words == word].mean(axis=0) for word in range(6)])
    np.testing.assert_allclose(codebook.centroids, means, atol=1e-5)


def test_the_seed_decides():
    _, _, rows = clusters(noise=0.5)
    one, same, other = (Codebook.train(rows, 10, 5, seed).centroids.tobytes() for seed in (1, 1, 2**40))
    assert one == same
    assert one != other


def test_more_rows_than_needed_are_sampled_by_the_seed():
    rows = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    one, same, other = (Codebook.train(rows, 2, 3, seed).centroids.tobytes() for seed in (1, 1, 2))
    assert one == same != other


def test_cells_that_run_empty_are_split():
    rows = np.repeat(np.eye(3, 8, dtype=np.float32), 100, axis=0)
    codebook = Codebook.train(rows, 20, 10, 0)
    assert len(codebook) == 20
    assert np.isfinite(codebook.centroids).all()
    assert inertia(rows, codebook) < 1e-2


def test_as_many_rows_as_words_and_all_rows_alike():
    rows = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    assert inertia(rows, Codebook.train(rows, 5, 10, 0)) == 0
    np.testing.assert_allclose(Codebook.train(np.ones((9, 4)), 8, 10, 0).centroids, np.ones((8, 4)), atol=0.02)


def test_integers_are_taken_as_they_are():
    rows = np.random.default_rng(2).integers(0, 256, (400, 8), np.uint8)
    trained = Codebook.train(rows, 4, 10, 0)
    assert trained.centroids.tobytes() == Codebook.train(rows.astype(np.float32), 4, 10, 0).centroids.tobytes()
    np.testing.assert_array_equal(trained.assign(rows), brute_force(rows, trained.centroids))


def test_too_few_rows_are_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"words: 64 words need .* the sample has 63; set words to at most 63"):
        Codebook.train(np.ones((63, 4), np.float32), 64, 10, 0)


def test_rows_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="NaN or infinite"):
        Codebook.train(np.full((5, 2), np.nan, np.float32), 2, 10, 0)


def test_no_rows():
    codebook = Codebook(np.ones((2, 3), np.float32))
    assert codebook.assign(np.empty((0, 3), np.float32)).tolist() == []
    with pytest.raises(DataError, match="D = 4"):
        codebook.assign(np.empty((0, 4), np.float32))
