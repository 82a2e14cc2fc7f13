import numpy as np
import pytest
from pydantic import ValidationError

from cbir.errors import DataError
from cbir.index.inverted.bow import Bow
from cbir.index.inverted.hamming_embedding import HammingEmbedding
from cbir.types import FeatureBatch
from tests.index.inverted.features import DIM, SEED, assert_same, local_features

WORDS = 16


@pytest.fixture(scope="module")
def index():
    return HammingEmbedding(words=WORDS, bits=16, threshold=6, sigma=4.0).train(local_features(200, 1), SEED)


def bits(index, batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray]:
    state = index.state()
    words = index.vocabulary.nearest(batch.descriptors, 1)[:, 0]
    projected = batch.descriptors.astype(float) @ state["own.projection"].T.astype(float)
    return words, projected > state["own.medians"][words]


def test_projections_are_orthonormal(index):
    projection = index.state()["own.projection"]
    assert projection.shape == (16, DIM)
    np.testing.assert_allclose(projection @ projection.T, np.eye(16), atol=1e-6)


def test_bits_of_a_word_are_balanced_on_the_sample(index):
    words, found = bits(index, local_features(200, 1))
    for word in np.flatnonzero(np.bincount(words, minlength=WORDS) > 40):
        np.testing.assert_allclose(found[words == word].mean(0), 0.5, atol=0.02)


def test_matches_are_weighted_by_their_hamming_distance(index):
    batch, queries = local_features(20, 2), local_features(5, 3)
    (words, codes), (asked_words, asked) = bits(index, batch), bits(index, queries)

    def similarity(own: slice, other: slice, left, right) -> float:
        total = 0.0
        for n in range(own.start, own.stop):
            for m in range(other.start, other.stop):
                if left[0][n] == right[0][m]:
                    distance = np.count_nonzero(left[1][n] != right[1][m])
                    total += weights[left[0][n]] * (np.exp(-(distance**2) / 32) if distance <= 6 else 0.0)
        return total

    having = np.array([len({i for i in range(20) if (words[batch.rows(i)] == w).any()}) for w in range(WORDS)])
    num_images = np.count_nonzero(batch.counts)
    weights = np.where(having > 0, np.log(num_images / np.maximum(having, 1)) ** 2, 1.0)
    database, mine = (words, codes), (asked_words, asked)
    hits = index.build(index.entries(batch)).search(index.queries(queries), 20)
    for query, column in np.argwhere(hits.image_ids >= 0).tolist():
        image = batch.image_ids.tolist().index(hits.image_ids[query, column])
        one, two = queries.rows(query), batch.rows(image)
        norms = similarity(one, one, mine, mine) * similarity(two, two, database, database)
        assert hits.scores[query, column] == pytest.approx(
            similarity(one, two, mine, database) / np.sqrt(norms), rel=1e-5
        )


def test_no_threshold_and_no_weighting_is_a_bag_of_words():
    sample, batch, queries = local_features(60, 1), local_features(30, 2), local_features(9, 3)
    open_wide = HammingEmbedding(words=WORDS, bits=16, threshold=16, sigma=0.0).train(sample, SEED)
    plain = Bow(words=WORDS).train(sample, SEED)
    found = [each.build(each.entries(batch)).search(each.queries(queries), 30) for each in (open_wide, plain)]
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-6)


def test_burstiness_changes_nothing_without_repetitions_and_damps_them():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, DIM)).astype(np.float32)
    once = FeatureBatch.of_images(np.arange(2), [rows, rows[:2]])
    specs = [HammingEmbedding(words=4, bits=16, idf=False, burst=burst) for burst in ("none", "intra")]
    plain, damped = (spec.train(once.take(np.array([0])), SEED) for spec in specs)  # a word for each row
    found = [each.build(each.entries(once)).search(each.queries(once), 2) for each in (plain, damped)]
    assert_same(*found)
    often = FeatureBatch.of_images(np.arange(2), [np.repeat(rows[:1], 9, axis=0), rows])
    query = often.take(np.array([1]))
    by_burst = [each.build(each.entries(often)).search(each.queries(query), 2).scores for each in (plain, damped)]
    own = [row[0, 1] / row[0, 0] for row in by_burst]
    assert own[0] > 0
    masses = [each.build(each.entries(often)) for each in (plain, damped)]
    assert masses[1]._masses[0] == pytest.approx(masses[0]._masses[0] / 3)


def similarities(index, batch: FeatureBatch, queries: FeatureBatch) -> np.ndarray:
    """Of each query row with each image, without weights of words, a match for a match: (K, N)."""
    (words, codes), (asked_words, asked) = bits(index, batch), bits(index, queries)
    distances = np.count_nonzero(asked[:, None] != codes[None], axis=2)
    worth = np.where((asked_words[:, None] == words) & (distances <= 6), np.exp(-(distances**2) / 32), 0.0)
    return np.stack([worth[:, batch.rows(i)].sum(1) for i in range(len(batch))], axis=1)


def test_inter_image_burstiness_divides_by_what_a_feature_matches_in_all_images():
    sample, batch, queries = local_features(200, 1), local_features(20, 2), local_features(5, 3)
    settings = {"words": WORDS, "bits": 16, "threshold": 6, "sigma": 4.0, "idf": False}
    plain, damped = (HammingEmbedding(**settings, burst=burst).train(sample, SEED) for burst in ("none", "inter"))
    partition, asked = damped.build(damped.entries(batch)), damped.queries(queries)
    found = partition.search(damped.damped(asked, partition.matches(asked)), 20)
    once = plain.build(plain.entries(batch)).search(asked, 20)

    def row(hits, query: int) -> np.ndarray:
        by_id = dict(zip(hits.image_ids[query].tolist(), hits.scores[query].tolist(), strict=True))
        return np.array([by_id.get(i, 0.0) for i in batch.image_ids.tolist()])

    worth = similarities(damped, batch, queries)
    totals = worth.sum(1, keepdims=True)
    expected = np.divide(worth, np.sqrt(totals), out=np.zeros_like(worth), where=totals > 0)
    for query in range(len(queries)):
        rows, own = queries.rows(query), row(once, query)
        sums = worth[rows].sum(0)
        # gamma of both images is that of the plain scores
        gammas = np.divide(own, sums, out=np.zeros_like(own), where=sums > 0)
        np.testing.assert_allclose(row(found, query), expected[rows].sum(0) * gammas, rtol=1e-4, atol=1e-7)
    assert (totals > 2).any()


@pytest.mark.parametrize("burst", ["inter", "both"])
def test_what_features_match_adds_up_over_partitions_without_the_deleted_images(burst):
    index = HammingEmbedding(words=WORDS, bits=16, burst=burst).train(local_features(200, 1), SEED)
    batch, asked = local_features(30, 2), index.queries(local_features(5, 3))
    whole = index.build(index.entries(batch))
    halves = [index.build(index.entries(batch.take(np.arange(half, 30, 2)))) for half in (0, 1)]
    counts = whole.matches(asked)
    assert counts.any()
    np.testing.assert_array_equal(sum(half.matches(asked) for half in halves), counts)
    whole.delete(batch.image_ids[::2])
    np.testing.assert_array_equal(whole.matches(asked), halves[1].matches(asked))


def test_features_that_match_once_are_not_damped():
    rows = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    batch = FeatureBatch.of_images(np.arange(2), [rows[:2], rows[2:]])
    index = HammingEmbedding(words=4, bits=16, burst="inter").train(batch, SEED)  # a word for each row
    partition, asked = index.build(index.entries(batch)), index.queries(batch)
    assert_same(partition.search(index.damped(asked, partition.matches(asked)), 2), partition.search(asked, 2))


def test_more_bits_than_dimensions_are_refused():
    with pytest.raises(DataError, match="bits: 64"):
        HammingEmbedding(words=4).train(local_features(60, 1), SEED)
    with pytest.raises(ValidationError, match="assignments"):
        HammingEmbedding(words=4, query_assignments=5)
