import numpy as np
import pytest

from cbir.encoding.scan import WordLists, finite_rows, nearest_of
from cbir.errors import DataError


def brute_force(rows, words, num):
    wide = rows.astype(np.float64)[:, None] - words.astype(np.float64)
    squared = (wide**2).sum(axis=2)
    order = np.argsort(squared, axis=1, kind="stable")[:, :num]
    return order, np.take_along_axis(squared, order, 1)


@pytest.mark.parametrize("dim", [1, 3, 16, 129])
@pytest.mark.parametrize("num", [1, 4])
def test_the_nearest_words_are_those_of_brute_force(dim, num):
    rng = np.random.default_rng(dim)
    words, rows = rng.normal(size=(70, dim)).astype(np.float32), rng.normal(size=(500, dim)).astype(np.float32)
    found, squared = WordLists(words).nearest(rows, None, num)
    expected, distances = brute_force(rows, words, num)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(squared, distances, rtol=1e-12)


@pytest.mark.parametrize(("offset", "scale"), [(1000.0, 1.0), (0.0, 1e-20), (0.0, 1e15), (-3.0, 1e-3)])
def test_neither_the_place_nor_the_size_of_the_vectors_matters(offset, scale):
    rng = np.random.default_rng(1)
    words, rows = (np.asarray((rng.normal(size=(n, 24)) + offset) * scale, np.float32) for n in (50, 300))
    np.testing.assert_array_equal(WordLists(words).nearest(rows, None, 3)[0], brute_force(rows, words, 3)[0])


def test_words_that_rounding_cannot_tell_apart_are_told_apart():
    rng = np.random.default_rng(2)
    words = np.float32(0.5) + 1e-6 * rng.normal(size=(64, 32)).astype(np.float32)
    words[0] += 1000  # a far word makes the grid coarse
    rows = words[1:][rng.integers(0, 63, 200)] + 1e-7 * rng.normal(size=(200, 32)).astype(np.float32)
    np.testing.assert_array_equal(WordLists(words).nearest(rows, None, 2)[0], brute_force(rows, words, 2)[0])


def test_rows_far_off_the_grid_find_their_words_too():
    rng = np.random.default_rng(3)
    words, rows = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(100, 8)).astype(np.float32)
    rows *= 10.0 ** rng.integers(0, 6, (100, 1))
    np.testing.assert_array_equal(WordLists(words).nearest(rows, None, 2)[0], brute_force(rows, words, 2)[0])


def test_of_equally_near_words_the_first_wins_in_every_list():
    words = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    assert WordLists(words).nearest(np.eye(3), None, 4)[0].tolist() == np.arange(12).reshape(3, 4).tolist()
    alike = np.ones((5, 3), np.float32)
    lists = WordLists(alike, np.array([2, 0, 2, 1, 0], np.int32), 3)
    assert lists.nearest(np.zeros((1, 3)), np.array([[2, 0]], np.int32), 4)[0].tolist() == [[0, 1, 2, 4]]


def test_only_the_words_of_a_rows_lists_are_looked_at():
    rng = np.random.default_rng(4)
    words, rows = rng.normal(size=(90, 12)).astype(np.float32), rng.normal(size=(200, 12)).astype(np.float32)
    list_of = rng.integers(0, 9, 90).astype(np.int32)
    lists = np.argsort(rng.random((200, 10)), axis=1)[:, :3].astype(np.int32)
    lists[lists == 9] = -1
    found, squared = WordLists(words, list_of, 9).nearest(rows, lists, 5)
    for row, chosen, near, distances in zip(rows, lists, found, squared, strict=True):
        own = np.flatnonzero(np.isin(list_of, chosen))
        expected, exact = brute_force(row[None], words[own], 5)
        assert near.tolist() == own[expected[0]].tolist()
        np.testing.assert_allclose(distances, exact[0], rtol=1e-12)


def test_where_the_lists_hold_too_few_words_there_is_minus_one():
    lists = WordLists(np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1], np.int32), 3)
    found, squared = lists.nearest(np.eye(4)[:2], np.array([[1], [2]], np.int32), 3)
    assert found.tolist() == [[2, 3, -1], [-1, -1, -1]]
    assert np.isinf(squared[found < 0]).all()


def test_a_row_alone_and_in_a_batch_has_the_same_bytes():
    rng = np.random.default_rng(5)
    words, rows = rng.normal(size=(60, 20)).astype(np.float32), rng.normal(size=(5000, 20)).astype(np.float32)
    lists = WordLists(words)
    found, squared = lists.nearest(rows, None, 2)
    for at in (0, 1, 4095, 4096, 4999):
        alone = lists.nearest(rows[at : at + 1], None, 2)
        assert alone[0].tobytes() == found[at].tobytes()
        assert alone[1].tobytes() == squared[at].tobytes()


def test_candidates_are_put_in_order():
    rng = np.random.default_rng(6)
    words, rows = rng.normal(size=(30, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    everything = np.tile(rng.permutation(30).astype(np.int32), (50, 1))
    found, squared = nearest_of(rows, everything, words, 4)
    expected = WordLists(words).nearest(rows, None, 4)
    np.testing.assert_array_equal(found, expected[0])
    np.testing.assert_array_equal(squared, expected[1])
    assert nearest_of(rows[:1], np.array([[7, -1]], np.int32), words, 2)[0].tolist() == [[7, -1]]


def test_rows_are_checked():
    lists = WordLists(np.ones((2, 3), np.float32))
    with pytest.raises(DataError, match="D = 4, but the vocabulary was trained on D = 3"):
        lists.nearest(np.empty((0, 4)), None, 1)
    with pytest.raises(DataError, match="NaN or infinite"):
        finite_rows(np.full((1, 3), np.inf), 3)
    assert lists.nearest(np.empty((0, 3)), None, 1)[0].shape == (0, 1)
