import itertools

import numpy as np
import pytest

from cbir.encoding.assigners import CellAssigner, DirectionAssigner, ExactAssigner
from cbir.encoding.kmeans import (
    Sums,
    assignment_sums,
    common_exponent,
    kmeans_in_groups,
    lloyd,
    nested_parts,
    sampled_rows,
    two_level_words,
    unit_rows,
    update,
)
from cbir.errors import DataError


def clusters(num=20, per_cluster=60, dim=16, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num, dim))
    labels = np.repeat(np.arange(num), per_cluster)
    return (centres[labels] + noise * rng.normal(size=(len(labels), dim))).astype(np.float32)


def one_group(rows, words, iterations=0, seed=0):
    return kmeans_in_groups(rows, np.zeros(len(rows), np.int32), np.array([words]), iterations, seed)[0]


def plain_lloyd(rows, centroids):
    wide = rows.astype(np.float64)
    words = ((wide[:, None] - centroids.astype(np.float64)) ** 2).sum(axis=2).argmin(axis=1)
    return np.stack([wide[words == word].mean(axis=0) for word in range(len(centroids))])


def inertia(rows, centroids):
    return assignment_sums(rows, ExactAssigner(centroids), common_exponent(rows)).inertia


def as_bytes(sums):
    return [part.tobytes() for part in (sums.sums, sums.counts, sums.errors)]


def test_a_round_gives_the_means_of_the_rows():
    rows = clusters()
    centroids = one_group(rows, 9)
    sums = assignment_sums(rows, ExactAssigner(centroids), common_exponent(rows))
    np.testing.assert_allclose(update(centroids, sums), plain_lloyd(rows, centroids), atol=1e-6)
    wide = ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    assert sums.inertia == pytest.approx(wide.min(axis=1).sum(), rel=1e-5)
    assert sums.counts.tolist() == np.bincount(wide.argmin(axis=1), minlength=9).tolist()


@pytest.mark.parametrize("build", [ExactAssigner.of, CellAssigner.of, DirectionAssigner])
@pytest.mark.parametrize("num_shards", [1, 7, 40])
def test_the_sums_of_shards_in_any_order_are_those_of_all_rows_to_the_byte(build, num_shards):
    rows, rng = clusters(), np.random.default_rng(num_shards)
    assigner, exponent = build(one_group(rows, 50)), common_exponent(rows)
    whole = assignment_sums(rows, assigner, exponent)
    total = Sums.zeros(50, 16, exponent)
    for shard in np.array_split(rng.permutation(len(rows)), num_shards):
        total += assignment_sums(rows[shard], assigner, exponent)
    assert as_bytes(total) == as_bytes(whole)
    assert update(assigner.centroids, total).tobytes() == update(assigner.centroids, whole).tobytes()


def test_sums_of_another_exponent_are_not_added():
    with pytest.raises(ValueError, match="exponent 3 and 4"):
        Sums.zeros(2, 2, 3) + Sums.zeros(2, 2, 4)


def test_the_inertia_never_rises():
    rows = clusters(noise=1.0)
    found = [inertia(rows, lloyd(rows, one_group(rows, 30), rounds, ExactAssigner)) for rounds in range(12)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(found))
    assert found[-1] < 0.95 * found[0]


def test_an_empty_word_takes_half_of_the_word_with_the_largest_error():
    rows = np.concatenate([np.full((50, 2), -9.0), [[0, 0], [0, 2], [4, 0], [4, 2]]]).astype(np.float32)
    centroids = np.array([[-9, -9], [2, 1], [99, 99]], np.float32)  # the first has most rows, but without error
    moved = update(centroids, assignment_sums(rows, ExactAssigner(centroids), common_exponent(rows)))
    np.testing.assert_allclose(moved[0], [-9, -9])
    np.testing.assert_allclose((moved[1] + moved[2]) / 2, [2, 1], atol=1e-6)
    assert inertia(rows, lloyd(rows, moved, 3, ExactAssigner)) < inertia(rows, moved) < inertia(rows, centroids)


def test_words_stay_as_they_are_where_nothing_can_be_split():
    rows = np.ones((9, 4), np.float32)
    np.testing.assert_array_equal(one_group(rows, 5, 3), np.ones((5, 4)))


def test_many_empty_words_are_all_put_to_use():
    rows = clusters(num=3, per_cluster=100, noise=0.1)
    start = np.repeat(rows[:1], 40, axis=0)
    words = lloyd(rows, start, 10, ExactAssigner)
    assert len(np.unique(words, axis=0)) == 40
    assert inertia(rows, words) < 0.1 * inertia(rows, start)


def test_groups_are_clustered_each_on_its_own():
    rows = clusters()
    group_of = 2 * np.random.default_rng(1).integers(0, 2, len(rows)).astype(np.int32)
    words, groups = kmeans_in_groups(rows, group_of, np.array([4, 0, 7]), 1, 5)
    drawn, _ = kmeans_in_groups(rows, group_of, np.array([4, 0, 7]), 0, 5)
    assert groups.tolist() == [0] * 4 + [2] * 7
    for group in (0, 2):
        own = rows[group_of == group]
        assert {row.tobytes() for row in drawn[groups == group]} <= {row.tobytes() for row in own}
        np.testing.assert_allclose(words[groups == group], plain_lloyd(own, drawn[groups == group]), atol=1e-6)


@pytest.mark.parametrize("words_of", [[5, 0], [0, 1], [1, 3]])
def test_a_group_has_from_one_to_as_many_words_as_rows(words_of):
    with pytest.raises(ValueError, match="from one to as many words as rows"):
        kmeans_in_groups(np.ones((6, 2)), np.array([0, 0, 0, 0, 1, 1], np.int32), np.array(words_of), 1, 0)


@pytest.mark.parametrize(
    ("num", "words", "sizes"),
    [
        (2400, 100, [600, 1200]),
        (799, 100, [799, 799]),
        (800, 100, [400]),
        (9000, 30, [120, 240, 480, 960, 1920]),
        (1, 1, [1, 1]),
    ],
)
def test_the_parts_to_begin_with_grow_up_to_half_of_all(num, words, sizes):
    parts = [part[:, 0].tolist() for part in nested_parts(np.arange(num)[:, None], words, 3)]
    assert [len(part) for part in parts] == sizes
    for part, following in itertools.pairwise(parts):
        assert sorted(part) == part
        assert set(part) <= set(following)


def test_the_seed_decides():
    rows = clusters()
    one, same, other = (np.concatenate(list(nested_parts(rows, 90, seed))).tobytes() for seed in (1, 1, 2))
    assert one == same != other


def test_a_start_on_growing_parts_is_better_than_drawn_words_and_nearly_as_good_as_ten_rounds():
    rows = clusters(num=100, noise=1.0)
    start = rows[np.random.default_rng(0).choice(len(rows), 200, replace=False)]
    for part in nested_parts(rows, 200, 0):
        start = lloyd(part, start, 1, ExactAssigner)
    found = inertia(rows, lloyd(rows, start, 2, ExactAssigner))
    assert found < inertia(rows, one_group(rows, 200, 2))
    assert found < 1.05 * inertia(rows, one_group(rows, 200, 10))


def test_unit_rows_have_length_one_each_by_itself():
    rows = clusters()[:50] * np.logspace(-20, 15, 50)[:, None].astype(np.float32)
    rows[7] = 0
    unit = unit_rows(rows)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), np.arange(50) != 7, atol=1e-6)
    assert unit.dtype == np.float32
    assert np.concatenate([unit_rows(row[None]) for row in rows]).tobytes() == unit.tobytes()


@pytest.mark.parametrize("words", [1, 2, 37, 300, 1200])
def test_two_levels_give_as_many_words_as_asked_for(words):
    rows = clusters()
    found = two_level_words(rows, words, 0)
    assert found.shape == (words, 16)
    assert np.isfinite(found).all()
    assert inertia(rows, found) <= inertia(rows, one_group(rows, words))


def test_a_start_on_two_levels_is_as_good_as_flat_kmeans():
    rows = clusters(num=100, noise=1.0)
    start = two_level_words(rows, 200, 0)
    assert inertia(rows, lloyd(rows, start, 5, CellAssigner.of)) < 1.03 * inertia(rows, one_group(rows, 200, 10))


def test_at_most_256_rows_per_word_are_used_and_they_keep_their_order():
    rows = np.arange(2000, dtype=np.float32)[:, None]
    few, same, other = (sampled_rows(rows, 3, seed)[:, 0] for seed in (1, 1, 2))
    assert len(few) == 768
    assert (np.diff(few) > 0).all()
    assert few.tolist() == same.tolist() != other.tolist()
    assert sampled_rows(rows, 100, 0) is rows


def test_bytes_are_summed_as_they_are():
    rows = np.random.default_rng(2).integers(0, 256, (400, 8), np.uint8)
    centroids = one_group(rows, 5)
    sums = assignment_sums(rows, ExactAssigner(centroids), common_exponent(rows))
    np.testing.assert_array_equal(sums.sums.sum(axis=0), rows.sum(axis=0, dtype=np.int64) << sums.exponent)


def test_a_row_far_larger_than_the_sample_is_refused():
    sample = np.ones((4, 2), np.float32)
    with pytest.raises(DataError, match=r"holds 1000, far more than those of the sample"):
        assignment_sums(1000 * sample, ExactAssigner(sample), common_exponent(sample))
