"""Hough pyramid matching on planted groups of matches, and against a direct computation of the paper's sum."""

import numpy as np
import pytest

from cbir.rerank.hough_pyramid import Hpm, strengths
from tests.rerank.scenes import SIMILARITY, Stored, hits, image, moved, planted, stored

LEVELS = 5


def all_strengths(cells: np.ndarray, query: np.ndarray, database: np.ndarray) -> np.ndarray:
    ends = np.array([0, len(cells)])
    return strengths(cells.astype(np.int64), query.astype(np.int32), database.astype(np.int32), ends, LEVELS)


def test_strengths_equal_the_sum_of_the_paper():
    """alpha(c) = g(b_0) + sum over l of 2^-l (g(b_l) - g(b_l-1)), where g(b) is the number of others in the bin."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 16**4, 200)
    cells[:80] = 16**4 - 1 - rng.integers(0, 40, 80)
    ones = np.arange(200)
    group = np.stack([((cells >> (4 * level))[:, None] == cells >> (4 * level)).sum(1) - 1 for level in range(LEVELS)])
    expected = group[0] + sum(2.0**-level * (group[level] - group[level - 1]) for level in range(1, LEVELS))
    np.testing.assert_array_equal(all_strengths(cells, ones, rng.permutation(200)), expected)


def test_one_group_is_the_maximum():
    """n matches in one bin of the finest grid have the strength n - 1 each, more than in any other arrangement."""
    ones, rng = np.arange(30), np.random.default_rng(0)
    together = all_strengths(np.full(30, 4711), ones, ones)
    assert (together == 29).all()
    for spread in (1, 16, 16**2, 16**4):
        apart = all_strengths(rng.integers(0, spread + 1, 30), ones, ones)
        assert apart.sum() < together.sum()
        assert (apart <= 29).all()


def test_the_order_of_matches_does_not_matter():
    rng = np.random.default_rng(1)
    cells, ones, order = rng.integers(0, 300, 150), np.arange(150), rng.permutation(150)
    found = all_strengths(cells, ones, ones)
    np.testing.assert_array_equal(all_strengths(cells[order], ones[order], ones[order]), found[order])


def test_a_feature_counts_once_in_a_bin():
    """Ten features of either image, all matched with all in one bin, are ten matches."""
    query, database = (side.ravel() for side in np.meshgrid(np.arange(10), np.arange(10), indexing="ij"))
    first = query != database  # the true matches come last, but alone meet in the finest grid
    order = np.argsort(~first, kind="stable")
    query, database = query[order], database[order]
    cells = np.where(query == database, 7, 16 + 5 * np.arange(100))
    found = all_strengths(cells, query, database)
    assert (found[query != database] == 0).all()
    assert (found[query == database] == 9).all()


def test_matches_outside_of_the_space_have_no_strength():
    cells = np.array([5, -1, 5, -1])
    assert all_strengths(cells, np.arange(4), np.arange(4)).tolist() == [1, 0, 1, 0]


def test_images_do_not_depend_on_each_other():
    rng = np.random.default_rng(2)
    cells, query, database = rng.integers(0, 60, 90), rng.integers(0, 20, 90), rng.integers(0, 20, 90)
    ends = np.array([0, 30, 30, 90])
    found = strengths(cells.astype(np.int64), query.astype(np.int32), database.astype(np.int32), ends, LEVELS)
    for start, stop in ((0, 30), (30, 90)):
        alone = all_strengths(cells[start:stop], query[start:stop], database[start:stop])
        np.testing.assert_array_equal(found[start:stop], alone)


@pytest.mark.parametrize("matches", ["word", "ratio"])
def test_images_with_consistent_matches_come_first(matches):
    context = stored({2: 30, 5: 60, 7: 40})
    found = (
        Hpm(channel="local", matches=matches, min_strength=300)
        .build()
        .rerank(hits([0, 9, 1, 2, 7, 3, 4, 5, 6]), context)
    )
    assert found.image_ids[0, :3].tolist() == [5, 7, 2]
    assert found.scores[0, 2] >= 300


def test_two_surfaces_that_move_differently_add_up():
    """Matches that follow two transforms are worth more than those that follow one of them."""
    query, _ = planted(0)
    one, other = moved(query.geometry, SIMILARITY), moved(query.geometry, np.diag([0.5, 0.5, 1.0]))
    halves = np.where(np.arange(len(one))[:, None] < 60, one, other)
    lost = one.copy()
    lost[60:, :2] = np.random.default_rng(0).uniform(0, 600, (60, 2))
    lost[60:, 3] = np.random.default_rng(1).uniform(0, 360, 60)
    scores = []
    for geometry in (one, halves, lost):
        context = Stored(query, image(geometry, query.descriptors, query.words))
        scores.append(float(Hpm(channel="local").build().rerank(hits([0]), context).scores[0, 0]))
    assert scores[0] > scores[1] > scores[2]
