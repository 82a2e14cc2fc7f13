"""Re-ranking of short-lists: the best hits of all queries are compared with their queries, a few hundred at a time."""

from collections.abc import Callable

import numpy as np

from cbir.rerank.matches import Matches, MatchingSpec
from cbir.rerank.reranker import SearchContext
from cbir.types import FeatureBatch, Hits, Int64s

__all__ = ["Judge", "rerank_short_lists"]

Judge = Callable[[FeatureBatch, FeatureBatch, Matches], Int64s]
"""How well each of N images matches a query: whole numbers (N,), 0 where it does not match."""

_CHUNK_IMAGES = {"features": 512, "signatures": 2048}
"""Stored images that are held at once: 1,000 features of an image have 144 KB, their signatures 40 KB."""


def rerank_short_lists(spec: MatchingSpec, judge: Judge, hits: Hits, context: SearchContext) -> Hits:
    """Images that match their query come first, by falling number; the others and those below `top` keep their order.

    The integer part of a score is the judge's number; its fraction falls with the rank before.
    """
    by_words = spec.reads == "signatures"
    queries = context.query_signatures(spec.channel) if by_words else context.query_features(spec.channel)
    ask = context.signatures if by_words else context.features
    compared = (hits.image_ids[:, : spec.top or None] >= 0) & (queries.counts > 0)[:, None]
    rows, ranks = np.nonzero(compared)
    numbers, matcher = np.zeros(hits.image_ids.shape, np.int64), spec.matcher()
    for start in range(0, len(rows), _CHUNK_IMAGES[spec.reads]):
        chunk = slice(start, start + _CHUNK_IMAGES[spec.reads])
        ids, positions = np.unique(hits.image_ids[rows[chunk], ranks[chunk]], return_inverse=True)
        stored = ask(spec.channel, ids)
        for number in np.unique(rows[chunk]).tolist():
            own, query = rows[chunk] == number, queries.take(np.array([number]))
            matches = matcher(query, stored, positions[own])
            numbers[number, ranks[chunk][own]] = judge(query, stored, matches)
    return _by_number(hits, numbers)


def _by_number(hits: Hits, numbers: Int64s) -> Hits:
    """Hits by falling number, then by the rank that they had."""
    depth = hits.image_ids.shape[1]
    before = (depth - np.arange(depth)) / (depth + 1)
    return Hits.ranked(hits.image_ids, (numbers + before).astype(np.float32), depth)
