"""Product quantisation against its formula, plain faiss, and real SIFT vectors."""

import subprocess
import sys
from typing import Any

import faiss
import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import spearmanr

from cbir.errors import ArtifactError, DataError
from cbir.index.dense import exact_search, merge_partitions, write_index
from cbir.index.flat import Flat
from cbir.index.pq import Pq, PqIndex
from cbir.types import FeatureBatch, Floats, Hits
from tests.index.vectors import scores_by_image, words_of

DIM = 32


def clustered(num: int, seed: int) -> FeatureBatch:
    centres = np.random.default_rng(5).normal(size=(12, DIM))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 12, num)] + 0.6 * rng.normal(size=(num, DIM))
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64) * 7 + 10**15, rows.astype(np.float32))


def small(**fields: Any) -> Pq:
    return Pq(**{"bytes": 8, "bits": 5, "iterations": 5, **fields})


def decoded(index: PqIndex, batch: FeatureBatch, bits: int) -> Floats:
    words = words_of(index.entries(batch), 8, bits)
    return np.concatenate([book[words[:, part]] for part, book in enumerate(index.state()["codebooks"])], axis=1)


def all_scores(partition: Any, queries: FeatureBatch) -> np.ndarray:
    """(Q, n) in the order of the images' ids."""
    return scores_by_image(partition.search(queries, partition.faiss.ntotal))


def similarity(metric: str, left: Floats, right: Floats) -> np.ndarray:
    x, y = left.astype(np.float64), right.astype(np.float64)
    return x @ y.T if metric == "ip" else -((x[:, None] - y) ** 2).sum(2)


@pytest.fixture(scope="module", params=["ip", "l2"])
def metric(request):
    return request.param


@pytest.fixture(scope="module", params=[4, 5, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def index(metric, bits):
    return small(metric=metric, bits=bits).train(clustered(1200, 1), 3)


@pytest.fixture(scope="module")
def batch():
    return clustered(500, 2)


@pytest.fixture(scope="module")
def queries():
    return clustered(20, 3)


def test_adc_is_the_distance_of_the_query_to_the_decoded_vector(index, metric, bits, batch, queries):
    scores = all_scores(index.build(index.entries(batch)), queries)
    expected = similarity(metric, queries.descriptors, decoded(index, batch, bits))
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


def test_adc_is_a_sum_of_table_entries(index, metric, bits, batch, queries):
    """Jégou et al. 2011, equation 13: one table entry per part."""
    books, words = index.state()["codebooks"], words_of(index.entries(batch), 8, bits)
    parts = queries.descriptors.reshape(len(queries), len(books), -1)
    tables = np.stack([similarity(metric, parts[:, part], book) for part, book in enumerate(books)], axis=1)
    sums = tables[:, np.arange(len(books)), words.astype(np.int64)].sum(2)
    np.testing.assert_allclose(all_scores(index.build(index.entries(batch)), queries), sums, rtol=1e-6, atol=1e-6)


def test_sdc_is_symmetric_and_the_adc_of_the_coded_query(index, metric, bits, batch):
    adc = index.build(index.entries(batch))
    symmetric = small(metric=metric, bits=bits, distance="sdc").restore(index.state())
    sdc = symmetric.build(symmetric.entries(batch))
    found = all_scores(sdc, batch)
    np.testing.assert_array_equal(found, found.T)
    coded = batch.with_descriptors(decoded(index, batch, bits))
    np.testing.assert_array_equal(found, all_scores(adc, coded))
    assert not np.array_equal(found, all_scores(adc, batch))
    if metric == "l2":
        assert (np.diag(found) == 0).all(), "a vector has its own code"


def test_squared_adc_falls_short_by_the_error_of_the_quantiser():
    """Jégou et al. 2011, section III.D: as centroids are the means of cells, E[d(x, y)^2] = E[d(x, q(y))^2] + MSE."""
    sample, queries = clustered(1500, 1), clustered(100, 4)
    index = small(metric="l2", iterations=40).train(sample, 3)
    coded = -all_scores(index.build(index.entries(sample)), queries)
    true = -similarity("l2", queries.descriptors, sample.descriptors)
    error = ((sample.descriptors - decoded(index, sample, 5)) ** 2).sum(1).mean()
    assert (coded + error).mean() == pytest.approx(true.mean(), rel=0.002)
    assert coded.mean() < 0.95 * true.mean()


def test_codes_are_those_of_faiss(index, batch):
    quantiser = index._empty._pq.pq
    codes = quantiser.compute_codes(batch.descriptors)
    assert b"".join(index.entries(batch)["code"].to_pylist()) == codes.tobytes()


def test_the_ranking_is_that_of_plain_faiss(index, metric, batch, queries, tmp_path):
    partition = index.build(index.entries(batch))
    partition.save(tmp_path / "part.faiss")
    queries.descriptors.tofile(tmp_path / "queries")
    code = (
        "import faiss, numpy, sys; index = faiss.read_index(sys.argv[1]); "
        "x = numpy.fromfile(sys.argv[2], numpy.float32).reshape(-1, 32); print(index.search(x, 1)[0].ravel().tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part.faiss"), str(tmp_path / "queries")]
    found = np.array(eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    best = partition.search(queries, 1).scores.ravel()
    np.testing.assert_allclose(found if metric == "ip" else -found, best, rtol=1e-4, atol=1e-4)


def test_ties_and_partitions_never_show(index, queries):
    """16 different vectors 40 times each: whole groups of equal codes lie at the end of a ranking."""
    repeated = clustered(16, 6).take(np.tile(np.arange(16), 40))
    ids = np.random.default_rng(0).permutation(640).astype(np.int64)
    database = FeatureBatch.of_global(ids, repeated.descriptors)
    whole = index.build(index.entries(database)).search(queries, 50)
    assert_ties_by_id(whole)
    parts = [database.take(np.arange(number, 640, 7)) for number in range(7)]
    merged = Hits.merge([index.build(index.entries(part)).search(queries, 50) for part in parts], 50)
    np.testing.assert_array_equal(merged.image_ids, whole.image_ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)


def assert_ties_by_id(hits: Hits) -> None:
    same = np.diff(hits.scores, axis=1) == 0
    assert same.any()
    assert (np.diff(hits.image_ids, axis=1)[same] > 0).all()


def test_partitions_merge_to_the_whole_to_the_byte(index, metric, bits, batch, tmp_path):
    index.build(index.entries(batch)).save(tmp_path / "whole")
    for number in range(3):
        index.build(index.entries(batch.take(np.arange(number, 500, 3)))).save(tmp_path / f"{number}")
    parts = [small(metric=metric, bits=bits).load(tmp_path / f"{number}") for number in range(3)]
    write_index(merge_partitions(parts), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_seed_gives_other_codebooks():
    sample = clustered(300, 1)
    assert not np.array_equal(*(small().train(sample, seed).state()["codebooks"] for seed in (1, 2)))


@pytest.mark.parametrize(
    ("fields", "num", "message"),
    [
        ({"bits": 8}, 255, r"bits: 8 bits.*at least 256.*found 255.*flat"),
        ({"bytes": 12}, 300, r"bytes: 12 .* D = 32; set a divisor of D, for example bytes: 8"),
        ({"bytes": 64}, 300, r"bytes: 64 .* D = 32; set a divisor of D, for example bytes: 32"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_with_a_remedy(fields, num, message):
    with pytest.raises(DataError, match=message):
        small(**fields).train(clustered(num, 0), 0)


def test_refuses_an_unknown_distance_and_the_file_of_another_index(tmp_path):
    with pytest.raises(ValidationError, match="distance"):
        small(distance="hamming")
    batch = clustered(3, 0)
    Flat().train(batch, 0).build(Flat().train(batch, 0).entries(batch)).save(tmp_path / "flat.faiss")
    with pytest.raises(ArtifactError, match=r"flat\.faiss.*expected an IndexIDMap over IndexPQ"):
        Pq().load(tmp_path / "flat.faiss")


def test_adc_finds_more_real_sift_neighbours_than_sdc(test_data):
    base, query = (
        np.fromfile(test_data / "bigann10k" / f"{name}.bvecs", np.uint8).reshape(-1, 132)[:, 4:]
        for name in ("base", "query")
    )
    database, queries = (FeatureBatch.of_global(np.arange(len(rows)), rows) for rows in (base, query))
    index = Pq(metric="l2", iterations=5).train(database, 1)
    exact, found = exact_search(queries, database, "l2", 10), {}
    for distance in ("adc", "sdc"):
        partition = Pq(metric="l2", distance=distance).restore(index.state()).build(index.entries(database))
        hits = partition.search(queries, 10)
        found[distance] = np.mean([np.isin(*pair).mean() for pair in zip(hits.image_ids, exact.image_ids, strict=True)])
    assert found["adc"] > found["sdc"] + 0.02
    assert found["adc"] > 0.5
    assert isinstance(faiss.downcast_index(index.build(index.entries(database)).faiss.index), faiss.IndexPQ)


POLYSEMOUS: dict[str, Any] = {"bytes": 2, "bits": 8, "metric": "l2"}


@pytest.fixture(scope="module")
def ordered():
    return small(**POLYSEMOUS, polysemous=5).train(clustered(1200, 1), 3)


@pytest.fixture(scope="module")
def unordered():
    return small(**POLYSEMOUS).train(clustered(1200, 1), 3)


def rank_correlation(book: Floats) -> float:
    """Of the Hamming distances of the numbers of centroids (256, d) and the distances of these."""
    numbers = np.arange(256)
    hamming = np.bitwise_count(numbers[:, None] ^ numbers)
    return float(spearmanr(hamming.ravel(), -similarity("l2", book, book).ravel()).statistic)


def test_the_order_of_centroids_changes_no_distance(ordered, unordered, batch, queries):
    """Douze et al. 2016: a polysemous code is a product code first."""
    for books in zip(ordered.state()["codebooks"], unordered.state()["codebooks"], strict=True):
        assert not np.array_equal(*books)
        np.testing.assert_array_equal(*(book[np.lexsort(book.T)] for book in books))
    adc = small(**POLYSEMOUS).restore(ordered.state())
    expected = all_scores(unordered.build(unordered.entries(batch)), queries)
    np.testing.assert_array_equal(all_scores(adc.build(adc.entries(batch)), queries), expected)
    every = small(**POLYSEMOUS, polysemous=17).restore(ordered.state())
    np.testing.assert_array_equal(all_scores(every.build(every.entries(batch)), queries), expected)


def test_by_the_order_hamming_distances_imitate_distances(ordered, unordered):
    for before, after in zip(unordered.state()["codebooks"], ordered.state()["codebooks"], strict=True):
        assert rank_correlation(after) > rank_correlation(before) + 0.2


def test_codes_beyond_the_hamming_radius_are_passed_over(ordered, batch, queries):
    entries, partition = ordered.entries(batch), ordered.build(ordered.entries(batch))
    packed = [
        np.frombuffer(b"".join(each["code"].to_pylist()), np.uint8).reshape(-1, 2)
        for each in (ordered.entries(queries), entries)
    ]
    near = np.bitwise_count(packed[0][:, None] ^ packed[1]).sum(2) < 5
    assert 0.05 < near.mean() < 0.7
    adc = small(**POLYSEMOUS).restore(ordered.state())
    scores = all_scores(adc.build(adc.entries(batch)), queries)
    for depth in (10, 500):
        hits = partition.search(queries, depth)
        for row, (ids, found) in enumerate(zip(hits.image_ids, hits.scores, strict=True)):
            expected = Hits.ranked(batch.image_ids[near[row]][None], scores[row, near[row]][None], depth)
            np.testing.assert_array_equal(ids, expected.image_ids[0])
            np.testing.assert_array_equal(found, expected.scores[0])


def test_polysemous_partitions_and_queries_do_not_depend_on_each_other(ordered, batch, queries, tmp_path):
    whole = ordered.build(ordered.entries(batch))
    together = whole.search(queries, 20)
    parts = [ordered.build(ordered.entries(batch.take(np.arange(number, 500, 7)))) for number in range(7)]
    merged = Hits.merge([part.search(queries, 20) for part in parts], 20)
    whole.save(tmp_path / "part")
    loaded = small(**POLYSEMOUS, polysemous=5).load(tmp_path / "part")
    for hits in (merged, loaded.search(queries, 20)):
        np.testing.assert_array_equal(hits.image_ids, together.image_ids)
        np.testing.assert_array_equal(hits.scores, together.scores)
    for number in range(20):
        alone = whole.search(queries.take(np.array([number])), 20)
        np.testing.assert_array_equal(alone.image_ids[0], together.image_ids[number])


def test_the_order_of_centroids_follows_the_sample_and_the_seed():
    spec = small(**{**POLYSEMOUS, "bytes": 1}, polysemous=3)
    books = [spec.train(clustered(300, 1), 4).state()["codebooks"] for _ in range(2)]
    np.testing.assert_array_equal(*books)


@pytest.mark.parametrize("field", [{"bits": 5}, {"metric": "ip"}, {"distance": "sdc"}])
def test_polysemous_search_is_for_whole_bytes_and_distances(field):
    with pytest.raises(ValidationError, match=rf"polysemous needs {next(iter(field))}: "):
        small(**{**POLYSEMOUS, **field}, polysemous=5)
