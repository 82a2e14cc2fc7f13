"""Tentative matches against brute force."""

from itertools import pairwise

import numpy as np
import pytest

from cbir.rerank.fsm import Fsm
from cbir.rerank.matches import Matches, MatchingSpec, mutual_matches, ratio_matches
from cbir.types import FeatureBatch
from tests.rerank.scenes import sift_like


def brute_force_ratio(left: np.ndarray, right: np.ndarray, ratio: float) -> dict[int, int]:
    distances = np.sqrt(((left[:, None].astype(float) - right) ** 2).sum(2))
    best: dict[int, int] = {}
    for row in range(len(left)):
        first, second = np.argsort(distances[row])[:2]
        closer = first not in best or distances[row, first] < distances[best[first], first]
        if distances[row, first] < ratio * distances[row, second] and closer:
            best[int(first)] = row
    return {row: column for column, row in best.items()}


@pytest.fixture(scope="module")
def descriptors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    right = rng.normal(size=(80, 16)).astype(np.float32)
    return (right[rng.integers(0, 80, 150)] + 0.6 * rng.normal(size=(150, 16))).astype(np.float32), right


def test_the_ratio_test_equals_brute_force(descriptors):
    left, right = descriptors
    rows, columns, distances = ratio_matches(left, right, 0.9, one_to_one=True)
    expected = brute_force_ratio(left, right, 0.9)
    assert len(expected) > 20
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert (np.diff(distances) >= 0).all()
    np.testing.assert_allclose(distances, np.linalg.norm(left[rows] - right[columns], axis=1), atol=1e-3)
    many, _, _ = ratio_matches(left, right, 0.9, one_to_one=False)
    assert set(rows.tolist()) < set(many.tolist())


def test_mutual_neighbours_equal_brute_force(descriptors):
    left, right = descriptors
    distances = np.linalg.norm(left[:, None] - right, axis=2)
    there, back = distances.argmin(1), distances.argmin(0)
    expected = {row: int(there[row]) for row in range(len(left)) if back[there[row]] == row}
    rows, columns, found = mutual_matches(left, right)
    assert len(expected) > 20
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    np.testing.assert_allclose(found, distances[rows, columns], atol=1e-3)
    columns_first, rows_first, _ = mutual_matches(right, left)
    assert set(zip(rows_first.tolist(), columns_first.tolist(), strict=True)) == set(expected.items())


@pytest.mark.parametrize(("num_left", "num_right"), [(0, 9), (9, 0), (9, 1), (1, 9)])
def test_few_features(num_left, num_right):
    rng = np.random.default_rng(0)
    left, right = sift_like(num_left, rng).astype(np.float32), sift_like(num_right, rng).astype(np.float32)
    rows, columns, _ = ratio_matches(left, right, 1.0, one_to_one=True)
    assert len(rows) == len(columns) == (1 if num_right > 1 and num_left else 0)
    assert len(mutual_matches(left, right)[0]) == min(num_left, num_right)


def test_repeated_descriptors_are_ambiguous():
    """A pattern that stands twice in the database image matches neither, as the ratio test wants it."""
    rows = sift_like(10, np.random.default_rng(0)).astype(np.float32)
    assert len(ratio_matches(rows, np.vstack([rows, rows]), 0.99, one_to_one=True)[0]) == 0


def signatures(counts: list[int], num_bytes: int, seed: int, num_words: int = 6, num_copies: int = 1) -> FeatureBatch:
    """Random words and codes; every feature has `num_copies` rows, one after the other."""
    rng, num = np.random.default_rng(seed), sum(counts)
    geometry = np.repeat(rng.uniform(1, 500, (num, 4)).astype(np.float32), num_copies, axis=0)
    codes = rng.integers(0, 256, (num * num_copies, num_bytes)).astype(np.uint8)
    words = rng.integers(-1, num_words, num * num_copies).astype(np.int32)
    offsets = num_copies * np.concatenate([[0], np.cumsum(counts)])
    return FeatureBatch(np.arange(len(counts)), offsets, codes, geometry, words=words)


def brute_force_words(
    query: FeatureBatch, database: FeatureBatch, rows: range, limit: int
) -> list[tuple[int, int, int]]:
    """Distance, database row and query row of all pairs of a word, in the order in which they are taken."""
    assert query.words is not None
    assert database.words is not None
    pairs = []
    for row in rows:
        for other in range(len(query.words)):
            distance = int(np.bitwise_count(query.descriptors[other] ^ database.descriptors[row]).sum())
            if query.words[other] == database.words[row] >= 0 and distance <= limit:
                pairs.append((distance, row, other))
    return sorted(pairs)


def one_to_one(pairs: list[tuple[int, int, int]], copies: int) -> list[tuple[int, int]]:
    """Pairs of features (query, database) that are both free, in their order."""
    taken_query, taken_database, kept = set(), set(), []
    for _, row, other in pairs:
        mine, its = other // copies, row // copies
        if mine not in taken_query and its not in taken_database:
            taken_query.add(mine)
            taken_database.add(its)
            kept.append((mine, its))
    return kept


def matching(**fields) -> MatchingSpec:
    return Fsm(channel="local", **fields)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("num_bytes", [8, 16, 5])
def test_matches_by_words_equal_brute_force(num_bytes, copies):
    query = signatures([40], num_bytes, 1, num_copies=copies)
    database = signatures([30, 0, 50], num_bytes, 2, num_words=9, num_copies=copies)
    images = np.array([2, 1, 0])
    found = matching(max_hamming=0.45).matcher()(query, database, images)
    for n, image in enumerate(images.tolist()):
        rows = range(*database.offsets[image : image + 2].tolist())
        expected = one_to_one(brute_force_words(query, database, rows, int(0.45 * 8 * num_bytes)), copies)
        part = slice(*found.offsets[n : n + 2].tolist())
        assert list(zip(found.query[part] // copies, found.database[part] // copies, strict=True)) == expected
        assert len(expected) > 3 or image == 1


@pytest.mark.parametrize("way", ["ratio", "mutual", "word"])
def test_a_feature_is_used_once_on_either_side(way):
    """The law of the one-to-one filter, on a picture of one repeated pattern."""
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 200, (3, 16))
    query, database = signatures([60], 16, 3, num_words=2), signatures([50, 70], 16, 4, num_words=2)
    query, database = (
        batch.with_descriptors(
            (pattern[rng.integers(0, 3, len(batch.descriptors))] + rng.integers(0, 9, batch.descriptors.shape)).astype(
                np.uint8
            )
        )
        for batch in (query, database)
    )
    found = matching(matches=way, ratio=1.0, max_hamming=0.5).matcher()(query, database, np.array([0, 1]))
    free = matching(matches=way, ratio=1.0, max_hamming=0.5, one_to_one=False).matcher()(
        query, database, np.array([0, 1])
    )
    assert len(free.query) >= len(found.query) > 20
    for start, end in pairwise(found.offsets.tolist()):
        for side in (found.query[start:end], found.database[start:end]):
            assert len(np.unique(side)) == len(side)


@pytest.mark.parametrize("way", ["ratio", "mutual", "word"])
def test_matches_of_an_image_depend_on_no_other(way):
    query, database = signatures([40], 8, 1), signatures([30, 0, 50, 45], 8, 2)
    matcher = matching(matches=way, ratio=0.95, max_hamming=0.5).matcher()
    together = matcher(query, database, np.array([3, 0, 1, 2, 0]))
    for n, rows in enumerate(together.per_image()):
        image = int(together.images[n])
        alone = matcher(query, database.take(np.array([image])), np.zeros(1, np.int64))
        np.testing.assert_array_equal(alone.query, together.query[rows])
        np.testing.assert_array_equal(alone.database + database.offsets[image], together.database[rows])


def test_the_nearest_matches_are_kept():
    query, database = signatures([90], 8, 1, num_words=2), signatures([80, 80], 8, 2, num_words=2)
    few = matching(max_hamming=1, max_matches=7).matcher()(query, database, np.arange(2))
    many = matching(max_hamming=1).matcher()(query, database, np.arange(2))
    assert np.diff(few.offsets).tolist() == [7, 7]
    for start, other in zip(few.offsets[:-1], many.offsets[:-1], strict=True):
        np.testing.assert_array_equal(few.query[start : start + 7], many.query[other : other + 7])
    assert len(matching(max_matches=1).matcher()(query, database, np.empty(0, np.int64))) == 0


def test_words_without_codes_match_by_the_word_alone():
    query, database = signatures([20], 0, 1), signatures([20], 0, 2)
    found = matching(one_to_one=False).matcher()(query, database, np.zeros(1, np.int64))
    assert len(found.query) == len(brute_force_words(query, database, range(20), 0))


def test_codes_and_words_must_fit():
    query, database = signatures([20], 8, 1), signatures([20], 16, 2)
    with pytest.raises(ValueError, match="codes of 8 and of 16 bytes cannot be compared"):
        matching().matcher()(query, database, np.zeros(1, np.int64))
    wordless = FeatureBatch(query.image_ids, query.offsets, query.descriptors, query.geometry)
    with pytest.raises(ValueError, match="need features with visual words"):
        matching().matcher()(wordless, query, np.zeros(1, np.int64))


def test_many_pairs_of_one_word_fit():
    """More pairs than the scratch space begins with."""
    query, database = signatures([300], 8, 1, num_words=1), signatures([300], 8, 2, num_words=1)
    found: Matches = matching(max_hamming=1, one_to_one=False, max_matches=10**6).matcher()(
        query, database, np.arange(1)
    )
    assert query.words is not None
    assert database.words is not None
    assert len(found.query) == int((query.words >= 0).sum() * (database.words >= 0).sum())
