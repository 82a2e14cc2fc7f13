"""What every inverted file owes: its role's specification, run on all registered ones and their main variants."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load, save

import cbir.index  # noqa: F401 - registers the indexes
from cbir.errors import ArtifactError, DataError
from cbir.index.inverted.inverted import InvertedIndex
from cbir.spec import methods, one_of
from cbir.types import FeatureBatch, Hits
from tests.index.inverted.features import DIM, SEED, assert_same, local_features

INDEXES = {name: spec for name, spec in methods("index").items() if spec.local}
VARIANTS = {"binary": False, "geometry": True, "idf": True, "burst": "both", "naive": True, "root": True}
DEPTH = 12
WORDS = 16


def spec_of(name: str, **fields: Any) -> Any:
    own = {"bits": 16} if "bits" in INDEXES[name].model_fields else {}
    return INDEXES[name](words=WORDS, **own, **fields)


def variants() -> list[Any]:
    specs = [spec_of(name) for name in INDEXES]
    for name, cls in INDEXES.items():
        specs += [spec_of(name, **{k: v}) for k, v in VARIANTS.items() if cls.model_fields.get(k) is not None]
    return specs


def described(spec: Any) -> str:
    return " ".join(
        [spec.name, *(f"{k}={getattr(spec, k)}" for k in VARIANTS if getattr(spec, k, None) is VARIANTS[k])]
    )


@pytest.fixture(scope="module", params=variants(), ids=described)
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def index(spec):
    return spec.train(local_features(60, 1), SEED)


@pytest.fixture(scope="module")
def batch():
    return local_features(50, 2)


@pytest.fixture(scope="module")
def queries():
    return local_features(20, 3)


def saved(partition, path) -> bytes:
    partition.save(path)
    return path.read_bytes()


def asked(partition, index: InvertedIndex, queries: FeatureBatch, depth: int = DEPTH) -> Hits:
    return partition.search(index.queries(queries), depth)


def test_every_field_is_described_and_the_configuration_is_its_own_yaml(spec):
    assert type(spec).__doc__
    assert type(spec).paper
    assert all(field.description or field.default == spec.name for field in type(spec).model_fields.values())
    assert TypeAdapter(one_of("index")).validate_python(spec.model_dump()) == spec


def test_entries_are_plain_postings_that_do_not_depend_on_the_batch(index, spec, batch):
    table = index.entries(batch)
    geometry = ["angle", "scale"] if getattr(spec, "geometry", False) else []
    assert table.column_names == ["image_id", "word", "code", *geometry]
    assert not any(column.null_count for column in table.columns)
    assert set(table.column("word").to_pylist()) <= set(range(WORDS))
    apart = pa.concat_tables([index.entries(batch.take(np.array([n]))) for n in range(len(batch))])
    assert table.equals(apart.combine_chunks())


def test_queries_do_not_depend_on_each_other(index, batch, queries):
    partition = index.build(index.entries(batch))
    together = asked(partition, index, queries)
    apart = [asked(partition, index, queries.take(np.array([n]))) for n in range(len(queries))]
    ids, scores = (np.vstack([getattr(hits, name) for hits in apart]) for name in ("image_ids", "scores"))
    assert_same(Hits(ids, scores), together)
    assert_same(Hits.ranked(together.image_ids, together.scores, DEPTH), together)


def test_statistics_of_shards_add_up(index, batch):
    whole = index.statistics(index.entries(batch))
    shards = [index.statistics(index.entries(batch.take(np.arange(start, 50, 7)))) for start in range(7)]
    for name, total in whole.items():
        assert total.dtype == np.int64
        np.testing.assert_array_equal(sum(shard[name] for shard in shards), total)


def test_the_order_and_sharding_of_entries_never_show(index, batch, tmp_path):
    whole = index.entries(batch)
    shards = [index.entries(batch.take(np.arange(start, 50, 7)[::-1])) for start in range(7)]
    one = saved(index.build(whole), tmp_path / "one")
    assert saved(index.build(pa.concat_tables(shards)), tmp_path / "many") == one
    shuffled = whole.take(np.random.default_rng(0).permutation(whole.num_rows))
    assert saved(index.build(shuffled), tmp_path / "shuffled") == one


def test_partitions_of_images_answer_like_one(index, batch, queries):
    totals = index.statistics(index.entries(batch))
    whole = asked(index.build(index.entries(batch)), index, queries)
    parts = [index.build(index.entries(batch.take(np.arange(start, 50, 3))), totals) for start in range(3)]
    assert_same(Hits.merge([asked(part, index, queries) for part in parts], DEPTH), whole)


def test_files_of_ranges_of_words_answer_like_one(spec, batch, queries, tmp_path):
    index = spec.model_copy(update={"word_ranges": 3}).train(local_features(60, 1), SEED)
    entries = index.entries(batch)
    totals, paths = index.statistics(entries), [tmp_path / str(number) for number in range(3)]
    for number, path in enumerate(paths):
        index.build(index.piece(entries, number), totals).save(path)
    ranges = spec.load(*paths)
    assert_same(asked(ranges, index, queries), asked(index.build(entries), index, queries))


def test_a_saved_partition_and_a_restored_index_are_the_same(index, spec, batch, queries, tmp_path):
    partition = index.build(index.entries(batch))
    first = saved(partition, tmp_path / "first")
    loaded = spec.load(tmp_path / "first")
    assert saved(loaded, tmp_path / "second") == first
    restored = spec.restore(load(save({k: np.ascontiguousarray(v) for k, v in index.state().items()})))
    assert saved(restored.build(restored.entries(batch)), tmp_path / "third") == first
    assert_same(asked(loaded, restored, queries), asked(partition, index, queries))


def test_the_same_sample_and_seed_give_the_same_bytes(index, spec):
    again = spec.train(local_features(60, 1), SEED)
    assert save(dict(again.state())) == save(dict(index.state()))


def test_entries_survive_parquet(index, batch, tmp_path):
    entries = index.entries(batch)
    pq.write_table(entries, tmp_path / "entries.parquet", row_group_size=64)
    again = pq.read_table(tmp_path / "entries.parquet")
    assert saved(index.build(again), tmp_path / "b") == saved(index.build(entries), tmp_path / "a")


def test_a_deleted_image_is_never_found(index, batch):
    partition = index.build(index.entries(batch))
    before = asked(partition, index, batch, len(batch))
    gone = batch.image_ids[3:9]
    partition.delete(gone)
    after = asked(partition, index, batch, len(batch))
    assert np.isin(gone, before.image_ids).all()
    assert not np.isin(gone, after.image_ids).any()
    kept = [[image for image in row if image >= 0 and image not in gone] for row in before.image_ids.tolist()]
    assert [[image for image in row if image >= 0] for row in after.image_ids.tolist()] == kept


def test_only_the_strongest_features_are_stored_and_queries_ask_with_all(spec, index, batch, queries):
    pruned = InvertedIndex(spec.model_copy(update={"features": 4}), index.vocabulary, index.own)
    ranks = np.arange(len(batch.descriptors)) - np.repeat(batch.offsets[:-1], batch.counts)
    strongest = batch.take_rows(ranks < 4)
    assert pruned.entries(batch).equals(index.entries(strongest))
    assert pruned.signatures(batch).to_arrow().equals(index.signatures(strongest).to_arrow())
    assert pruned.queries(queries).to_arrow().equals(index.queries(queries).to_arrow())
    assert pruned.query_signatures(queries).to_arrow().equals(index.query_signatures(queries).to_arrow())


def test_features_far_from_every_word_are_dropped(spec, index, batch):
    rows = batch.descriptors
    distances = np.linalg.norm(rows[:, None] - index.vocabulary.centroids[None], axis=2).min(1)
    tau = float(np.sort(distances)[len(distances) // 2 :][:2].mean())  # between two of them
    strict = InvertedIndex(spec.model_copy(update={"max_distance": tau}), index.vocabulary, index.own)
    assert strict.entries(batch).equals(index.entries(batch.take_rows(distances <= tau)))
    lax = InvertedIndex(spec.model_copy(update={"max_distance": 1e9}), index.vocabulary, index.own)
    assert lax.entries(batch).equals(index.entries(batch))


def test_no_features_no_queries_and_one_image(index, spec, batch, queries, tmp_path):
    nothing = batch.take(np.array([], np.int64))
    assert index.entries(nothing).schema == index.entries(batch).schema
    empty = index.build(index.entries(nothing))
    saved(empty, tmp_path / "empty")
    for partition in (empty, spec.load(tmp_path / "empty")):
        hits = asked(partition, index, queries)
        assert (hits.image_ids == -1).all()
        assert (hits.scores == -np.inf).all()
    one = index.build(index.entries(batch.take(np.array([1]))))
    assert asked(one, index, batch.take(np.array([1])), 1).image_ids.shape == (1, 1)
    assert asked(one, index, nothing).image_ids.shape == (0, DEPTH)


def test_signatures_are_words_and_codes_of_every_feature(index, spec, batch):
    stored, asked_with = index.signatures(batch), index.query_signatures(batch)
    words = min(spec.words, max(spec.query_assignments, 3))
    for signatures, num in ((stored, 1), (asked_with, words)):
        assert signatures.counts.tolist() == (num * batch.counts).tolist()
        assert signatures.descriptors.dtype == np.uint8
        for place in range(num):
            np.testing.assert_array_equal(signatures.geometry[place::num], batch.geometry)
        nearest = index.vocabulary.nearest(batch.descriptors, num)
        np.testing.assert_array_equal(signatures.words.reshape(-1, num), nearest)


def test_wrong_input_is_refused_with_its_place(index, spec, batch, tmp_path):
    partition = index.build(index.entries(batch))
    with pytest.raises(ValueError, match="no words"):
        partition.search(batch, DEPTH)
    with pytest.raises(ValueError, match="depth"):
        asked(partition, index, batch, 0)
    other = FeatureBatch.of_global(np.array([5]), np.ones((1, DIM + 1), np.float32))
    with pytest.raises(DataError, match=rf"D = {DIM + 1}.*D = {DIM}"):
        index.entries(other)
    with pytest.raises(DataError, match="words"):
        spec.train(local_features(2, 1, most=3), SEED)
    (tmp_path / "torn").write_bytes(saved(partition, tmp_path / "whole")[:-9])
    with pytest.raises(ArtifactError, match="torn"):
        spec.load(tmp_path / "torn")
