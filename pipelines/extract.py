"""Stage `extract`: one image shard and one channel -> features, and a quarantine row for every image without.

Reading, decoding (in a child process) and the device overlap inside the worker; memory is bounded by a few batches.
Images that an earlier version knows are neither decoded nor described again.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from cbir.artifacts import Done
from cbir.collection import ImageShard, InputSpec, RawImage, read_images
from cbir.config import Config
from cbir.features.describer import Describer
from cbir.images import BadImage, Decoded, Limits
from cbir.layout import IDS_SCHEMA
from cbir.spec import fingerprint
from cbir.types import FeatureBatch, ImageBatch, image_id
from pipelines.known import KnownImages
from pipelines.tables import QUARANTINE_SCHEMA, ShardWriter, sorted_table, write_parquet
from pipelines.work import Asset, ChannelWork, Task, Worker

__all__ = ["NO_IMAGES", "ExtractTask", "described_by"]


def described_by(work: ChannelWork, config: Config) -> tuple[Any, ...]:
    """What identifies how the images of a channel become features."""
    view = work.channel.extractor.view
    return work.extractor_identity(), view.model_dump(), config.limits.model_dump(), work.name


@dataclass(frozen=True)
class ExtractTask(Task):
    """Extract the features of one shard for one channel."""

    stage: ClassVar[str] = "extract"
    shard: ImageShard
    work: ChannelWork
    limits: Limits
    input: InputSpec
    source: int
    earlier: Asset | None = None
    """Which work knows images of this shard, if any does, as `KnownImages.of` reads it."""

    @classmethod
    def of(cls, shard: ImageShard, work: ChannelWork, config: Config) -> "ExtractTask":
        """The task of this shard and channel; its fingerprint covers the pixels and everything done to them."""
        source = config.images.index(shard.source)
        identity = fingerprint("extract", *described_by(work, config), source, shard.name, shard.fingerprint)
        return cls(f"{shard.name} [{work.name}]", identity, shard, work, config.limits, config.input, source)

    @property
    def weight(self) -> int:
        """Bytes of images."""
        return self.shard.num_bytes

    def run(self, worker: Worker) -> Done:
        """Read, decode, extract, write."""
        describer = worker.describer(self.work)
        writer = ShardWriter(worker.scratch("features.arrow"))
        found = _Found()
        for features, rows in itertools.chain(self._described(worker, describer, found), self._recalled(worker, found)):
            found.num_features += len(features.descriptors)
            found.num_regions += len(features.regions.boxes) if features.regions is not None else 0
            found.num_bytes += sum(row["num_bytes"] for row in rows)
            with worker.timer.phase("write"):
                writer.add(features, pa.Table.from_pylist(rows, schema=IDS_SCHEMA))
        counts = {"features": found.num_features, "bytes": found.num_bytes + sum(row["num_bytes"] for row in found.bad)}
        if self.work.channel.proposer is not None:
            counts["regions"] = found.num_regions
        return self.commit(worker, writer, describer.describe(NO_IMAGES), found.bad, counts)

    def _described(self, worker: Worker, describer: Describer, found: "_Found") -> Iterator["_Described"]:
        """The features of the images that nobody knows, with their rows of the id map."""
        for images in _batches(self._decoded(worker, found), self.work.channel.extractor.batch_size):
            batch = ImageBatch(
                np.array([image_id(raw.key) for raw, _, _ in images], np.int64),
                [decoded.pixels for _, _, decoded in images],
                np.array([decoded.size for _, _, decoded in images], np.int32),
            )
            with worker.timer.phase("device"):
                features = describer.describe(batch)
            worker.tally["described"] += len(images)
            yield features, [self._row(raw, digest, decoded.size) for raw, digest, decoded in images]

    def _recalled(self, worker: Worker, found: "_Found") -> Iterator["_Described"]:
        """The same of those that an earlier version knows."""
        known, ids = KnownImages.of(worker, self.earlier), np.fromiter(found.known, np.int64, len(found.known))
        owners = np.fromiter((owner for _, _, owner in found.known.values()), np.int32, len(ids))
        batches = known.features(worker.store, ids, owners)
        while True:
            with worker.timer.phase("read"):
                features = next(batches, None)
            if features is None:
                return
            worker.tally["recalled"] += len(features)
            images = zip(features.image_ids.tolist(), features.sizes.tolist(), strict=True)
            yield features, [self._row(*found.known[image][:2], size) for image, size in images]

    def _decoded(self, worker: Worker, found: "_Found") -> Iterator[tuple[RawImage, bytes, Decoded]]:
        decoder = worker.decoder(self.work.channel.extractor.view, self.limits)
        decoded = decoder.map(self._unknown(worker, found))
        while True:
            with worker.timer.phase("decode"):
                item = next(decoded, None)
            if item is None:
                return
            (raw, digest), result = item
            if isinstance(result, BadImage):
                found.bad.append(self.quarantined(raw, result.reason, result.detail))
            else:
                yield raw, digest, result

    def _unknown(self, worker: Worker, found: "_Found") -> Iterator[tuple[tuple[RawImage, bytes], bytes]]:
        """The images to decode; those that are known are noted, those that are too large quarantined."""
        known = KnownImages.of(worker, self.earlier)
        images = read_images(self.shard, self.input, int(self.limits.megabytes * 1e6))
        while True:
            with worker.timer.phase("read"):
                raw = next(images, None)
            if raw is None:
                return
            if raw.data is None:
                found.bad.append(self.quarantined(raw, "too_many_bytes", f"over {self.limits.megabytes:g} MB"))
                continue
            digest, image = hashlib.sha256(raw.data).digest(), image_id(raw.key)
            owner = known.owners(np.array([image]), np.array([digest], "S32"))[0]
            if owner < 0:
                yield (replace(raw, data=None), digest), raw.data
            else:
                found.known[image] = replace(raw, data=None), digest, owner

    def quarantined(self, raw: RawImage, reason: str, detail: str) -> dict[str, Any]:
        """The row of the ledger for an image that cannot be used."""
        return {
            "image_id": image_id(raw.key),
            "key": raw.key,
            "channel": self.work.name,
            "shard": self.shard.name,
            "source": self.source,
            "kind": raw.at.kind,
            "object": raw.at.object,
            "start": raw.at.start,
            "reason": reason,
            "detail": detail,
            "num_bytes": raw.size,
        }

    def _row(self, raw: RawImage, digest: bytes, size: Sequence[int]) -> dict[str, Any]:
        return {
            "image_id": image_id(raw.key),
            "key": raw.key,
            "content_sha256": digest,
            "source": self.source,
            "kind": raw.at.kind,
            "object": raw.at.object,
            "start": raw.at.start,
            "num_bytes": raw.size,
            "height": size[0],
            "width": size[1],
        }

    def commit(
        self,
        worker: Worker,
        writer: ShardWriter,
        empty: FeatureBatch,
        bad: list[dict[str, Any]],
        counts: dict[str, int],
    ) -> Done:
        """Write what was found, and the record."""
        features, quarantine = worker.scratch("features.parquet"), worker.scratch("quarantine.parquet")
        with worker.timer.phase("write"):
            ids = writer.finish(features, empty)
            write_parquet(quarantine, sorted_table(pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)))
        files = [
            self.put(worker, "features", features, "parquet"),
            self.put(worker, "quarantine", quarantine, "parquet"),
        ]
        counts = {
            "images": ids.num_rows + len(bad),
            "indexed": ids.num_rows,
            "quarantined": len(bad),
            **counts,
        }
        row_bytes = empty.descriptors.shape[1] * empty.descriptors.itemsize + empty.geometry.shape[1] * 4
        feature_bytes = counts["features"] * row_bytes + counts.get("regions", 0) * _BOX_BYTES
        facts = {"channel": self.work.name, "feature_bytes": feature_bytes}
        return self.finish(worker, files, counts, facts)


_Described = tuple[FeatureBatch, list[dict[str, Any]]]
"""Features, and for every image its row of the id map."""


@dataclass
class _Found:
    """What a shard has shown so far: ledger rows of unusable images, known images by id with the sha256 of their bytes
    and the number of the shard that knows them, and sums over the rest."""

    bad: list[dict[str, Any]] = field(default_factory=list)
    known: dict[int, tuple[RawImage, bytes, int]] = field(default_factory=dict)
    num_bytes: int = 0
    num_features: int = 0
    num_regions: int = 0


_BOX_BYTES = 16

NO_IMAGES = ImageBatch(np.empty(0, np.int64), [], np.empty((0, 2), np.int32))


def _batches(
    items: Iterator[tuple[RawImage, bytes, Decoded]], size: int
) -> Iterator[list[tuple[RawImage, bytes, Decoded]]]:
    while batch := list(islice(items, size)):
        yield batch
