"""Two versions asked the same queries in turn: indexed images that both hold, or the queries of a ground truth."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from cbir.artifacts import find_done
from cbir.errors import CbirError, DataError
from cbir.evaluation.ground_truth import Box, GroundTruth, read_ground_truth
from cbir.evaluation.metrics import Quality, evaluate
from cbir.evaluation.side_by_side import (
    SHOWN_RESULTS,
    Asked,
    Side,
    SideBySide,
    differing_settings,
    write_side_by_side,
)
from cbir.search import Searcher
from cbir.storage import Store
from cbir.types import FEATURES_SCHEMA, FeatureBatch, Hits, Int64s, image_id
from pipelines.quality import RANKING_DEPTH, indexed_image, query_picture
from pipelines.reporting import thumbnail
from pipelines.tables import read_range

__all__ = ["Opened", "ask_ground_truth", "ask_indexed", "write_pictures"]

OnProgress = Callable[[int, int], None]
Ask = Callable[[int, bytes], Hits]
"""The answer to a query, of which the number and the picture are given; an index of vectors needs the number alone."""


@dataclass(frozen=True)
class Opened:
    """One of the two versions, by the name that it has in tables."""

    name: str
    store: Store
    searcher: Searcher

    @cached_property
    def keys(self) -> dict[int, str]:
        """The key of every indexed image by its id."""
        return self.searcher.keys()

    @property
    def has_pictures(self) -> bool:
        """Whether it was made of pictures, and not of vectors from elsewhere."""
        return self.searcher.config.input.format != "vectors"


@dataclass(frozen=True)
class _Query:
    """A query: its name, the indexed image that it is, if it is one, and the box in it."""

    name: str
    image: int | None
    box: Box | None = None


class _Answers:
    """What both find, query by query, and how long each takes; one is asked first at even queries, the other at odd."""

    def __init__(self, both: Sequence[Opened], queries: Sequence[_Query], depth: int) -> None:
        self._both, self._queries = both, queries
        self._asks = [_asking(side, queries, depth) for side in both]
        self.numbers: list[int] = []
        self.rankings: tuple[list[list[str]], list[list[str]]] = [], []
        self.seconds: tuple[list[float], list[float]] = [], []

    def ask(self, number: int, picture: bytes) -> None:
        """Ask both; the first time twice, because what is loaded then is not the query's time."""
        if not self.numbers:
            for ask in self._asks:
                ask(number, picture)
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            begun = time.perf_counter()
            hits = self._asks[side](number, picture)
            self.seconds[side].append(time.perf_counter() - begun)
            keys = self._both[side].keys
            self.rankings[side].append([keys[image] for image in hits.image_ids[0].tolist() if image >= 0])
        self.numbers.append(number)

    def side(self, number: int, quality: Quality | None) -> Side:
        """One of the two, with what was measured."""
        opened, manifest = self._both[number], self._both[number].searcher.manifest
        return Side(
            opened.name,
            manifest.version,
            manifest.created,
            dict(manifest.counts),
            sum(file.num_bytes for file in manifest.files),
            1000 * float(np.median(self.seconds[number])),
            _measured(quality) if quality is not None else {},
            _recorded(manifest.quality),
            self._finds_itself(number) if quality is None else None,
        )

    def _finds_itself(self, side: int) -> float:
        names = [self._queries[number].name for number in self.numbers]
        return float(np.mean([ranking[:1] == [name] for ranking, name in zip(self.rankings[side], names, strict=True)]))

    def asked(self, junk: Sequence[frozenset[str]]) -> list[Asked]:
        """Every query with its first results, without what is junk to it."""
        queries = [self._queries[number] for number in self.numbers]
        return [
            Asked(query.name, query.image, query.box, (_shown(first, ignored), _shown(second, ignored)))
            for query, first, second, ignored in zip(queries, *self.rankings, junk, strict=True)
        ]


def _shown(ranking: Sequence[str], junk: frozenset[str]) -> tuple[str, ...]:
    return tuple(key for key in ranking if key not in junk)[:SHOWN_RESULTS]


def _asking(side: Opened, queries: Sequence[_Query], depth: int) -> Ask:
    """What asks one side: with pictures, or an index of vectors with those that its build kept."""
    searcher = side.searcher
    if side.has_pictures:
        return lambda number, picture: searcher.answer([picture], [queries[number].box], depth).hits
    unknown = next((query.name for query in queries if query.image not in side.keys), None)
    if unknown is not None:
        raise DataError(f"{side.name} was made of vectors, and none of an image {unknown!r}; ask for indexed images")
    ids = np.array([query.image for query in queries], np.int64)
    raw = {channel: _kept_vectors(side, channel, ids) for channel in searcher.config.channels}

    def ask(number: int, _picture: bytes) -> Hits:
        only = np.array([number])
        return searcher.answer_features({name: batch.take(only) for name, batch in raw.items()}, depth).hits

    return ask


def _kept_vectors(side: Opened, channel: str, ids: Int64s) -> FeatureBatch:
    """The vectors of these images in this order, as a build took them over; DataError if it no longer has them."""
    low, high = int(ids.min()), int(ids.max()) + 1
    batches = []
    for prefix in side.searcher.manifest.work:
        _, stage, identity, _ = prefix.split("/")
        done = find_done(side.store, stage, identity) if stage == "extract" else None
        if done is not None and done.facts["channel"] == channel:
            batch = FeatureBatch.from_arrow(
                read_range(side.store, done.file("features"), low, high, FEATURES_SCHEMA.names)
            )
            batches.append(batch.take(np.flatnonzero(np.isin(batch.image_ids, ids))))
    found = FeatureBatch.concatenate(batches) if batches else None
    if found is None or len(np.intersect1d(found.image_ids, ids)) < len(np.unique(ids)):
        raise DataError(
            f"{side.name} was made of vectors, but the files of its build that hold them are gone, so that it cannot "
            "be asked; run its `cbir index` again, or compare indexes of pictures"
        )
    order = np.argsort(found.image_ids, kind="stable")
    return found.take(order[np.searchsorted(found.image_ids[order], ids)])


def ask_indexed(both: Sequence[Opened], count: int, on_progress: OnProgress) -> SideBySide:
    """Ask with `count` images that both hold, drawn by chance, whose pictures are read again from the collection.

    Indexes of vectors are asked with the vectors that their builds kept. DataError if nothing can be asked.
    """
    names = both[0].keys
    queries = [_Query(names[image], image) for image in _drawn(both, count).tolist()]
    answers, reason = _Answers(both, queries, SHOWN_RESULTS + 1), ""
    for number, query in enumerate(queries):
        try:
            picture = _collected(both, query)
        except (CbirError, OSError) as error:
            reason = str(error)
        else:
            answers.ask(number, picture)
        on_progress(number + 1, len(queries))
    if not answers.numbers:
        raise DataError(
            f"none of {len(queries)} images that both versions hold can be read again ({reason}); give "
            "--ground-truth FILE with pictures beside it"
        )
    junk = [frozenset([queries[number].name]) for number in answers.numbers]
    sides = answers.side(0, None), answers.side(1, None)
    found = _beside(both, sides, answers.asked(junk), None)
    return replace(found, unreadable=len(queries) - len(answers.numbers))


def _drawn(both: Sequence[Opened], count: int) -> Int64s:
    """Ids that follow each other: ids are hashes of keys, so these are images by chance, and lie together in files."""
    common = np.array(sorted(both[0].keys.keys() & both[1].keys.keys()), np.int64)
    if not len(common):
        raise DataError(f"{both[0].name} and {both[1].name} have no image in common; give --ground-truth FILE")
    count = min(count, len(common))
    start = int(np.random.default_rng(0).integers(len(common) - count + 1))
    return common[start : start + count]


def _collected(both: Sequence[Opened], query: _Query) -> bytes:
    """The picture of an indexed image, of whichever collection still has it; nothing where no side asks with one."""
    assert query.image is not None
    able = [side for side in both if side.has_pictures]
    for side in able[:-1]:
        try:
            return side.searcher.picture(query.image)
        except (CbirError, OSError):
            continue
    return able[-1].searcher.picture(query.image) if able else b""


def ask_ground_truth(both: Sequence[Opened], path: str, on_progress: OnProgress) -> SideBySide:
    """Ask the queries of a ground truth over both whole indexes, up to 10,000 results, and judge the answers.

    DataError if a query's picture is neither beside the file nor indexed.
    """
    protocol = both[1].searcher.config.evaluate.protocol
    truths = [read_ground_truth(path, protocol).resolved(frozenset(side.keys.values())) for side in both]
    queries = [_Query(query.image, indexed_image(query, both[0].keys), query.box) for query in truths[0].queries]
    depth = min(max(len(side.keys) for side in both), RANKING_DEPTH)
    answers, able = _Answers(both, queries, depth), next((side for side in both if side.has_pictures), None)
    for number, asked in enumerate(truths[0].queries):
        picture = query_picture(able.searcher, truths[0], asked, able.keys) if able is not None else b""
        answers.ask(number, picture)
        on_progress(number + 1, len(queries))
    qualities = [evaluate(ranking, truth) for ranking, truth in zip(answers.rankings, truths, strict=True)]
    junk = [one.junk | other.junk for one, other in zip(*(truth.queries for truth in truths), strict=True)]
    sides = answers.side(0, qualities[0]), answers.side(1, qualities[1])
    return _beside(both, sides, _judged(answers.asked(junk), truths, qualities), truths[0].name)


def _judged(asked: Sequence[Asked], truths: Sequence[GroundTruth], qualities: Sequence[Quality]) -> Sequence[Asked]:
    """The queries with what the ground truth says of their answers; nothing of those without a right answer."""
    first, second = ({q.position: q.average_precision for q in quality.queries} for quality in qualities)
    judged = list(asked)
    for number in first.keys() & second.keys():
        right = truths[0].queries[number].positives | truths[1].queries[number].positives
        shown = dict.fromkeys(key for keys in asked[number].results for key in keys if key in right)
        precisions = first[number], second[number]
        judged[number] = replace(asked[number], average_precision=precisions, right=tuple(shown))
    return judged


def _beside(
    both: Sequence[Opened], sides: tuple[Side, Side], asked: Sequence[Asked], ground_truth: str | None
) -> SideBySide:
    first, second = both
    settings = differing_settings(*(side.searcher.config.model_dump(mode="json") for side in both))
    return SideBySide(sides, tuple(asked), settings, len(first.keys.keys() & second.keys.keys()), ground_truth)


def _measured(quality: Quality) -> dict[str, float]:
    return {
        "mAP": quality.mean_average_precision(),
        "mP@10": quality.mean_precision_at(10),
        "recall@1": quality.recall_at(1),
        "recall@10": quality.recall_at(10),
    }


def _recorded(quality: Mapping[str, object]) -> dict[str, float]:
    """What a build measured: against its ground truth, and of what exact search finds."""
    found = {name: quality[key] for name, key in (("mAP", "map"), ("recall@1", "recall_at_1")) if key in quality}
    recalls = quality.get("ann_recall")
    for channel, by_depth in recalls.items() if isinstance(recalls, Mapping) else ():
        found |= {f"recall@{k} of exact search, {channel}": recall for k, recall in by_depth.items() if k == "10"}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def write_pictures(page: Path, both: Sequence[Opened], found: SideBySide, ground_truth: str | None) -> None:
    """Write the page, with pictures where the collections still have them."""
    truth = read_ground_truth(ground_truth) if ground_truth is not None else None

    def picture(key: str) -> bytes | None:
        return next(_thumbnails(both, image_id(key), None), None)

    def query_thumbnail(asked: Asked) -> bytes | None:
        if truth is not None and (beside := _beside_truth(both[0], truth, asked)) is not None:
            return beside
        return next(_thumbnails(both, asked.image, asked.box), None)

    write_side_by_side(page, found, picture, query_thumbnail)


def _thumbnails(both: Sequence[Opened], image: int | None, box: Box | None) -> Iterator[bytes]:
    """The small picture of an indexed image, of every side that can read it."""
    for side in both:
        if side.has_pictures and image in side.keys:
            try:
                small = thumbnail(side.searcher.picture(image), side.searcher, box)
            except (CbirError, OSError):
                continue
            if small is not None:
                yield small


def _beside_truth(side: Opened, truth: GroundTruth, asked: Asked) -> bytes | None:
    query = next(query for query in truth.queries if (query.image, query.box) == (asked.name, asked.box))
    try:
        return thumbnail(truth.picture(query).read_bytes(), side.searcher, asked.box)
    except (CbirError, OSError):
        return None
