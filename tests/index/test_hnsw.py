"""Navigable small-world graphs against the exact index."""

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from cbir.errors import ArtifactError, DataError
from cbir.index.dense import exact_search, merge_partitions, write_index
from cbir.index.flat import Flat
from cbir.index.hnsw import Hnsw
from cbir.types import FeatureBatch, Hits

NUM = 3000


def vectors(num: int, seed: int, dim: int = 16) -> FeatureBatch:
    rows = np.random.default_rng(seed).normal(size=(num, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64) * 5 + 2, rows.astype(np.float32))


def build(spec: Hnsw, batch: FeatureBatch):
    index = spec.train(batch, 0)
    return index.build(index.entries(batch))


def searching(spec: Hnsw, partition, ef_search: int, path):
    partition.save(path)
    return spec.model_copy(update={"ef_search": ef_search}).load(path)


def recall(found: Hits, exact: Hits) -> float:
    pairs = zip(found.image_ids, exact.image_ids, strict=True)
    return float(np.mean([np.isin(some, best).mean() for some, best in pairs]))


@pytest.fixture(scope="module", params=["ip", "l2"])
def spec(request):
    return Hnsw(neighbours=8, ef_construction=40, ef_search=16, metric=request.param)


@pytest.fixture(scope="module")
def batch():
    return vectors(NUM, 0)


@pytest.fixture(scope="module")
def partition(spec, batch):
    return build(spec, batch)


@pytest.fixture(scope="module")
def queries():
    return vectors(100, 1)


@pytest.fixture(scope="module")
def exact(spec, batch, queries):
    return exact_search(queries, batch, spec.metric, 10)


def test_recall_rises_to_exact_as_a_search_keeps_more(spec, partition, queries, exact, tmp_path):
    recalls = []
    for ef_search in (16, 64, NUM - 1):
        wide = searching(spec, partition, ef_search, tmp_path / "part")
        recalls.append(recall(wide.search(queries, 10), exact))
    assert recalls == sorted(recalls)
    assert 0.5 < recalls[0] < 0.999
    assert recalls[2] == 1.0, "the graph reaches every vector"
    whole = searching(spec, partition, NUM, tmp_path / "part").search(queries, 10)
    np.testing.assert_array_equal(whole.image_ids, exact.image_ids)
    np.testing.assert_array_equal(whole.scores, exact.scores)


def test_scores_are_exact(partition, queries, exact):
    found = partition.search(queries, 10)
    same = found.image_ids == exact.image_ids
    assert same.mean() > 0.3
    np.testing.assert_array_equal(found.scores[same], exact.scores[same])


def test_the_graph_depends_on_nothing_but_the_entries(spec, batch, partition, tmp_path):
    partition.save(tmp_path / "one")
    index = spec.train(batch, 0)
    shards = [index.entries(batch.take(np.arange(start, NUM, 4)[::-1])) for start in (2, 0, 3, 1)]
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(4)
    try:
        index.build(pa.concat_tables(shards)).save(tmp_path / "two")
        assert faiss.omp_get_max_threads() == 4, "only the build is on one thread"
    finally:
        faiss.omp_set_num_threads(threads)
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_merged_partitions_are_the_graph_of_the_whole(spec, batch, partition, tmp_path):
    for number in range(3):
        build(spec, batch.take(np.arange(number, NUM, 3))).save(tmp_path / f"{number}")
    write_index(merge_partitions([spec.load(tmp_path / f"{number}") for number in range(3)]), tmp_path / "merged")
    partition.save(tmp_path / "whole")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_file_is_a_plain_faiss_index(spec, partition, queries, tmp_path):
    partition.save(tmp_path / "part")
    plain = faiss.read_index(str(tmp_path / "part"))
    assert faiss.downcast_index(plain.index).hnsw.efSearch == spec.ef_search
    found = plain.search(queries.descriptors, 10)[1]
    ours = partition.search(queries, 10).image_ids
    assert np.mean([np.isin(*pair).mean() for pair in zip(found, ours, strict=True)]) > 0.8


def test_entries_are_those_of_flat_and_outlive_the_partition(spec, batch):
    entries = Flat(metric=spec.metric).train(batch, 0).entries(batch)
    assert spec.train(batch, 0).entries(batch).equals(entries)
    assert build(spec, batch).entries().equals(entries)


def test_more_links_and_a_wider_build_find_more(batch, queries):
    exact = exact_search(queries, batch, "ip", 10)
    poor = recall(build(Hnsw(neighbours=2, ef_construction=4, ef_search=16), batch).search(queries, 10), exact)
    rich = recall(build(Hnsw(neighbours=16, ef_construction=80, ef_search=16), batch).search(queries, 10), exact)
    assert rich > poor + 0.1


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="neighbours"):
        Hnsw(neighbours=1)
    with pytest.raises(DataError, match="D > 0"):
        Hnsw().train(FeatureBatch.of_global(np.empty(0, np.int64), np.empty((0, 0), np.float32)), 0)
    batch = vectors(3, 0)
    Flat().train(batch, 0).build(Flat().train(batch, 0).entries(batch)).save(tmp_path / "flat.faiss")
    with pytest.raises(ArtifactError, match=r"flat\.faiss.*expected an IndexIDMap over IndexHNSWFlat"):
        Hnsw().load(tmp_path / "flat.faiss")
