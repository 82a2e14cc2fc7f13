import numpy as np
import pytest

from cbir.encoding.assigners import ExactAssigner
from cbir.encoding.kmeans import assignment_sums, common_exponent
from cbir.encoding.vocabulary import Vocabulary
from cbir.encoding.vocabulary_tree import VocabularyTree
from cbir.errors import ConfigError, DataError

ASSIGNERS = ["auto", "exact", "hnsw", "ivf", "tree"]


def sample(n=3000, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(60, dim))[rng.integers(0, 60, n)] + 0.5 * rng.normal(size=(n, dim))).astype(np.float32)


def inertia(rows, vocabulary):
    return assignment_sums(rows, ExactAssigner(vocabulary.centroids), common_exponent(rows)).inertia


def trained(assigner, words=100):
    return Vocabulary.train(sample(), words, 3, 7, assigner)


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_training_again_gives_the_same_bytes_and_another_seed_others(assigner):
    one, same, other = (Vocabulary.train(sample(), 100, 3, seed, assigner).state() for seed in (1, 1, 2))
    assert {name: array.tobytes() for name, array in one.items()} == {
        name: array.tobytes() for name, array in same.items()
    }
    assert one["centroids"].tobytes() != other["centroids"].tobytes()


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_restore_is_the_identity(assigner):
    vocabulary, rows = trained(assigner), sample(seed=1)
    state = {
        name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        for name, array in vocabulary.state().items()
    }
    restored = Vocabulary.restore(state)
    assert restored.assigner.name == vocabulary.assigner.name
    assert restored.nearest(rows, 3).tobytes() == vocabulary.nearest(rows, 3).tobytes()
    assert {name: array.tobytes() for name, array in restored.state().items()} == {
        name: array.tobytes() for name, array in vocabulary.state().items()
    }


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_words_come_by_rising_distance_and_depend_on_the_row_alone(assigner):
    vocabulary, rows = trained(assigner), sample(seed=1)
    words, distances = vocabulary.nearest_with_distances(rows, 4)
    assert words.dtype == np.int32
    np.testing.assert_allclose(
        np.linalg.norm(rows[:, None] - vocabulary.centroids[words], axis=2), distances, rtol=1e-5
    )
    assert (np.diff(distances, axis=1) >= 0).all()
    halves = [vocabulary.nearest(half, 4) for half in (rows[:1111], rows[1111:])]
    assert np.concatenate(halves).tobytes() == words.tobytes()


@pytest.mark.parametrize("assigner", ["exact", "hnsw", "ivf"])
def test_large_vocabularies_are_about_as_good_whatever_assigns(assigner):
    rows = sample(6000)
    flat = Vocabulary.train(rows, 1000, 5, 0)
    assert flat.assigner.name == "exact"
    large = Vocabulary.train(rows, 1024, 3, 0, assigner)
    assert len(large) == 1024
    assert inertia(rows, large) < 1.03 * inertia(rows, flat)
    agreement = large.nearest(rows) == ExactAssigner(large.centroids).nearest(rows, 1)[0]
    assert agreement.mean() >= 0.95


def test_a_small_vocabulary_is_searched_exactly_and_a_large_one_by_cells():
    assert Vocabulary.of(sample(1023)).assigner.name == "exact"
    assert Vocabulary.of(sample(1024)).assigner.name == "ivf"


def test_far_features_can_be_discarded():
    vocabulary, rows = trained("exact"), sample(seed=1)
    distances = vocabulary.nearest_with_distances(rows)[1][:, 0]
    assert (distances <= np.inf).all()
    kept = rows[distances <= np.median(distances)]
    assert len(kept) == len(rows) // 2
    assert vocabulary.nearest_with_distances(kept)[1].max() <= np.median(distances)


def test_too_few_rows_are_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"words: 64 words need .* the sample has 63; set words to at most 63"):
        Vocabulary.train(sample(63), 64, 10, 0)
    with pytest.raises(DataError, match=r"depth 2 has 100 words .* the sample has 99"):
        Vocabulary.train(sample(99), 100, 10, 0, "tree")


def test_more_words_than_there_are_cannot_be_nearest():
    with pytest.raises(DataError, match="101 words per descriptor were asked for, but the vocabulary has 100"):
        trained("exact").nearest(sample(5), 101)


def test_a_tree_has_powers_of_ten_words_and_is_only_trained():
    assert isinstance(trained("tree").assigner, VocabularyTree)
    with pytest.raises(ConfigError, match="found 64"):
        Vocabulary.train(sample(), 64, 1, 0, "tree")
    with pytest.raises(ConfigError, match="only the words that it was trained with"):
        Vocabulary.of(sample(), "tree")


def test_rows_that_are_not_finite_are_refused():
    for words in (4, 1024):
        with pytest.raises(DataError, match="NaN or infinite"):
            Vocabulary.train(np.full((2000, 2), np.nan, np.float32), words, 1, 0)
