import numpy as np
import pytest

from cbir.encoding.assigners import ExactAssigner
from cbir.encoding.vocabulary import Vocabulary
from cbir.encoding.vocabulary_tree import VocabularyTree
from cbir.errors import DataError


def sample(n=4000, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(50, dim))[rng.integers(0, 50, n)] + 0.4 * rng.normal(size=(n, dim))).astype(np.float32)


def small_tree(**settings):
    return VocabularyTree.train(sample(), 5, 3, seed=1, **settings)


def walked(tree, row):
    """The published way down, one comparison after the other."""
    path = [0]
    for nodes, parents in zip(tree.levels, tree.parents, strict=True):
        children = np.flatnonzero(parents == path[-1])
        squared = ((nodes[children].astype(np.float64) - row) ** 2).sum(axis=1)
        path.append(int(children[squared.argmin()]))
    return path[1:]


def test_a_path_goes_to_the_nearest_child_of_every_node():
    tree, rows = small_tree(), sample(200, seed=1)
    paths = tree.paths(rows)
    assert paths.shape == (200, 3)
    assert paths.tolist() == [walked(tree, row) for row in rows]


def test_the_end_of_the_path_is_the_word():
    tree, rows = small_tree(), sample(200, seed=1)
    words, squared = tree.nearest(rows, 1)
    np.testing.assert_array_equal(words[:, 0], tree.paths(rows)[:, -1])
    np.testing.assert_allclose(squared[:, 0], ((rows - tree.centroids[words[:, 0]]) ** 2).sum(axis=1), rtol=1e-4)


def test_depth_one_is_flat_kmeans_to_the_byte():
    tree = VocabularyTree.train(sample(), 40, 1, iterations=5, seed=3)
    flat = Vocabulary.train(sample(), 40, 5, 3, "exact")
    assert tree.centroids.tobytes() == flat.centroids.tobytes()
    np.testing.assert_array_equal(tree.paths(sample(seed=1)), flat.nearest(sample(seed=1)))


def test_every_node_has_children_below_it_and_at_most_as_many_as_branches():
    tree = small_tree()
    assert [len(nodes) for nodes in tree.levels] == [5, 25, 125]
    assert [np.bincount(parents).tolist() for parents in tree.parents] == [[5], [5] * 5, [5] * 25]


def test_parts_with_few_rows_have_fewer_children():
    rows = np.repeat(np.eye(3, dtype=np.float32), 50, axis=0)
    tree = VocabularyTree.train(rows, 4, 3, seed=0)
    assert len(tree.centroids) == 3
    np.testing.assert_allclose(tree.centroids[tree.paths(rows)[:, -1]], rows, atol=1e-6)


def test_the_more_nodes_are_followed_the_more_often_the_nearest_word_is_found():
    rows = sample(500, seed=1)
    exact = ExactAssigner(small_tree().centroids).nearest(rows, 1)[0]
    recall = [np.mean(small_tree(breadth=breadth).nearest(rows, 1)[0] == exact) for breadth in (1, 3, 125)]
    assert recall[0] < recall[1] < recall[2] == 1


def test_as_many_words_as_asked_for():
    tree, rows = small_tree(), sample(20, seed=1)
    words, squared = tree.nearest(rows, 125)
    assert (np.sort(words, axis=1) == np.arange(125)).all()
    assert (np.diff(squared, axis=1) >= 0).all()


def test_a_million_leaves_need_a_million_rows():
    with pytest.raises(DataError, match=r"10 branches and depth 6 has 1000000 words .* smaller depth"):
        VocabularyTree.train(sample(), seed=0)
