"""How good a searcher is: against ground truth, and its indexes against exact search."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from cbir.config import Config
from cbir.errors import DataError
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery, read_ground_truth
from cbir.evaluation.metrics import Quality, ann_recall, evaluate
from cbir.index.index import IndexSpec
from cbir.layout import Layout
from cbir.partition import LocalFiles, Partition, PartitionLike
from cbir.rerank.adaptive import background
from cbir.search import Answer, Searcher
from cbir.types import FeatureBatch, Hits, Int64s, image_id, in_order

__all__ = ["Judged", "RawFeatures", "ann_recalls", "judge", "recalls_by_effort", "with_index"]

RANKING_DEPTH = 10_000
QUERY_BATCH = 16
RECALL_DEPTHS = (1, 10, 100)
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

RawFeatures = Callable[[Sequence[GroundTruthQuery]], Mapping[str, FeatureBatch]]
"""The extractors' features of some queries by channel, for a caller that has them already."""


@dataclass(frozen=True)
class Judged:
    """The answers to all queries of a ground truth, what they are worth, and the seconds that each query took.

    `before_reranking` is the same for the rankings that the rerankers were given; None where nothing is re-ranked.
    `backgrounds` are those of `cbir.rerank.adaptive`, by channel, where several are fused and the lists are whole.
    """

    truth: GroundTruth
    rankings: Sequence[Sequence[str]]
    quality: Quality
    query_seconds: Sequence[float]
    before_reranking: "Judged | None" = None
    backgrounds: Mapping[str, float] = field(default_factory=dict)


def judge(
    searcher: Searcher,
    path: str,
    protocol: Literal["easy", "medium", "hard"] = "medium",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    raw_features: RawFeatures | None = None,
) -> Judged:
    """Search every query of a ground-truth file over the whole index, up to 10,000 results, and judge the rankings.

    `on_progress(done, total)` counts queries. With `raw_features` no picture is read and the seconds are without
    extraction. DataError if a query's picture is neither beside the file nor indexed.
    """
    keys = searcher.keys()
    truth = read_ground_truth(path, protocol).resolved(frozenset(keys.values()))
    depth = min(max(len(keys), 1), RANKING_DEPTH)
    after, before = _Rankings(truth, keys), _Rankings(truth, keys)
    backgrounds: dict[str, float] = defaultdict(float)
    has_backgrounds = searcher.config.search.fuse is not None and len(keys) <= RANKING_DEPTH
    for start in range(0, len(truth.queries), QUERY_BATCH):
        queries = truth.queries[start : start + QUERY_BATCH]
        answer, seconds = _answer(searcher, truth, queries, keys, depth, raw_features)
        after.add(answer.hits, seconds)
        before.add(answer.candidates, seconds - answer.rerank_seconds)
        for name, hits in answer.by_channel.items() if has_backgrounds else ():
            backgrounds[name] += background(hits, len(keys)) * len(queries) / len(truth.queries)
        on_progress(min(start + QUERY_BATCH, len(truth.queries)), len(truth.queries))
    return replace(
        after.judged(),
        before_reranking=before.judged() if searcher.config.search.rerank else None,
        backgrounds=backgrounds,
    )


def _answer(
    searcher: Searcher,
    truth: GroundTruth,
    queries: Sequence[GroundTruthQuery],
    keys: Mapping[int, str],
    depth: int,
    raw_features: RawFeatures | None,
) -> tuple[Answer, float]:
    """The answer to some queries, and the seconds it took when their pictures or features were read."""
    if raw_features is not None:
        raw = raw_features(queries)
        begun = time.perf_counter()
        answer = searcher.answer_features(raw, depth)
    else:
        pictures = [_picture(searcher, truth, query, keys) for query in queries]
        begun = time.perf_counter()
        answer = searcher.answer(pictures, [query.box for query in queries], depth)
    return answer, time.perf_counter() - begun


class _Rankings:
    """The rankings of all queries as they come, batch by batch."""

    def __init__(self, truth: GroundTruth, keys: Mapping[int, str]) -> None:
        self._truth, self._keys = truth, keys
        self._rankings: list[list[str]] = []
        self._seconds: list[float] = []

    def add(self, hits: Hits, seconds: float) -> None:
        """The hits of the next queries, which took so many seconds together."""
        self._rankings += [[self._keys[image] for image in row if image >= 0] for row in hits.image_ids.tolist()]
        self._seconds += [seconds / len(hits)] * len(hits)

    def judged(self) -> Judged:
        """What they are worth, once all queries are answered."""
        return Judged(self._truth, self._rankings, evaluate(self._rankings, self._truth), self._seconds)


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


def ann_recalls(
    partitions: Sequence[PartitionLike], channel: str, probes: FeatureBatch, exact: Hits
) -> dict[int, float]:
    """Recall@k of a channel's index against exact search, by k: of the other images, as the probe itself is indexed and
    found by any index."""
    wanted = _others(exact, probes)
    held = int((wanted[:1] >= 0).sum())
    if not held:
        return {}
    depths = [depth for depth in RECALL_DEPTHS if depth <= held] or [held]
    hits = [part.search({channel: probes}, max(depths) + 1)[channel] for part in partitions]
    found = _others(Hits.merge(hits, max(depths) + 1), probes)
    return {depth: ann_recall(found, wanted, depth) for depth in depths}


def recalls_by_effort(
    layout: Layout, config: Config, files: LocalFiles, channel: str, probes: FeatureBatch, exact: Hits
) -> dict[int, float]:
    """Recall@10 by how much of a channel's index a search looks at: by the values of `IndexSpec.effort`, up to one that
    finds all, or no more than the two before it; empty for an index without."""
    spec = config.channels[channel].index
    if spec.effort is None:
        return {}
    recalls: dict[int, float] = {}
    for value in sorted({*EFFORTS, getattr(spec, spec.effort)}):
        changed = with_index(config, channel, spec.model_copy(update={spec.effort: value}))
        partitions = [Partition(changed, part, files) for part in layout.partitions]
        found = ann_recalls(partitions, channel, probes, exact)
        if 10 not in found:
            break
        recalls[value] = found[10]
        if found[10] == 1.0 or list(recalls.values())[-3:] == [found[10]] * 3:
            break
    return recalls


def with_index(config: Config, channel: str, index: IndexSpec) -> Config:
    """The configuration with another index in a channel."""
    changed = config.channels[channel].model_copy(update={"index": index})
    return config.model_copy(update={"channels": {**config.channels, channel: changed}})


def _others(hits: Hits, probes: FeatureBatch) -> Int64s:
    """The ids (Q, R - 1) of the hits but that of the query itself, or but the last one where that was not found."""
    is_own = hits.image_ids == probes.image_ids[:, None]
    order = np.argsort(is_own, axis=1, kind="stable")
    return in_order(hits.image_ids, order)[:, :-1]
