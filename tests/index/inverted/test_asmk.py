import itertools

import numpy as np
import pytest

from cbir.index.inverted.asmk import Asmk, RAsmk
from cbir.index.inverted.smk import Smk
from cbir.types import FeatureBatch, Hits
from tests.index.inverted.features import SEED, assert_same, local_features, with_regions

WORDS = 16


def sigma(u, alpha=3.0, tau=0.0):
    return np.where(u >= tau, np.sign(u) * np.abs(u) ** alpha, 0.0)


def residual_vectors(index, batch: FeatureBatch, image: int, num: int) -> dict[int, np.ndarray]:
    """V_c of one image by its definition."""
    rows = batch.descriptors[batch.rows(image)]
    sums: dict[int, np.ndarray] = {}
    for row, words in zip(rows, index.vocabulary.nearest(rows, num), strict=True):
        for word in words.tolist():
            sums[word] = sums.get(word, 0.0) + (row - index.vocabulary.centroids[word]).astype(np.float64)
    return sums


def pairwise(left: dict, right: dict, weights: np.ndarray, *, binary: bool) -> float:
    """S(X, Y) by its definition, from V_c of both images."""
    total = 0.0
    for word in left.keys() & right.keys():
        u, v = left[word], right[word]
        if binary:
            similarity = 1 - 2 * np.count_nonzero((u > 0) != (v > 0)) / len(u)
        else:
            similarity = u @ v / (np.linalg.norm(u) + 1e-6) / (np.linalg.norm(v) + 1e-6)
        total += weights[word] * float(sigma(similarity))
    norms = [sum(weights[word] for word in side) for side in (left, right)]
    return total / np.sqrt(norms[0] * norms[1]) if norms[0] * norms[1] else 0.0


def scores_by_id(hits: Hits, query: int) -> dict[int, float]:
    held = hits.image_ids[query] >= 0
    return dict(zip(hits.image_ids[query, held].tolist(), hits.scores[query, held].tolist(), strict=True))


@pytest.mark.parametrize(("binary", "idf", "num"), list(itertools.product([True, False], [True, False], [1, 3])))
def test_scores_are_those_of_the_definition(binary, idf, num):
    spec = Asmk(words=WORDS, binary=binary, idf=idf, query_assignments=num)
    index, batch, queries = spec.train(local_features(60, 1), SEED), local_features(30, 2), local_features(6, 3)
    images = [residual_vectors(index, batch, i, 1) for i in range(len(batch))]
    having = np.array([sum(word in image for image in images) for word in range(WORDS)])
    num_images = sum(bool(image) for image in images)
    weights = np.log(num_images / np.maximum(having, 1)) ** 2 if idf else np.ones(WORDS)
    weights[having == 0] = 1.0
    hits = index.build(index.entries(batch)).search(index.queries(queries), len(batch))
    for query in range(len(queries)):
        wanted = residual_vectors(index, queries, query, num)
        found = scores_by_id(hits, query)
        for image, own in zip(batch.image_ids.tolist(), images, strict=True):
            expected = pairwise(wanted, own, weights, binary=binary)
            assert found.get(image, 0.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("method", [Asmk, Smk, RAsmk])
def test_an_image_is_like_itself_by_one(method, binary):
    spec = method(words=WORDS, binary=binary, query_assignments=1)
    index, batch = spec.train(local_features(60, 1), SEED), local_features(30, 2)
    hits = index.build(index.entries(batch)).search(index.queries(batch), 1)
    some = batch.counts > 0
    np.testing.assert_array_equal(hits.image_ids[some, 0], batch.image_ids[some])
    np.testing.assert_allclose(hits.scores[some, 0], 1.0, atol=2e-5)


def test_identity_as_selectivity_is_the_cosine_of_intra_normalised_vlad():
    spec = Asmk(words=WORDS, binary=False, query_assignments=1, alpha=1.0, tau=-1.0)
    index, batch = spec.train(local_features(60, 1), SEED), local_features(20, 2)
    vlads = []
    for i in range(len(batch)):
        vlad = np.zeros((WORDS, batch.descriptors.shape[1]))
        for word, vector in residual_vectors(index, batch, i, 1).items():
            vlad[word] = vector / np.linalg.norm(vector)
        vlads.append(vlad.ravel() / max(np.linalg.norm(vlad), 1e-12))
    hits = index.build(index.entries(batch)).search(index.queries(batch), len(batch))
    for query in range(len(batch)):
        for image, score in scores_by_id(hits, query).items():
            position = batch.image_ids.tolist().index(image)
            assert score == pytest.approx(float(vlads[query] @ vlads[position]), abs=2e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_one_region_of_everything_is_no_region(binary):
    batch = local_features(30, 2)
    everything = with_regions(batch, [[-1, -1, 500, 500]])
    fields = {"words": WORDS, "binary": binary, "query_assignments": 1}
    plain, regional = (spec.train(local_features(60, 1), SEED) for spec in (Asmk(**fields), RAsmk(**fields)))
    queries = plain.queries(batch)
    found = regional.build(regional.entries(everything)).search(queries, 9)
    expected = plain.build(plain.entries(batch)).search(queries, 9)
    if binary:
        assert_same(found, expected)
    np.testing.assert_array_equal(found.image_ids[:, 0], expected.image_ids[:, 0])
    np.testing.assert_allclose(found.scores, expected.scores, atol=3e-5)


def regional_mean(index, batch: FeatureBatch, image: int, *, naive: bool) -> dict[int, np.ndarray]:
    boxes, own = batch.regions.of(image), batch.rows(image)
    x, y = batch.geometry[own, 0] + 0.5, batch.geometry[own, 1] + 0.5  # boxes count from the edge of the first pixel
    mean: dict[int, np.ndarray] = {}
    for left, top, right, bottom in boxes:
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        some = FeatureBatch.of_images(np.array([0]), [batch.descriptors[own][inside]])
        vectors = residual_vectors(index, some, 0, 1)
        length = np.sqrt(sum(float(v @ v) for v in vectors.values()))
        for word, vector in vectors.items():
            scaled = vector / np.linalg.norm(vector) if naive else vector / length
            mean[word] = mean.get(word, 0.0) + scaled / len(boxes)
    return mean


@pytest.mark.parametrize("naive", [True, False])
def test_regions_are_averaged_as_detect_to_retrieve_says(naive):
    batch = with_regions(local_features(25, 2), [[0, 0, 400, 400], [0, 0, 200, 400], [100, 100, 300, 300]])
    spec = RAsmk(words=WORDS, binary=False, naive=naive, normalise=False)
    index, query = spec.train(local_features(60, 1), SEED), local_features(3, 3).take(np.array([1]))
    hits = index.build(index.entries(batch)).search(index.queries(query), len(batch))
    found, wanted = scores_by_id(hits, 0), residual_vectors(index, query, 0, 1)
    for i, image in enumerate(batch.image_ids.tolist()):
        mean, total = regional_mean(index, batch, i, naive=naive), 0.0
        for word in mean.keys() & wanted.keys():
            vector = mean[word] if naive else mean[word] / np.linalg.norm(mean[word])
            asked = wanted[word] if naive else wanted[word] / np.linalg.norm(wanted[word])
            total += float(sigma(vector @ asked))
        assert found.get(image, 0.0) == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_naive_averages_of_a_word_in_one_of_three_regions_are_short():
    batch = with_regions(local_features(25, 2), [[0, 0, 150, 400], [150, 0, 300, 400], [300, 0, 400, 400]])
    index = RAsmk(words=200, binary=False, naive=True).train(local_features(60, 1), SEED)
    codes = index.entries(batch).column("code").to_pylist()
    norms = np.array([np.linalg.norm(np.frombuffer(code, np.float32)) for code in codes])
    assert norms.max() <= 1 + 1e-5
    assert (np.isclose(norms, 1 / 3, atol=1e-4)).mean() > 0.5


def test_adding_images_in_two_shards_is_adding_them_at_once():
    spec = Asmk(words=WORDS, idf=True)
    index, batch = spec.train(local_features(60, 1), SEED), local_features(40, 2)
    halves = [index.entries(batch.take(np.arange(start, start + 20))) for start in (0, 20)]
    totals = {name: sum(index.statistics(half)[name] for half in halves) for name in index.statistics(halves[0])}
    queries = index.queries(batch)
    parts = [index.build(half, totals).search(queries, 10) for half in halves]
    assert_same(Hits.merge(parts, 10), index.build(index.entries(batch)).search(queries, 10))


def test_codes_take_little_more_than_their_bits(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2000 * 50, 128)).astype(np.float32)
    batch = FeatureBatch(np.arange(2000), 50 * np.arange(2001), rows, np.zeros((len(rows), 4), np.float32))
    index = Asmk(words=500, iterations=1).train(batch.take(np.arange(200)), SEED)
    entries = index.entries(batch)
    index.build(entries).save(tmp_path / "part")
    assert (tmp_path / "part").stat().st_size / entries.num_rows < 18.5
