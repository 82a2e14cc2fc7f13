"""Search of a published version: partitions answer, a searcher encodes queries, fuses and re-ranks. No Ray.

searcher = cbir.open("s3://indexes/landmarks")
for result in searcher.search("picture.jpg", depth=10):
    print(result.key, result.score)
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cbir.collection import Place, read_place
from cbir.config import Config, parse_config
from cbir.errors import DataError
from cbir.layout import Labels, Layout
from cbir.partition import Found, LocalFiles, Partition, Partitions
from cbir.queries import Box, QueryEncoder
from cbir.spec import nearest
from cbir.storage import Store, open_store
from cbir.types import FeatureBatch, Floats, Hits, Int64s
from cbir.versions import Manifest, Versions

__all__ = ["Answer", "Patience", "Picture", "Question", "Result", "Searcher", "open_version", "searcher_of"]

Picture = bytes | str | Path
"""The bytes of an image file, or its path."""

Question = Literal["search", "matches", "features", "signatures", "labels", "records", "keys"]
"""What can be asked: the search of `Partitions`, and the other methods of a `Partition`."""

_WAIT_UNTIL: Mapping[Question, float] = {"features": 0.9, "signatures": 0.9, "labels": 1.0, "records": 1.0}
"""Shares of a deadline until which answers are waited for; 0.8 for other questions."""


class Result(NamedTuple):
    """One result: the image's key, its final score, and its score in every channel that found it."""

    key: str
    score: float
    image_id: int
    height: int
    width: int
    channels: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """Everything about one batch of queries: final hits, hits by channel, raw query features, labels of the final hits,
    the version that all of them come from, the hits before they were re-ranked, and the seconds that re-ranking took.

    An answer is partial if it is without some partitions that did not answer before the deadline; `missing` has their
    numbers. It was not re-ranked to the end if what re-ranking reads was among what is missing.
    """

    hits: Hits
    by_channel: Mapping[str, Hits]
    query_features: Mapping[str, FeatureBatch]
    labels: Labels
    version: int
    candidates: Hits
    rerank_seconds: float
    missing: tuple[int, ...] = ()

    def results(self, query: int) -> list[Result]:
        """The ranked results of one query."""
        scores = {
            name: dict(zip(hits.image_ids[query].tolist(), hits.scores[query].tolist(), strict=True))
            for name, hits in self.by_channel.items()
        }
        ids, final = self.hits.image_ids[query].tolist(), self.hits.scores[query].tolist()
        return [self._result(i, score, scores) for i, score in zip(ids, final, strict=True) if i >= 0]

    def _result(self, image: int, score: float, scores: Mapping[str, Mapping[int, float]]) -> Result:
        key, (height, width) = self.labels.by_id[image]
        found = {name: by_image[image] for name, by_image in scores.items() if image in by_image}
        return Result(key, score, image, height, width, found)


class Patience:
    """How long one query waits for its partitions, and the numbers of those that it went on without, in `missing`.

    A query waits for hits until four fifths of its deadline, for what re-ranking reads until nine tenths, for the rows
    of its results until the end; but for each at least a tenth of the deadline, so that what took long in this process
    (a large picture, re-ranking) loses no answer that comes at once.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        if deadline_s is not None and not deadline_s > 0:
            raise ValueError(f"a deadline must be above 0 s, found {deadline_s}")
        self._deadline_s = math.inf if deadline_s is None else deadline_s
        self._begun = time.monotonic()
        self.missing: set[int] = set()

    def seconds(self, question: Question) -> float | None:
        """How long partitions may take to answer this question, from now; None without a deadline."""
        if math.isinf(self._deadline_s):
            return None
        left = self._begun + _WAIT_UNTIL.get(question, 0.8) * self._deadline_s - time.monotonic()
        return max(left, 0.1 * self._deadline_s)


class _GoneWithout(Exception):
    """What was asked for cannot be put together without the partitions that did not answer in time."""


class Searcher:
    """Answers queries from one version: encode, search every partition, merge, fuse, re-rank."""

    def __init__(self, manifest: Manifest, config: Config, encoder: QueryEncoder, parts: Sequence[Partition]):
        self.manifest, self.config = manifest, config
        self.encoder, self.partitions = encoder, list(parts)
        self._together = Partitions(dict(enumerate(parts)))
        layout = Layout.from_json(manifest.layout)
        backgrounds = {name: value for name, part in layout.channels.items() if (value := part.background) is not None}
        self._fusion = config.search.fuse.build(backgrounds) if config.search.fuse else None
        self._rerankers = [spec.build() for spec in config.search.rerank]
        self._edges = np.array([part.low for part in layout.partitions], np.int64)

    def search(
        self, query: Picture | Floats, depth: int = 10, box: Box | None = None, channel: str | None = None
    ) -> list[Result]:
        """The best `depth` images for one picture (a path or the bytes of an image file), or for a box in it.

        Or for one descriptor (D,) of a channel, as by `answer_vectors`.
        """
        if isinstance(query, np.ndarray):
            if box is not None:
                raise ValueError("a box is a part of a picture; a vector has none")
            return self.answer_vectors(query[None], depth, channel).results(0)
        if channel is not None:
            raise ValueError("a picture asks all channels; only a vector is of one")
        return self.answer([query], [box], depth).results(0)

    def answer(
        self,
        pictures: Sequence[Picture],
        boxes: Sequence[Box | None] | None = None,
        depth: int = 10,
        deadline_s: float | None = None,
    ) -> Answer:
        """The same for several pictures at once, with everything that was found on the way.

        With a deadline, in seconds from now, the answer goes without partitions that are late, and says so.
        """
        patience = Patience(deadline_s)
        data = [picture if isinstance(picture, bytes) else _read_picture(picture) for picture in pictures]
        raw = self.encoder.extract(data, boxes or [None] * len(data))
        return self.answer_features(raw, depth, patience)

    def answer_vectors(
        self, vectors: Floats, depth: int = 10, channel: str | None = None, deadline_s: float | None = None
    ) -> Answer:
        """The best images for descriptors (Q, D) of a channel, as its encoders make them of queries.

        Nothing is decoded, fused or re-ranked. The channel needs no name if it is the only one with one descriptor per
        image. DataError for a channel of local features, for another D, and for values that are not finite.
        """
        patience, name = Patience(deadline_s), self._channel_of_vectors(channel)
        found = self._found({name: self.encoder.asked(name, _one_row_each(vectors))}, depth, patience, depth)
        return self._answer(found.hits[name], found, {}, found.hits[name], 0.0, patience)

    def _channel_of_vectors(self, channel: str | None) -> str:
        """The channel that vectors are meant for."""
        able = [name for name, spec in self.config.channels.items() if not spec.index.local]
        if channel is None and len(able) == 1:
            return able[0]
        if channel in able:
            return str(channel)
        if not able:
            raise DataError("this index holds local features only, which no single vector can ask for; send a picture")
        if channel is None:
            raise DataError(f"this index has several channels; name the one of the vectors: {', '.join(able)}")
        if channel in self.config.channels:
            raise DataError(
                f"channel {channel!r} holds local features, which no single vector can ask for; send a picture, or use "
                f"{', '.join(able)}"
            )
        raise DataError(f"no channel {channel!r}{nearest(channel, able)}")

    def answer_features(self, raw: Mapping[str, FeatureBatch], depth: int, patience: Patience | None = None) -> Answer:
        """The same for raw features of the queries by channel."""
        patience = patience or Patience()
        candidates = max(depth, self.config.search.depth)
        is_final = len(raw) == 1 and not (self._fusion or self._rerankers)
        found = self._found(self.encoder.encode(raw), candidates, patience, depth if is_final else 0)
        fused = self._fusion.fuse(found.hits, candidates) if self._fusion else next(iter(found.hits.values()))
        begun = time.perf_counter()
        hits = self._reranked(fused, _Context(raw, self, patience))
        seconds = time.perf_counter() - begun
        if not is_final:
            found = Found(found.hits, self._labels(hits.image_ids[:, :depth], patience))
        return self._answer(_first(hits, depth), found, raw, _first(fused, depth), seconds, patience)

    def _reranked(self, hits: Hits, context: "_Context") -> Hits:
        """The hits after every reranker whose features came in time."""
        for reranker in self._rerankers:
            try:
                hits = reranker.rerank(hits, context)
            except _GoneWithout:
                break
        return hits

    def _answer(
        self,
        hits: Hits,
        found: Found,
        raw: Mapping[str, FeatureBatch],
        candidates: Hits,
        rerank_seconds: float,
        patience: Patience,
    ) -> Answer:
        """The answer with the labels of its images; without images whose labels did not come in time."""
        missing = tuple(sorted(patience.missing))
        if missing:
            known = np.isin(hits.image_ids, found.labels.image_ids)
            hits = Hits.ranked(np.where(known, hits.image_ids, -1), hits.scores, hits.image_ids.shape[1])
        version = self.manifest.version
        return Answer(hits, found.hits, raw, found.labels, version, candidates, rerank_seconds, missing)

    def channel_hits(
        self, encoded: Mapping[str, FeatureBatch], depth: int, patience: Patience | None = None
    ) -> dict[str, Hits]:
        """The best `depth` images of each channel over all partitions."""
        return dict(self._found(encoded, depth, patience or Patience()).hits)

    def _found(self, encoded: Mapping[str, FeatureBatch], depth: int, patience: Patience, labelled: int = 0) -> Found:
        """The same, with labels of the first `labelled` of each query."""
        encoded = self._damped(encoded, patience)
        return Found.merge(self._search(encoded, depth, labelled, patience), encoded, depth)

    def _search(
        self, encoded: Mapping[str, FeatureBatch], depth: int, labelled: int, patience: Patience
    ) -> list[Found]:
        """What `Partitions` find that are asked together; here all in this process.

        Those that do not answer in time are left out, and added to `patience.missing`.
        """
        wait_s = patience.seconds("search")
        end = math.inf if wait_s is None else time.monotonic() + wait_s
        found = self._together.search(encoded, depth, labelled, end)
        patience.missing |= found.missing
        return [found]

    def _damped(self, encoded: Mapping[str, FeatureBatch], patience: Patience) -> Mapping[str, FeatureBatch]:
        """Encoded queries, where an index damps what matches much, with the weights that follow from all partitions."""
        asked = {name: batch for name, batch in encoded.items() if self.config.channels[name].index.damps_matches}
        found = self._ask_all("matches", (asked,), patience) if asked else []
        if not found:
            return encoded
        matches = {name: np.sum([part[name] for part in found], axis=0) for name in asked}
        return {**encoded, **self.encoder.damped(asked, matches)}

    def features(self, channel: str, image_ids: Int64s, patience: Patience | None = None) -> FeatureBatch:
        """Stored features of any images, in this order."""
        return self._gather("features", channel, image_ids, patience or Patience())

    def signatures(self, channel: str, image_ids: Int64s, patience: Patience | None = None) -> FeatureBatch:
        """Stored signatures of any images, in this order."""
        return self._gather("signatures", channel, image_ids, patience or Patience())

    def _gather(self, question: Question, channel: str, image_ids: Int64s, patience: Patience) -> FeatureBatch:
        """What the partitions hold of these images, in this order."""
        groups = self._by_partition(image_ids) if len(image_ids) else {0: np.arange(0)}
        arguments = {number: (channel, image_ids[where]) for number, where in groups.items()}
        parts = self._ask(question, arguments, patience)
        if len(parts) < len(groups):
            raise _GoneWithout
        order = np.argsort(np.concatenate(list(groups.values())), kind="stable")
        return FeatureBatch.concatenate(parts[number] for number in groups).take(order)

    def _labels(self, image_ids: Int64s, patience: Patience) -> Labels:
        """What results show of these images (Q, R), of those whose partitions answer in time."""
        wanted = np.unique(image_ids[image_ids >= 0])
        arguments = {number: (wanted[where],) for number, where in self._by_partition(wanted).items()}
        return Labels.concatenate(list(self._ask("labels", arguments, patience).values()))

    def _ask_all(self, question: Question, arguments: tuple[Any, ...], patience: Patience) -> list[Any]:
        """What the partitions answer to one question, of those that answer in time."""
        return list(self._ask(question, dict.fromkeys(range(len(self._edges)), arguments), patience).values())

    def _ask(self, question: Question, arguments: Mapping[int, tuple[Any, ...]], patience: Patience) -> dict[int, Any]:
        """What partitions answer, by their number, as arguments are; here one after the other.

        Those that do not answer in time are left out, and added to `patience.missing`.
        """
        answers, wait_s = {}, patience.seconds(question)
        end = math.inf if wait_s is None else time.monotonic() + wait_s
        for number, given in arguments.items():
            if time.monotonic() > end:
                patience.missing.add(number)
            else:
                answers[number] = getattr(self.partitions[number], question)(*given)
        return answers

    def _by_partition(self, image_ids: Int64s) -> dict[int, Int64s]:
        """The positions of the images of each partition that has some."""
        owner = np.searchsorted(self._edges, image_ids, side="right") - 1
        return {int(number): np.flatnonzero(owner == number) for number in np.unique(owner)}

    def keys(self) -> dict[int, str]:
        """The key of every indexed image by its id."""
        return {image: key for keys in self._ask_all("keys", (), Patience()) for image, key in keys.items()}

    def picture(self, image: int) -> bytes:
        """The file of an indexed image, read again from the collection."""
        wanted = np.array([image], np.int64)
        (owner,) = self._by_partition(wanted)
        ((record,),) = self._ask("records", {owner: (wanted,)}, Patience()).values()
        return read_place(self.config.images[record["source"]], _place(record), self.config.input)


@dataclass(frozen=True)
class _Context:
    """The view of a searcher that a reranker gets."""

    raw: Mapping[str, FeatureBatch]
    searcher: Searcher
    patience: Patience

    def query_features(self, channel: str) -> FeatureBatch:
        return self.raw[channel]

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        return self.searcher.features(channel, image_ids, self.patience)

    def query_signatures(self, channel: str) -> FeatureBatch:
        return self.searcher.encoder.signatures(channel, self.raw[channel])

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        return self.searcher.signatures(channel, image_ids, self.patience)


def _first(hits: Hits, depth: int) -> Hits:
    return Hits(hits.image_ids[:, :depth], hits.scores[:, :depth])


def _one_row_each(vectors: Floats) -> FeatureBatch:
    """Query vectors (Q, D) as queries of one row each; DataError if they are none."""
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise DataError(f"query vectors must be numbers of shape (Q, D), found {vectors.dtype} {vectors.shape}")
    if vectors.dtype == np.float32:
        rows = np.ascontiguousarray(vectors)
    else:
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(rows).all():
        broken = np.flatnonzero(~np.isfinite(rows).all(1))
        raise DataError(f"query vector {broken[0]} has NaN or infinite values")
    return FeatureBatch.of_global(np.arange(len(rows)), rows)


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
