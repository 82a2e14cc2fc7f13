"""Search of a published version: partitions answer, a searcher encodes queries, fuses and re-ranks. No Ray.

searcher = cbir.open("s3://indexes/landmarks")
for result in searcher.search("picture.jpg", depth=10):
    print(result.key, result.score)
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cbir.collection import Place, read_place
from cbir.config import Config, parse_config
from cbir.errors import DataError
from cbir.layout import Layout
from cbir.partition import LocalFiles, Partition, PartitionLike
from cbir.queries import Box, QueryEncoder
from cbir.storage import Store, open_store
from cbir.types import FeatureBatch, Hits, Int64s
from cbir.versions import Manifest, Versions

__all__ = ["Answer", "Result", "Searcher", "open_version", "searcher_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One result: the image's key, its final score, and its score in every channel that found it."""

    key: str
    score: float
    image_id: int
    height: int
    width: int
    channels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Everything about one batch of queries: final hits, hits by channel, raw query features, rows of the id map, the
    version that all of them come from, the hits before they were re-ranked, and the seconds that re-ranking took."""

    hits: Hits
    by_channel: Mapping[str, Hits]
    query_features: Mapping[str, FeatureBatch]
    records: Mapping[int, Mapping[str, Any]]
    version: int
    candidates: Hits
    rerank_seconds: float

    def results(self, query: int) -> list[Result]:
        """The ranked results of one query."""
        scores = {
            name: dict(zip(hits.image_ids[query].tolist(), hits.scores[query].tolist(), strict=True))
            for name, hits in self.by_channel.items()
        }
        ids, final = self.hits.image_ids[query].tolist(), self.hits.scores[query].tolist()
        return [self._result(i, score, scores) for i, score in zip(ids, final, strict=True) if i >= 0]

    def _result(self, image: int, score: float, scores: Mapping[str, Mapping[int, float]]) -> Result:
        record = self.records[image]
        return Result(
            key=record["key"],
            score=score,
            image_id=image,
            height=record["height"],
            width=record["width"],
            channels={name: found[image] for name, found in scores.items() if image in found},
        )


class Searcher:
    """Answers queries from one version: encode, search every partition, merge, fuse, re-rank."""

    def __init__(self, manifest: Manifest, config: Config, encoder: QueryEncoder, parts: Sequence[PartitionLike]):
        self.manifest, self.config = manifest, config
        self.encoder, self.partitions = encoder, list(parts)
        channels = Layout.from_json(manifest.layout).channels
        backgrounds = {name: value for name, part in channels.items() if (value := part.background) is not None}
        self._fusion = config.search.fuse.build(backgrounds) if config.search.fuse else None
        self._rerankers = [spec.build() for spec in config.search.rerank]
        self._edges = np.array([part.low for part in parts], np.int64)

    def search(self, picture: bytes | str | Path, depth: int = 10, box: Box | None = None) -> list[Result]:
        """The best `depth` images for one picture (a path or the bytes of an image file), or for a box in it."""
        return self.answer([picture], [box], depth).results(0)

    def answer(
        self, pictures: Sequence[bytes | str | Path], boxes: Sequence[Box | None] | None = None, depth: int = 10
    ) -> Answer:
        """The same for several pictures at once, with everything that was found on the way."""
        data = [picture if isinstance(picture, bytes) else _read_picture(picture) for picture in pictures]
        raw = self.encoder.extract(data, boxes or [None] * len(data))
        return self.answer_features(raw, depth)

    def answer_features(self, raw: Mapping[str, FeatureBatch], depth: int) -> Answer:
        """The same for raw features of the queries by channel."""
        candidates = max(depth, self.config.search.depth)
        by_channel = self.channel_hits(self.encoder.encode(raw), candidates)
        fused = self._fusion.fuse(by_channel, candidates) if self._fusion else next(iter(by_channel.values()))
        hits, context, begun = fused, _Context(raw, self), time.perf_counter()
        for reranker in self._rerankers:
            hits = reranker.rerank(hits, context)
        seconds = time.perf_counter() - begun
        best = _first(hits, depth)
        records = self._records(best.image_ids)
        return Answer(best, by_channel, raw, records, self.manifest.version, _first(fused, depth), seconds)

    def channel_hits(self, encoded: Mapping[str, FeatureBatch], depth: int) -> dict[str, Hits]:
        """The best `depth` images of each channel over all partitions."""
        encoded = self._damped(encoded)
        found = self._ask([functools.partial(part.search, encoded, depth) for part in self.partitions])
        return {name: Hits.merge([hits[name] for hits in found], depth) for name in encoded}

    def _damped(self, encoded: Mapping[str, FeatureBatch]) -> Mapping[str, FeatureBatch]:
        """Encoded queries, where an index damps what matches much, with the weights that follow from all partitions."""
        asked = {name: batch for name, batch in encoded.items() if self.config.channels[name].index.damps_matches}
        if not asked:
            return encoded
        found = self._ask([functools.partial(part.matches, asked) for part in self.partitions])
        matches = {name: np.sum([part[name] for part in found], axis=0) for name in asked}
        return {**encoded, **self.encoder.damped(asked, matches)}

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of any images, in this order."""
        return self._gather([part.features for part in self.partitions], channel, image_ids)

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored signatures of any images, in this order."""
        return self._gather([part.signatures for part in self.partitions], channel, image_ids)

    def _gather(
        self, readers: Sequence[Callable[[str, Int64s], FeatureBatch]], channel: str, image_ids: Int64s
    ) -> FeatureBatch:
        """What the partitions hold of these images, in this order."""
        if not len(image_ids):
            return readers[0](channel, image_ids)
        groups = self._by_partition(image_ids)
        parts = self._ask([functools.partial(readers[n], channel, image_ids[where]) for n, where in groups])
        order = np.argsort(np.concatenate([where for _, where in groups]), kind="stable")
        return FeatureBatch.concatenate(parts).take(order)

    def _records(self, image_ids: Int64s) -> dict[int, Mapping[str, Any]]:
        wanted = np.unique(image_ids[image_ids >= 0])
        groups = self._by_partition(wanted)
        found = self._ask([functools.partial(self.partitions[n].records, wanted[where]) for n, where in groups])
        return {row["image_id"]: row for rows in found for row in rows}

    def _ask(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of calls to partitions, in their order; here one call after the other."""
        return [call() for call in calls]

    def _by_partition(self, image_ids: Int64s) -> list[tuple[int, Int64s]]:
        owner = np.searchsorted(self._edges, image_ids, side="right") - 1
        return [(int(number), np.flatnonzero(owner == number)) for number in np.unique(owner)]

    def keys(self) -> dict[int, str]:
        """The key of every indexed image by its id."""
        return {
            image: key for keys in self._ask([part.keys for part in self.partitions]) for image, key in keys.items()
        }

    def picture(self, image: int) -> bytes:
        """The file of an indexed image, read again from the collection."""
        record = self._records(np.array([image], np.int64))[image]
        return read_place(self.config.images[record["source"]], _place(record), self.config.input)


@dataclass(frozen=True)
class _Context:
    """The view of a searcher that a reranker gets."""

    raw: Mapping[str, FeatureBatch]
    searcher: Searcher

    def query_features(self, channel: str) -> FeatureBatch:
        return self.raw[channel]

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        return self.searcher.features(channel, image_ids)

    def query_signatures(self, channel: str) -> FeatureBatch:
        return self.searcher.encoder.signatures(channel, self.raw[channel])

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        return self.searcher.signatures(channel, image_ids)


def _first(hits: Hits, depth: int) -> Hits:
    return Hits(hits.image_ids[:, :depth], hits.scores[:, :depth])


def _place(record: Mapping[str, Any]) -> Place:
    return Place(record["kind"], record["object"], record["start"], record["num_bytes"])


def _read_picture(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the query picture {path}: {error.strerror}") from None


def open_version(uri: str, version: int | None = None, device: str = "cpu") -> Searcher:
    """Open a published version of a store, the current one by default, for search in this process."""
    store = open_store(uri)
    return searcher_of(store, Versions(store).load(version), device)


def searcher_of(store: Store, manifest: Manifest, device: str = "cpu") -> Searcher:
    """A searcher with all partitions of this manifest in this process."""
    config = parse_config(manifest.config, f"version {manifest.version} of {store.uri}")
    layout, files = Layout.from_json(manifest.layout), LocalFiles(store, manifest)
    partitions = [Partition(config, part, files) for part in layout.partitions]
    return Searcher(manifest, config, QueryEncoder(config, layout, files, device), partitions)
