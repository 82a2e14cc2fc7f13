"""How good a searcher is: against ground truth, and its indexes against exact search."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cbir.errors import DataError
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery, read_ground_truth
from cbir.evaluation.metrics import Quality, ann_recall, evaluate
from cbir.search import Searcher
from cbir.types import FeatureBatch, Hits, image_id

__all__ = ["Judged", "ann_recalls", "judge"]

RANKING_DEPTH = 10_000
QUERY_BATCH = 16
RECALL_DEPTHS = (1, 10, 100)


@dataclass(frozen=True)
class Judged:
    """The answers to all queries of a ground truth, and what they are worth."""

    truth: GroundTruth
    rankings: Sequence[Sequence[str]]
    quality: Quality
    query_seconds: Sequence[float]


def judge(
    searcher: Searcher,
    path: str,
    protocol: Literal["easy", "medium", "hard"] = "medium",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Judged:
    """Search every query of a ground-truth file over the whole index, up to 10,000 results, and judge the rankings.

    `on_progress(done, total)` counts queries. DataError if a query's picture is neither beside the file nor indexed.
    """
    keys = searcher.keys()
    truth = read_ground_truth(path, protocol).resolved(frozenset(keys.values()))
    depth = min(max(len(keys), 1), RANKING_DEPTH)
    rankings: list[list[str]] = []
    seconds: list[float] = []
    for start in range(0, len(truth.queries), QUERY_BATCH):
        queries = truth.queries[start : start + QUERY_BATCH]
        pictures = [_picture(searcher, truth, query, keys) for query in queries]
        begun = time.perf_counter()
        answer = searcher.answer(pictures, [query.box for query in queries], depth)
        seconds += [(time.perf_counter() - begun) / len(queries)] * len(queries)
        rankings += [[keys[image] for image in row if image >= 0] for row in answer.hits.image_ids.tolist()]
        on_progress(len(rankings), len(truth.queries))
    return Judged(truth, rankings, evaluate(rankings, truth), seconds)


def _picture(searcher: Searcher, truth: GroundTruth, query: GroundTruthQuery, keys: Mapping[int, str]) -> bytes:
    """The file beside the ground truth; else the indexed image with this key, or the key without leading folders."""
    try:
        return truth.picture(query).read_bytes()
    except DataError:
        parts = query.image.split("/")
        for key in ("/".join(parts[number:]) for number in range(len(parts))):
            if keys.get(image_id(key)) == key:
                return searcher.picture(image_id(key))
        raise


def ann_recalls(searcher: Searcher, channel: str, probes: FeatureBatch, exact: Hits) -> dict[int, float]:
    """Recall@k of a channel's index against exact search, by k; the probe itself is indexed and counts."""
    if not len(probes) or not (exact.image_ids >= 0).any():
        return {}
    held = int((exact.image_ids[0] >= 0).sum())
    depths = [depth for depth in RECALL_DEPTHS if depth <= held] or [held]
    found = searcher.channel_hits({channel: probes}, max(depths))[channel]
    return {depth: ann_recall(np.asarray(found.image_ids), exact.image_ids, depth) for depth in depths}
