"""Which images are asked for, in how many calls, and where they go."""

import numpy as np
import pytest

from cbir.rerank import shortlist
from cbir.rerank.fsm import Fsm
from cbir.types import FeatureBatch, Hits
from tests.rerank.scenes import Stored, stored

TRUE = {1: 20, 3: 60, 4: 30, 6: 30}


def many_queries(num: int) -> tuple[Stored, Hits]:
    """Query n is the first query, or has no features where n is 2; every ranking has another order, and padding."""
    one = stored(TRUE)
    nothing = one.queries.take_rows(np.zeros(len(one.queries.descriptors), np.bool_))
    queries = FeatureBatch.concatenate([nothing if n == 2 else one.queries for n in range(num)])
    ids = np.stack([np.random.default_rng(n).permutation(12) for n in range(num)]).astype(np.int64)
    ids[1:2, 7:] = -1
    scores = np.where(ids >= 0, np.linspace(1, 0, 12, dtype=np.float32), np.float32(-np.inf))
    return Stored(queries, one.database), Hits(ids, scores)


def test_all_queries_ask_once():
    context, hits = many_queries(5)
    Fsm(channel="local", top=4).build().rerank(hits, context)
    assert context.asked == [np.unique(hits.image_ids[[0, 1, 3, 4], :4]).tolist()]


@pytest.mark.parametrize("way", ["word", "ratio"])
def test_chunks_do_not_show_in_the_result(monkeypatch, way):
    context, hits = many_queries(5)
    reranker = Fsm(channel="local", top=0, matches=way).build()
    whole = reranker.rerank(hits, context)
    monkeypatch.setattr(shortlist, "_CHUNK_IMAGES", {"features": 5, "signatures": 5})
    context.asked.clear()
    parts = reranker.rerank(hits, context)
    np.testing.assert_array_equal(parts.image_ids, whole.image_ids)
    np.testing.assert_array_equal(parts.scores, whole.scores)
    assert len(context.asked) == 9  # 12 + 7 + 12 + 12 pairs
    assert max(len(ids) for ids in context.asked) <= 5


def test_verified_images_come_first_and_the_others_keep_their_order():
    context, hits = many_queries(4)
    found = Fsm(channel="local", top=0).build().rerank(hits, context)
    for query in (0, 1, 3):
        before = [image for image in hits.image_ids[query].tolist() if image >= 0]
        verified = sorted((image for image in before if image in TRUE), key=lambda image: -TRUE[image])
        assert [TRUE[image] for image in found.image_ids[query, : len(verified)].tolist()] == [
            TRUE[i] for i in verified
        ]
        rest = [image for image in before if image not in TRUE]
        assert found.image_ids[query, len(verified) : len(before)].tolist() == rest
        assert (np.diff(found.scores[query, : len(before)]) < 0).all()
    np.testing.assert_array_equal(found.image_ids[2], hits.image_ids[2])


def test_equal_numbers_keep_the_rank_before():
    context, _ = many_queries(1)
    for ids in ([6, 4, 0], [4, 6, 0]):
        order = Hits(np.array([ids]), np.array([[3, 2, 1]], np.float32))
        assert Fsm(channel="local").build().rerank(order, context).image_ids.tolist() == [ids]
