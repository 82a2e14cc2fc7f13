"""How good a searcher is, against ground truth."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cbir.errors import DataError
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery, read_ground_truth
from cbir.evaluation.metrics import Quality, evaluate
from cbir.rerank.adaptive import background
from cbir.search import Answer, Searcher
from cbir.types import FeatureBatch, Hits, image_id

__all__ = ["RANKING_DEPTH", "Judged", "RawFeatures", "indexed_image", "judge", "query_picture"]

RANKING_DEPTH = 10_000
QUERY_BATCH = 16

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
        pictures = [query_picture(searcher, truth, query, keys) for query in queries]
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


def query_picture(searcher: Searcher, truth: GroundTruth, query: GroundTruthQuery, keys: Mapping[int, str]) -> bytes:
    """The file beside the ground truth; else the indexed image with this key, or the key without leading folders."""
    try:
        return truth.picture(query).read_bytes()
    except DataError:
        if (image := indexed_image(query, keys)) is None:
            raise
        return searcher.picture(image)


def indexed_image(query: GroundTruthQuery, keys: Mapping[int, str]) -> int | None:
    """The id of the indexed image whose key is the query's name, or that without leading folders; None without one."""
    parts = query.image.split("/")
    names = ("/".join(parts[number:]) for number in range(len(parts)))
    return next((image_id(name) for name in names if keys.get(image_id(name)) == name), None)
