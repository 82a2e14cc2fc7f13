"""What every index of vectors owes: the role's specification, run on all registered ones (not on inverted files).

An index is tested with its defaults; a field without a default needs `Field(examples=[...])`, whose first value is
taken here and shown to users by the schema.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load, save

import cbir.index  # noqa: F401 - registers the indexes
from cbir.errors import ArtifactError, DataError
from cbir.spec import methods, one_of
from cbir.types import FeatureBatch, Hits
from tests.index.vectors import DIM, assert_same, descriptors, one_each

INDEXES = {name: spec for name, spec in methods("index").items() if not spec.local}
SEED, DEPTH = 7, 12


def spec_of(name: str) -> Any:
    fields = INDEXES[name].model_fields
    return INDEXES[name](**{key: field.examples[0] for key, field in fields.items() if field.is_required()})


def stacked(hits: list[Hits]) -> Hits:
    return Hits(np.vstack([part.image_ids for part in hits]), np.vstack([part.scores for part in hits]))


@pytest.fixture(scope="module", params=list(INDEXES))
def spec(request):
    return spec_of(request.param)


@pytest.fixture(scope="module")
def sample():
    return one_each(600, 1)


@pytest.fixture(scope="module")
def index(spec, sample):
    return spec.train(sample, SEED)


@pytest.fixture(scope="module")
def batch():
    return one_each(200, 2)


@pytest.fixture(scope="module")
def queries():
    return one_each(30, 3)


def saved(partition, path) -> bytes:
    partition.save(path)
    return path.read_bytes()


def test_every_field_is_described_and_the_configuration_is_its_own_yaml(spec):
    assert type(spec).__doc__
    assert type(spec).paper
    assert spec.suffix.isalnum()
    for field in type(spec).model_fields.values():
        assert field.description or field.default == spec.name
    assert TypeAdapter(one_of("index")).validate_python(spec.model_dump()) == spec


def test_entries_are_one_plain_row_per_vector(index, batch):
    table = index.entries(batch)
    assert table.column_names[0] == "image_id"
    assert table.schema.field("image_id").type == pa.int64()
    assert table.num_rows == len(batch.descriptors)
    assert not any(column.null_count for column in table.columns)
    np.testing.assert_array_equal(np.sort(table.column("image_id").to_numpy()), np.sort(batch.image_ids))


def test_entries_do_not_depend_on_the_batch(index, batch):
    together = index.entries(batch)
    apart = pa.concat_tables([index.entries(batch.take(np.array([n]))) for n in range(len(batch))])
    assert together.equals(apart.combine_chunks())


def test_hits_are_ranked_padded_and_of_the_declared_types(index, batch, queries):
    hits = index.build(index.entries(batch)).search(queries, DEPTH)
    assert hits.image_ids.shape == hits.scores.shape == (30, DEPTH)
    assert hits.image_ids.dtype == np.int64
    assert hits.scores.dtype == np.float32
    assert hits.image_ids.flags.c_contiguous
    is_hit = hits.image_ids >= 0  # where a search looks into few lists, they may hold fewer vectors than asked for
    assert is_hit[:, 0].all()
    assert is_hit.mean() > 0.95
    assert not np.diff(is_hit.astype(np.int8), axis=1).clip(0).any(), "nothing follows the padding"
    assert (np.isfinite(hits.scores) == is_hit).all()
    assert np.isin(hits.image_ids[is_hit], batch.image_ids).all()
    assert all(len(set(row[found])) == found.sum() for row, found in zip(hits.image_ids, is_hit, strict=True))
    assert_same(Hits.ranked(hits.image_ids, hits.scores, DEPTH), hits)


def test_an_indexed_image_finds_itself(index, batch):
    """Among the first three, or with the score of the third: neighbours may have the same code and a smaller id."""
    hits = index.build(index.entries(batch)).search(batch, len(batch))
    own = np.where(hits.image_ids == batch.image_ids[:, None], hits.scores, -np.inf).max(1)
    assert (own >= hits.scores[:, 2])[8:].all(), "rows 3 to 7 hold the zero vector and the repeated ones"


def test_the_order_and_sharding_of_entries_never_show(index, batch, tmp_path):
    whole = index.entries(batch)
    shards = [index.entries(batch.take(np.arange(start, 200, 7)[::-1])) for start in range(7)]
    one = saved(index.build(whole), tmp_path / "one")
    assert saved(index.build(pa.concat_tables(shards)), tmp_path / "many") == one
    assert saved(index.build(whole.take(np.random.default_rng(0).permutation(200))), tmp_path / "shuffled") == one


def test_merged_partitions_answer_like_one(index, batch, queries):
    whole = index.build(index.entries(batch)).search(queries, DEPTH)
    parts = [batch.take(np.arange(start, 200, 3)) for start in range(3)]
    hits = [index.build(index.entries(part)).search(queries, DEPTH) for part in parts]
    assert_same(Hits.merge(hits, DEPTH), whole)


def test_queries_do_not_depend_on_each_other(index, batch):
    # So many that faiss multiplies matrices (from 128,000 values on), which it does not do for one query.
    partition, queries = index.build(index.entries(batch)), one_each(4100, 4)
    together = partition.search(queries, DEPTH)
    apart = [partition.search(queries.take(np.array([n])), DEPTH) for n in range(100)]
    assert_same(stacked(apart), Hits(together.image_ids[:100], together.scores[:100]))


def test_depth_beyond_the_partition_is_padded(index, batch, queries):
    partition = index.build(index.entries(batch.take(np.arange(4))))
    hits = partition.search(queries, DEPTH)
    assert (hits.image_ids[:, 4:] == -1).all()
    assert (hits.scores[:, 4:] == -np.inf).all()
    assert not np.isnan(hits.scores).any()


def test_no_vectors_no_queries_and_one_image(index, batch, queries, tmp_path, spec):
    nothing = batch.take(np.array([], np.int64))
    empty = index.build(index.entries(nothing))
    assert index.entries(nothing).schema == index.entries(batch).schema
    saved(empty, tmp_path / "empty")
    for partition in (empty, spec.load(tmp_path / "empty")):
        hits = partition.search(queries, DEPTH)
        assert (hits.image_ids == -1).all()
        assert (hits.scores == -np.inf).all()
    one = index.build(index.entries(batch.take(np.array([9]))))
    assert one.search(batch.take(np.array([9])), 1).image_ids.tolist() == [[batch.image_ids[9]]]
    assert one.search(nothing, DEPTH).image_ids.shape == (0, DEPTH)


def test_images_may_have_many_rows_or_none(index, queries):
    regional = descriptors([0, 3, 1, 0, 5, 2] * 20, 5)
    partition = index.build(index.entries(regional))
    hits = partition.search(regional, DEPTH)
    assert hits.image_ids.shape == (120, DEPTH)
    empty = regional.counts == 0
    assert (hits.image_ids[empty] == -1).all()
    rows = FeatureBatch.of_global(np.arange(len(regional.descriptors)), regional.descriptors)
    by_row = partition.search(rows, DEPTH)
    for image in np.flatnonzero(~empty).tolist():
        found = [ids for ids in hits.image_ids[image].tolist() if ids >= 0]
        assert len(found) == len(set(found))
        assert hits.scores[image, 0] == by_row.scores[regional.rows(image)].max()


def test_the_order_of_the_rows_of_an_image_never_shows(index, tmp_path):
    entries = index.entries(descriptors([9, 0, 30, 4], 6))
    shuffled = entries.take(np.random.default_rng(0).permutation(43))
    assert saved(index.build(shuffled), tmp_path / "b") == saved(index.build(entries), tmp_path / "a")


def test_a_saved_partition_is_the_partition(index, spec, batch, queries, tmp_path):
    partition = index.build(index.entries(batch))
    first = saved(partition, tmp_path / "first")
    loaded = spec.load(tmp_path / "first")
    assert_same(loaded.search(queries, DEPTH), partition.search(queries, DEPTH))
    assert saved(loaded, tmp_path / "second") == first


def test_a_restored_index_is_the_index(index, spec, batch, tmp_path):
    state = load(save({key: np.ascontiguousarray(value) for key, value in index.state().items()}))
    restored = spec.restore(state)
    assert save(dict(restored.state())) == save(dict(index.state()))
    assert restored.entries(batch).equals(index.entries(batch))
    built = [saved(each.build(each.entries(batch)), tmp_path / "part") for each in (index, restored)]
    assert built[0] == built[1]


def test_the_same_sample_and_seed_give_the_same_bytes(index, spec, sample):
    assert save(dict(spec.train(sample, SEED).state())) == save(dict(index.state()))


def test_entries_survive_parquet(index, batch, tmp_path):
    entries = index.entries(batch)
    pq.write_table(entries, tmp_path / "entries.parquet", row_group_size=64)
    again = pq.read_table(tmp_path / "entries.parquet")
    assert again.schema.metadata == entries.schema.metadata
    assert saved(index.build(again), tmp_path / "b") == saved(index.build(entries), tmp_path / "a")


def test_the_size_of_an_entry_is_what_a_partition_grows_by(index, spec, tmp_path):
    sizes = [len(saved(index.build(index.entries(one_each(n, 6))), tmp_path / "part")) for n in (500, 1500)]
    assert spec.entry_bytes(DIM) == pytest.approx((sizes[1] - sizes[0]) / 1000, rel=0.05)


def test_wrong_input_is_refused_with_its_place(index, spec, batch, tmp_path):
    partition = index.build(index.entries(batch))
    other = FeatureBatch.of_global(np.array([5]), np.ones((1, DIM + 1), np.float32))
    with pytest.raises(DataError, match=rf"D = {DIM + 1}.*D = {DIM}"):
        partition.search(other, DEPTH)
    with pytest.raises(DataError, match=rf"D = {DIM + 1}.*D = {DIM}"):
        index.entries(other)
    broken = FeatureBatch.of_global(np.array([41]), np.full((1, DIM), np.nan, np.float32))
    with pytest.raises(DataError, match="image 41"):
        index.entries(broken)
    with pytest.raises(ValueError, match="depth"):
        partition.search(batch, 0)
    (tmp_path / "torn").write_bytes(saved(partition, tmp_path / "whole")[:-9])
    for name in ("torn", "missing"):
        with pytest.raises(ArtifactError, match=name):
            spec.load(tmp_path / name)
