"""What every reranker and every fusion owes: the roles' specifications, run on all registered methods.

A method is tested with its defaults; a field without a default needs `Field(examples=[...])`, whose first value is
taken here and shown to users by the schema.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import cbir.rerank  # noqa: F401 - registers rerankers and fusions
from cbir.spec import methods
from cbir.types import FeatureBatch, Hits, Int64s

RERANKERS, FUSIONS = methods("reranker"), methods("fusion")
NUM_IMAGES, DEPTH = 40, 25


def spec_of(cls: Any) -> Any:
    fields = cls.model_fields
    return cls(**{key: field.examples[0] for key, field in fields.items() if field.is_required()})


@dataclass(frozen=True)
class Stored:
    """Stored features of images 0 to NUM_IMAGES - 1; every fifth has none."""

    queries: FeatureBatch
    database: FeatureBatch

    def query_features(self, channel: str) -> FeatureBatch:
        return self.queries

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        return self.database.take(image_ids)

    def query_signatures(self, channel: str) -> FeatureBatch:
        """Every feature has two words of 256."""
        words = self.queries.descriptors[:, :1].astype(np.int32)
        other = coded(self.queries, (words + 1) % 256)
        order = np.argsort(np.tile(np.arange(len(words)), 2), kind="stable")
        twice = (np.concatenate([rows, rows])[order] for rows in (other.descriptors, other.geometry))
        both = np.hstack([words, (words + 1) % 256]).ravel()
        return FeatureBatch(self.queries.image_ids, 2 * self.queries.offsets, *twice, words=both)

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        stored = self.database.take(image_ids)
        return coded(stored, stored.descriptors[:, :1].astype(np.int32))


def coded(batch: FeatureBatch, words: np.ndarray) -> FeatureBatch:
    """Codes of 64 bits that stand for the descriptors."""
    return replace(batch, descriptors=np.ascontiguousarray(batch.descriptors[:, 1:9]), words=words.ravel())


def features(counts: np.ndarray, seed: int) -> FeatureBatch:
    rng, total = np.random.default_rng(seed), int(counts.sum())
    rows = rng.gamma(0.5, 30, (total, 128)).clip(0, 255).astype(np.uint8)
    geometry = rng.uniform(0, 500, (total, 4)).astype(np.float32)
    return FeatureBatch(np.arange(len(counts)), np.concatenate([[0], np.cumsum(counts)]), rows, geometry)


@pytest.fixture(scope="module")
def context() -> Stored:
    """Query 0 has no features; query 1 is image 7, query 2 is image 11, query 3 is like none."""
    database = features(np.where(np.arange(NUM_IMAGES) % 5 == 4, 0, 60), 0)
    nothing = database.take(np.array([4]))
    alike, unlike = database.take(np.array([7, 11])), features(np.array([60]), 1)
    return Stored(FeatureBatch.concatenate([nothing, alike, unlike]), database)


@pytest.fixture(scope="module")
def hits() -> Hits:
    """Four rankings, the last with padding, all scores with ties."""
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(NUM_IMAGES)[:DEPTH] for _ in range(4)]).astype(np.int64)
    ids[3, 15:] = -1
    return Hits.ranked(ids, np.round(rng.random((4, DEPTH)), 1).astype(np.float32), DEPTH)


def assert_ranked(hits: Hits) -> None:
    again = Hits.ranked(hits.image_ids, hits.scores, hits.image_ids.shape[1])
    np.testing.assert_array_equal(again.image_ids, hits.image_ids)
    np.testing.assert_array_equal(again.scores, hits.scores)
    assert hits.image_ids.dtype == np.int64
    assert hits.scores.dtype == np.float32
    assert not np.isnan(hits.scores).any()
    np.testing.assert_array_equal(hits.scores == -np.inf, hits.image_ids < 0)


@pytest.fixture(params=list(RERANKERS))
def reranker(request):
    return spec_of(RERANKERS[request.param]).build()


@pytest.fixture(params=list(FUSIONS))
def fusion(request):
    return spec_of(FUSIONS[request.param]).build()


@pytest.mark.parametrize("cls", [*RERANKERS.values(), *FUSIONS.values()])
def test_every_field_is_described(cls):
    spec = spec_of(cls)
    assert cls.__doc__
    assert cls.paper
    assert cls(**spec.model_dump()) == spec
    for name, field in cls.model_fields.items():
        assert field.description or name == "name" or (name == "channel" and spec.channel is None)


def test_the_result_is_a_ranked_permutation(reranker, hits, context):
    found = reranker.rerank(hits, context)
    assert found.image_ids.shape == hits.image_ids.shape
    np.testing.assert_array_equal(np.sort(found.image_ids), np.sort(hits.image_ids))
    assert_ranked(found)


def test_reranking_changes_no_input_and_is_repeatable(reranker, hits, context):
    before = hits.image_ids.copy(), hits.scores.copy()
    once, twice = reranker.rerank(hits, context), reranker.rerank(hits, context)
    np.testing.assert_array_equal(hits.image_ids, before[0])
    np.testing.assert_array_equal(hits.scores, before[1])
    np.testing.assert_array_equal(once.image_ids, twice.image_ids)
    np.testing.assert_array_equal(once.scores, twice.scores)


def test_queries_do_not_depend_on_each_other(reranker, hits, context):
    together = reranker.rerank(hits, context)
    for query in range(4):
        own = Hits(hits.image_ids[query : query + 1], hits.scores[query : query + 1])
        alone = reranker.rerank(own, Stored(context.queries.take(np.array([query])), context.database))
        np.testing.assert_array_equal(alone.image_ids[0], together.image_ids[query])
        np.testing.assert_array_equal(alone.scores[0], together.scores[query])


def test_nothing_to_rerank(reranker, context):
    none = Hits(np.empty((0, DEPTH), np.int64), np.empty((0, DEPTH), np.float32))
    no_queries = Stored(context.queries.take(np.empty(0, np.int64)), context.database)
    assert reranker.rerank(none, no_queries).image_ids.shape == (0, DEPTH)
    padding = Hits(np.full((4, 3), -1), np.full((4, 3), -np.inf, np.float32))
    assert (reranker.rerank(padding, context).image_ids == -1).all()


def test_fusion_ranks_the_union_without_repetition(fusion, hits):
    other = Hits(hits.image_ids[[1, 0, 3, 2]], hits.scores[[1, 0, 3, 2]] * 7 - 2)
    fused = fusion.fuse({"a": hits, "b": other}, 2 * DEPTH)
    assert fused.image_ids.shape == (4, 2 * DEPTH)
    assert_ranked(fused)
    for query in range(4):
        ids = [image for image in fused.image_ids[query].tolist() if image >= 0]
        union = np.union1d(hits.image_ids[query], other.image_ids[query])
        assert sorted(ids) == union[union >= 0].tolist()


def test_fusion_of_equal_rankings_is_that_ranking(fusion, hits):
    fused = fusion.fuse({"a": hits, "b": hits}, DEPTH)
    np.testing.assert_array_equal(fused.image_ids, hits.image_ids)


def test_fusion_cuts_at_the_depth_and_ignores_the_order_of_channels(fusion, hits):
    other = Hits(hits.image_ids[[1, 0, 3, 2]], hits.scores[[1, 0, 3, 2]])
    deep = fusion.fuse({"a": hits, "b": other}, 2 * DEPTH)
    for channels in ({"a": hits, "b": other}, {"b": other, "a": hits}):
        short = fusion.fuse(channels, 5)
        np.testing.assert_array_equal(short.image_ids, deep.image_ids[:, :5])
        np.testing.assert_array_equal(short.scores, deep.scores[:, :5])


def test_fusion_of_nothing(fusion, hits):
    none = Hits(np.empty((0, DEPTH), np.int64), np.empty((0, DEPTH), np.float32))
    assert fusion.fuse({"a": none, "b": none}, 6).image_ids.shape == (0, 6)
    padding = Hits(np.full((4, 3), -1), np.full((4, 3), -np.inf, np.float32))
    alone = fusion.fuse({"a": hits, "b": padding}, DEPTH)
    np.testing.assert_array_equal(alone.image_ids, hits.image_ids)
    assert (fusion.fuse({"a": padding}, 6).image_ids == -1).all()
