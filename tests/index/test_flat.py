"""The exact index against brute force, its plain file, and real SIFT vectors."""

import subprocess
import sys

import faiss
import numpy as np
import pyarrow as pa
import pytest

from cbir.errors import ArtifactError, ConfigError, DataError
from cbir.index.dense import exact_search, merge_partitions, write_index
from cbir.index.flat import Flat
from cbir.index.ivfpq import IvfPq
from cbir.types import FeatureBatch, Hits


def vectors(num: int, dim: int, seed: int) -> FeatureBatch:
    rows = np.random.default_rng(seed).normal(size=(num, dim)).astype(np.float32)
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64) * 5 + 2, rows)


def build(spec: Flat, batch: FeatureBatch):
    index = spec.train(batch, 0)
    return index.build(index.entries(batch))


def brute_force(metric: str, queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    left, right = queries.astype(np.float64), database.astype(np.float64)
    return left @ right.T if metric == "ip" else -((left[:, None] - right) ** 2).sum(2)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_equals_brute_force(metric):
    batch, queries = vectors(500, 24, 0), vectors(40, 24, 1)
    hits = build(Flat(metric=metric), batch).search(queries, 500)
    scores = brute_force(metric, queries.descriptors, batch.descriptors)
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(hits.image_ids, batch.image_ids[order])
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, order, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_equal_scores_are_ranked_by_id_wherever_they_lie(metric):
    """Many copies of one picture around the end of the ranking: the smallest ids must win in every partitioning."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 96)).astype(np.float32) * 0.1
    copies = np.sort(rng.choice(3000, 200, replace=False))
    rows[copies] = rng.normal(size=96)
    ids = rng.permutation(3000).astype(np.int64)
    database, query = FeatureBatch.of_global(ids, rows), FeatureBatch.of_global(np.array([9]), rows[copies[:1]])
    whole = build(Flat(metric=metric), database).search(query, 50)
    np.testing.assert_array_equal(whole.image_ids[0], np.sort(ids[copies])[:50])
    assert len(set(whole.scores[0].tolist())) == 1
    parts = [
        build(Flat(metric=metric), database.take(np.arange(start, 3000, 7))).search(query, 50) for start in range(7)
    ]
    np.testing.assert_array_equal(Hits.merge(parts, 50).image_ids, whole.image_ids)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_what_float32_cannot_tell_apart_is_ranked_in_double_precision(metric):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=96)
    rows = (centre + 1e-6 * rng.normal(size=(500, 96))).astype(np.float32)
    queries = rng.normal(size=(1500, 96)).astype(np.float32)
    queries[:40] = (centre * np.linspace(0.5, 2, 40)[:, None] + 0.01 * rng.normal(size=(40, 96))).astype(np.float32)
    ids = rng.permutation(500).astype(np.int64)
    found = build(Flat(metric=metric), FeatureBatch.of_global(ids, rows)).search(
        FeatureBatch.of_global(np.arange(1500), queries), 20
    )
    scores = brute_force(metric, queries[:40], rows).astype(np.float32)
    expected = Hits.ranked(np.broadcast_to(ids, scores.shape), scores, 20)
    np.testing.assert_allclose(found.scores[:40], expected.scores, rtol=1e-7)
    assert (found.image_ids[:40] == expected.image_ids).mean() > 0.999


def test_the_best_vector_of_an_image_counts():
    rows = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]], np.float32)
    regional = FeatureBatch(np.array([7, 8, 9]), np.array([0, 2, 2, 4]), rows)
    hits = build(Flat(), regional).search(FeatureBatch.of_global(np.array([1]), rows[2:3]), 3)
    assert hits.image_ids.tolist() == [[9, 7, -1]]
    np.testing.assert_allclose(hits.scores[0, :2], [1, 0.8])
    both = build(Flat(), regional).search(FeatureBatch(np.array([1]), np.array([0, 2]), rows[[0, 2]]), 3)
    np.testing.assert_allclose(both.scores[0, :2], [1, 1])
    assert both.image_ids.tolist() == [[7, 9, -1]]


def test_entries_are_the_plain_float32_values():
    batch = vectors(3, 4, 0)
    table = Flat().train(batch, 0).entries(batch)
    assert table.schema.field("code").type == pa.binary(16)
    assert table.schema.metadata[b"dim"] == b"4"
    np.testing.assert_array_equal(np.frombuffer(table["code"][1].as_py(), "<f4"), batch.descriptors[1])
    sliced = Flat().train(batch, 0).build(table.slice(1, 2))
    np.testing.assert_array_equal(np.sort(sliced.search(batch, 2).image_ids[0]), batch.image_ids[1:])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_file_opens_without_cbir(metric, tmp_path):
    batch, queries = vectors(300, 16, 0), vectors(5, 16, 1)
    partition = build(Flat(metric=metric), batch)
    partition.save(tmp_path / "part.faiss")
    code = (
        "import faiss, numpy, sys; index = faiss.read_index(sys.argv[1]); "
        "x = numpy.fromfile(sys.argv[2], numpy.float32).reshape(-1, 16); print(index.search(x, 7)[1].tolist())"
    )
    queries.descriptors.tofile(tmp_path / "queries")
    command = [sys.executable, "-c", code, str(tmp_path / "part.faiss"), str(tmp_path / "queries")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(partition.search(queries, 7).image_ids.tolist())


def test_merged_partitions_are_the_whole_to_the_byte(tmp_path):
    batch = vectors(100, 8, 0)
    build(Flat(), batch).save(tmp_path / "whole")
    for number in range(3):
        build(Flat(), batch.take(np.arange(number, 100, 3))).save(tmp_path / f"{number}")
    merged = merge_partitions([Flat().load(tmp_path / f"{number}") for number in range(3)])
    assert isinstance(merged, faiss.IndexIDMap)
    write_index(merged, tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ConfigError, match="faiss"):
        merge_partitions([])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_exact_search_of_shards_is_the_flat_index(metric):
    batch, queries = vectors(200, 12, 0), vectors(20, 12, 1)
    whole = build(Flat(metric=metric), batch).search(queries, 10)
    shards = [exact_search(queries, batch.take(np.arange(n, 200, 4)), metric, 10) for n in range(4)]
    merged = Hits.merge(shards, 10)
    np.testing.assert_array_equal(merged.image_ids, whole.image_ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)


def test_a_mapped_partition_stays_on_the_disk(tmp_path):
    """Anonymous memory after opening 25 MB: nothing but the ids may have been read."""
    build(Flat(), vectors(50_000, 128, 0)).save(tmp_path / "part.faiss")
    code = (
        "import sys, pathlib; from cbir.index.flat import Flat\n"
        "def anonymous():\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
        "before = anonymous(); part = Flat().load(pathlib.Path(sys.argv[1])); print(anonymous() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part.faiss")]
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 5_000


def test_refuses_the_file_of_another_index_and_a_full_disk(tmp_path):
    batch = vectors(300, 16, 0)
    index = IvfPq(bits=4, lists=2).train(batch, 0)
    index.build(index.entries(batch)).save(tmp_path / "ivf.faiss")
    with pytest.raises(ArtifactError, match=r"ivf\.faiss.*IndexIVFPQ"):
        Flat().load(tmp_path / "ivf.faiss")
    with pytest.raises(ArtifactError, match="No space left"):
        build(Flat(), vectors(3, 4, 0)).save(type(tmp_path)("/dev/full"))


def test_refuses_entries_of_another_size_and_a_sample_without_dimensions():
    index = Flat().train(vectors(3, 4, 0), 0)
    with pytest.raises(DataError, match="16 bytes"):
        index.build(Flat().train(vectors(3, 5, 0), 0).entries(vectors(3, 5, 0)))
    with pytest.raises(DataError, match="D > 0"):
        Flat().train(FeatureBatch.of_global(np.empty(0, np.int64), np.empty((0, 0), np.float32)), 0)


def test_finds_the_published_neighbours_of_real_sift_vectors(test_data):
    folder = test_data / "bigann10k"
    base = np.fromfile(folder / "base.bvecs", np.uint8).reshape(-1, 132)[:, 4:]
    query = np.fromfile(folder / "query.bvecs", np.uint8).reshape(-1, 132)[:, 4:]
    truth = np.fromfile(folder / "groundtruth.ivecs", np.int32).reshape(len(query), -1)[:, 1:]
    partition = build(Flat(metric="l2"), FeatureBatch.of_global(np.arange(len(base)), base))
    hits = partition.search(FeatureBatch.of_global(np.arange(len(query)), query), 100)
    published = -np.load(folder / "groundtruth_dist.npy").astype(np.float32)
    np.testing.assert_array_equal(hits.scores, published[:, :100])
    assert (hits.image_ids == truth[:, :100]).mean() > 0.99, "only equal distances may be ordered otherwise"
