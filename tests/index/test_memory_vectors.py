"""Memory vectors against their definition and the exact index."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from cbir.errors import ArtifactError, DataError
from cbir.index.dense import exact_search, merge_partitions, write_index
from cbir.index.flat import Flat
from cbir.index.memory_vectors import MemoryVectors, memory_vectors
from cbir.types import FeatureBatch


def vectors(num: int, seed: int, dim: int = 64) -> FeatureBatch:
    rows = np.random.default_rng(seed).normal(size=(num, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64) * 5 + 2, rows.astype(np.float32))


def build(spec: MemoryVectors, batch: FeatureBatch):
    index = spec.train(batch, 0)
    return index.build(index.entries(batch))


def near(batch: FeatureBatch, num: int, seed: int) -> FeatureBatch:
    """Queries near some of the vectors: cosines of about 0.8."""
    rng = np.random.default_rng(seed)
    rows = batch.descriptors[rng.choice(len(batch), num, replace=False)]
    rows = rows + 0.75 / np.sqrt(rows.shape[1]) * rng.normal(size=rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64), rows.astype(np.float32))


def test_every_member_of_a_group_has_one_score_with_pinv():
    """Iscen et al. 2018: m·x = 1 for the members, whole groups and the last one alike."""
    rows = vectors(105, 0).descriptors
    memory = memory_vectors(rows, 10, "pinv")
    assert memory.shape == (11, 64)
    own = np.einsum("nd,nd->n", memory[np.arange(105) // 10], rows)
    np.testing.assert_allclose(own, 1, atol=1e-5)
    group = rows[20:30].astype(np.float64)
    by_formula = group.T @ np.linalg.inv(group @ group.T) @ np.ones(10)
    np.testing.assert_allclose(memory[2], by_formula, atol=1e-5)


def test_a_sum_is_the_sum_of_the_group():
    rows = vectors(25, 0).descriptors
    memory = memory_vectors(rows, 10, "sum")
    np.testing.assert_allclose(memory, [rows[:10].sum(0), rows[10:20].sum(0), rows[20:].sum(0)], atol=1e-5)


def test_repeated_and_zero_vectors_and_more_than_dimensions_stay_finite():
    rows = vectors(10, 0, dim=4).descriptors
    rows[3], rows[5] = rows[4], 0
    memory = memory_vectors(rows, 10, "pinv")
    assert np.isfinite(memory).all()
    assert np.abs(memory).max() < 100
    three = memory_vectors(rows[3:6], 3, "pinv")
    np.testing.assert_allclose(rows[3:5] @ three[0], 1, atol=1e-5)


@pytest.mark.parametrize("form", ["sum", "pinv"])
@pytest.mark.parametrize("num", [1, 9, 10, 11, 500])
def test_opening_all_groups_is_the_exhaustive_search(form, num):
    batch, queries = vectors(num, 0), vectors(30, 1)
    hits = build(MemoryVectors(form=form, expand=1000), batch).search(queries, 12)
    exact = exact_search(queries, batch, "ip", 12)
    np.testing.assert_array_equal(hits.image_ids, exact.image_ids)
    np.testing.assert_allclose(hits.scores, exact.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["sum", "pinv"])
def test_the_best_groups_are_opened(form):
    batch, num = vectors(1000, 0), 40
    queries = near(batch, 50, 2)
    spec = MemoryVectors(form=form, group=10, expand=num)
    hits = build(spec, batch).search(queries, 400)
    memory = memory_vectors(batch.descriptors, 10, form).astype(np.float64)
    best = np.argsort(-(queries.descriptors @ memory.T), axis=1)[:, :num]
    for row, groups in zip(hits.image_ids, best, strict=True):
        members = (groups[:, None] * 10 + np.arange(10)).ravel()
        np.testing.assert_array_equal(np.sort(row), np.sort(batch.image_ids[members]))


def test_more_groups_find_more_and_few_find_much_more_than_chance():
    batch = vectors(4000, 0, dim=128)
    queries = near(batch, 200, 2)
    exact = exact_search(queries, batch, "ip", 1).image_ids[:, 0]
    found = []
    for expand in (8, 40, 400):
        partition = build(MemoryVectors(expand=expand), batch)
        found.append(float((partition.search(queries, 1).image_ids[:, 0] == exact).mean()))
    assert found[0] > 0.3, "2 % of the groups"
    assert found == sorted(found)
    assert found[1] > 0.8
    assert found[2] == 1.0


def test_groups_follow_the_stored_order_alone(tmp_path):
    batch, spec = vectors(203, 0), MemoryVectors()
    index = spec.train(batch, 0)
    shards = [index.entries(batch.take(np.arange(start, 203, 4)[::-1])) for start in (2, 0, 3, 1)]
    index.build(pa.concat_tables(shards)).save(tmp_path / "two")
    index.build(index.entries(batch)).save(tmp_path / "one")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    parts = [build(spec, batch.take(np.arange(number, 203, 3))) for number in range(3)]
    write_index(merge_partitions(parts), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "one").read_bytes()


def test_the_file_is_a_plain_inverted_file(tmp_path):
    batch = vectors(300, 0)
    queries = near(batch, 20, 1)
    partition = build(MemoryVectors(expand=12), batch)
    partition.save(tmp_path / "part")
    plain = faiss.read_index(str(tmp_path / "part"))
    assert (plain.nlist, plain.nprobe) == (30, 12)
    np.testing.assert_array_equal(plain.search(queries.descriptors, 5)[1], partition.search(queries, 5).image_ids)


def test_threads_share_a_partition():
    batch = vectors(500, 0)
    partition, queries = build(MemoryVectors(expand=9), batch), near(batch, 30, 1)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: partition.search(queries, 10), range(12))
    for hits in others:
        np.testing.assert_array_equal(hits.image_ids, first.image_ids)
        np.testing.assert_array_equal(hits.scores, first.scores)


def test_entries_are_those_of_flat_and_outlive_the_partition():
    batch = vectors(32, 0)
    entries = Flat().train(batch, 0).entries(batch)
    assert MemoryVectors().train(batch, 0).entries(batch).equals(entries)
    assert build(MemoryVectors(), batch).entries().equals(entries)


def test_what_does_not_fit_is_refused(tmp_path):
    for fields in ({"group": 1}, {"metric": "l2"}, {"form": "mean"}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            MemoryVectors(**fields)
    with pytest.raises(DataError, match="D > 0"):
        MemoryVectors().train(FeatureBatch.of_global(np.empty(0, np.int64), np.empty((0, 0), np.float32)), 0)
    batch = vectors(3, 0)
    Flat().train(batch, 0).build(Flat().train(batch, 0).entries(batch)).save(tmp_path / "flat.faiss")
    with pytest.raises(ArtifactError, match=r"flat\.faiss.*expected an IndexIVFFlat"):
        MemoryVectors().load(tmp_path / "flat.faiss")
