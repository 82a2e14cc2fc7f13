"""Search of a published version: partitions answer, a searcher encodes queries, fuses and re-ranks. No Ray.

searcher = cbir.open("s3://indexes/landmarks")
for result in searcher.search("picture.jpg", depth=10):
    print(result.key, result.score)
"""

import functools
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image
from safetensors.numpy import load as load_safetensors

from cbir.artifacts import StoredFile
from cbir.collection import Place, read_place
from cbir.config import Channel, Config, parse_config
from cbir.encoding.encoder import AsymmetricEncoder, Encoder
from cbir.errors import ArtifactError, DataError
from cbir.images import BadImage, Decoded, Limits, View, decode
from cbir.index.index import Index, SearchIndex
from cbir.layout import ChannelLayout, FeatureFile, IdMap, Layout, PartitionLayout
from cbir.storage import Store, open_store
from cbir.types import FeatureBatch, Hits, ImageBatch, Int64s
from cbir.versions import Manifest, Versions

__all__ = ["Answer", "Box", "LocalFiles", "Partition", "QueryEncoder", "Result", "Searcher", "open_version"]

T = TypeVar("T")

Box = tuple[float, float, float, float]
"""x, y, width, height in pixels of the upright original."""


class LocalFiles:
    """Files of a store as local files: in place for a local store, else fetched once into a cache by content."""

    def __init__(self, store: Store, manifest: Manifest, cache: Path | None = None) -> None:
        self.store = store
        self._files = {file.key: file for file in manifest.files}
        self._cache = cache or Path(os.environ.get("CBIR_CACHE", Path.home() / ".cache" / "cbir"))

    def path(self, key: str) -> Path:
        """The local file with the content of this key; its sha256 is checked when it is fetched, else its size."""
        file, local = self._files[key], self.store.local_path(key)
        if local is not None:
            _check_size(local, file)
            return local
        target = self._cache / f"{file.sha256}.{key.rsplit('.', 1)[-1]}"
        if not target.exists():
            self.store.fetch(key, target, file.sha256)
        return target

    def state(self, key: str) -> Mapping[str, np.ndarray[Any, Any]]:
        """The arrays of a safetensors file."""
        return load_safetensors(self.store.read(key, sha256=self._files[key].sha256))


def _check_size(path: Path, file: StoredFile) -> None:
    """ArtifactError for a file that was cut or grew: mapped as it is, it could end this process by a signal."""
    if (found := path.stat().st_size) != file.num_bytes:
        raise ArtifactError(f"{path} has {found} bytes, its record says {file.num_bytes}; run `cbir verify`")


class PartitionLike(Protocol):
    """What a searcher needs of a partition; the query pool has one whose partition lives in an actor."""

    @property
    def low(self) -> int:
        """The least image id that it can hold."""
        ...

    def search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Mapping[str, Hits]:
        """Hits by channel for encoded queries by channel."""
        ...

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of these images of this partition."""
        ...

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored signatures of these images of this partition."""
        ...

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The rows of the id map of these images."""
        ...

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition."""
        ...


class Partition:
    """One partition of one version, opened from its files."""

    def __init__(self, config: Config, layout: PartitionLayout, files: LocalFiles) -> None:
        self.low, self.high = layout.low, layout.high
        self.ids = IdMap(files.path(layout.ids))
        self.indexes: dict[str, SearchIndex] = {
            name: config.channels[name].index.load(*map(files.path, keys)) for name, keys in layout.indexes.items()
        }
        self._features = {name: FeatureFile(files.path(key)) for name, key in layout.features.items()}
        self._signatures = {name: FeatureFile(files.path(key)) for name, key in layout.signatures.items()}

    def search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Mapping[str, Hits]:
        """Hits by channel for encoded queries by channel."""
        return {name: self.indexes[name].search(batch, depth) for name, batch in queries.items()}

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of these images, in this order."""
        return self._features[channel].read(image_ids)

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored signatures of these images, in this order."""
        return self._signatures[channel].read(image_ids)

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The rows of the id map of these images, in this order."""
        rows: list[dict[str, Any]] = self.ids.rows(image_ids).to_pylist()
        return rows

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition."""
        return dict(zip(self.ids.image_ids.tolist(), self.ids.table.column("key").to_pylist(), strict=True))


class QueryEncoder:
    """Extracts and encodes query pictures with exactly the trained state of a version."""

    def __init__(self, config: Config, layout: Layout, files: LocalFiles, device: str = "cpu") -> None:
        self._channels = config.channels
        self._limits = config.limits
        self._describers = {
            name: channel.describer(device, _query_assets(layout.channels[name], files), regions=False)
            for name, channel in config.channels.items()
        }
        self._encoders: dict[str, list[Encoder]] = {
            name: restore_encoders(channel, layout.channels[name].encoders, files)
            for name, channel in config.channels.items()
        }
        self._indexes: dict[str, Index] = {
            name: channel.index.restore(files.state(layout.channels[name].index))
            for name, channel in config.channels.items()
            if channel.index.encodes_queries
        }

    def extract(self, pictures: Sequence[bytes], boxes: Sequence[Box | None]) -> dict[str, FeatureBatch]:
        """Raw features of the pictures by channel; DataError for a picture that cannot be decoded."""
        return {
            name: self._describers[name].describe(self._decoded(pictures, boxes, channel.extractor.view))
            for name, channel in self._channels.items()
        }

    def encode(self, features: Mapping[str, FeatureBatch]) -> dict[str, FeatureBatch]:
        """The form in which partitions are asked, by channel."""
        return {name: self._query(name, batch) for name, batch in features.items()}

    def _query(self, channel: str, batch: FeatureBatch) -> FeatureBatch:
        batch = encode_queries(self._encoders[channel], batch)
        index = self._indexes.get(channel)
        return batch if index is None else index.queries(batch)

    def signatures(self, channel: str, features: FeatureBatch) -> FeatureBatch:
        """Words and codes of raw features, each with as many words as the index assigns to queries."""
        encoded = encode_all(self._encoders[channel], features)
        return self._indexes[channel].signatures(encoded, self._channels[channel].index.query_words)

    def _decoded(self, pictures: Sequence[bytes], boxes: Sequence[Box | None], view: View) -> ImageBatch:
        images = [
            _decode_query(picture, box, view, self._limits, number)
            for number, (picture, box) in enumerate(zip(pictures, boxes, strict=True))
        ]
        return ImageBatch(
            np.arange(len(images), dtype=np.int64),
            [image.pixels for image in images],
            np.array([image.size for image in images], np.int32).reshape(-1, 2),
        )


def _query_assets(channel: ChannelLayout, files: LocalFiles) -> dict[str, Path]:
    """Local files of what sees queries; boxes are proposed in indexed images only."""
    return {name: files.path(key) for name, key in channel.assets.items() if not name.startswith("proposer.")}


def restore_encoders(channel: Channel, keys: Sequence[str], files: LocalFiles) -> list[Encoder]:
    """The trained encoders of a channel."""
    return [spec.restore(files.state(key)) for spec, key in zip(channel.encoders, keys, strict=True)]


def encode_all(encoders: Sequence[Encoder], batch: FeatureBatch) -> FeatureBatch:
    """The batch after every encoder in turn."""
    for encoder in encoders:
        batch = encoder.encode(batch)
    return batch


def encode_queries(encoders: Sequence[Encoder], batch: FeatureBatch) -> FeatureBatch:
    """The same for queries, which some encoders give another form."""
    for encoder in encoders:
        encode = encoder.encode_queries if isinstance(encoder, AsymmetricEncoder) else encoder.encode
        batch = encode(batch)
    return batch


def _decode_query(picture: bytes, box: Box | None, view: View, limits: Limits, number: int) -> Decoded:
    if box is not None:
        picture = _crop(picture, box, limits, number)
    return _decoded_or_error(decode(picture, view, limits), number)


def _crop(picture: bytes, box: Box, limits: Limits, number: int) -> bytes:
    """The box of the upright picture as PNG: a query is cropped before anything is resized."""
    whole = _decoded_or_error(decode(picture, View(size=1 << 20), limits), number)
    height, width = whole.size
    x, y, w, h = box
    left, top, right, bottom = max(round(x), 0), max(round(y), 0), min(round(x + w), width), min(round(y + h), height)
    if right <= left or bottom <= top:
        raise DataError(f"box {x:g},{y:g},{w:g},{h:g} lies outside the query picture of {width} x {height} pixels")
    buffer = io.BytesIO()
    Image.fromarray(whole.pixels[top:bottom, left:right]).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _decoded_or_error(result: Decoded | BadImage, number: int) -> Decoded:
    if isinstance(result, BadImage):
        raise DataError(f"query picture {number} cannot be used: {result.reason} ({result.detail})")
    return result


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
        found = self._ask([functools.partial(part.search, encoded, depth) for part in self.partitions])
        return {name: Hits.merge([hits[name] for hits in found], depth) for name in encoded}

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
