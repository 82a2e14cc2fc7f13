"""Stage `extract`: one image shard and one channel -> features, and a quarantine row for every image without.

Reading, decoding (in a child process) and the device overlap inside the worker; memory is bounded by a few batches.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from cbir.artifacts import Done
from cbir.collection import ImageShard, InputSpec, RawImage, read_images
from cbir.config import Config
from cbir.images import BadImage, Decoded, Limits
from cbir.layout import IDS_SCHEMA
from cbir.spec import fingerprint
from cbir.types import FeatureBatch, ImageBatch, image_id
from pipelines.tables import QUARANTINE_SCHEMA, ShardWriter, sorted_table, write_parquet
from pipelines.work import ChannelWork, Task, Worker

__all__ = ["NO_IMAGES", "ExtractTask"]


@dataclass(frozen=True)
class ExtractTask(Task):
    """Extract the features of one shard for one channel."""

    stage: ClassVar[str] = "extract"
    shard: ImageShard
    work: ChannelWork
    limits: Limits
    input: InputSpec
    source: int

    @classmethod
    def of(cls, shard: ImageShard, work: ChannelWork, config: Config) -> "ExtractTask":
        """The task of this shard and channel; its fingerprint covers the pixels and everything done to them."""
        source = config.images.index(shard.source)
        view = work.channel.extractor.view
        made_of = (work.extractor_identity(), view.model_dump(), config.limits.model_dump(), work.name)
        identity = fingerprint("extract", *made_of, source, shard.name, shard.fingerprint)
        return cls(f"{shard.name} [{work.name}]", identity, shard, work, config.limits, config.input, source)

    @property
    def weight(self) -> int:
        """Bytes of images."""
        return self.shard.num_bytes

    def run(self, worker: Worker) -> Done:
        """Read, decode, extract, write."""
        spec, describer = self.work.channel.extractor, worker.describer(self.work)
        writer = ShardWriter(worker.scratch("features.arrow"))
        bad: list[dict[str, Any]] = []
        num_bytes = num_features = num_regions = 0
        for images in _batches(self._decoded(worker, bad), spec.batch_size):
            batch = ImageBatch(
                np.array([image_id(raw.key) for raw, _, _ in images], np.int64),
                [decoded.pixels for _, _, decoded in images],
                np.array([decoded.size for _, _, decoded in images], np.int32),
            )
            with worker.timer.phase("device"):
                features = describer.describe(batch)
            num_bytes += sum(raw.size for raw, _, _ in images)
            num_features += len(features.descriptors)
            num_regions += len(features.regions.boxes) if features.regions is not None else 0
            with worker.timer.phase("write"):
                rows = [self._row(raw, digest, decoded) for raw, digest, decoded in images]
                writer.add(features, pa.Table.from_pylist(rows, schema=IDS_SCHEMA))
        counts = {"features": num_features, "bytes": num_bytes + sum(row["num_bytes"] for row in bad)}
        if self.work.channel.proposer is not None:
            counts["regions"] = num_regions
        return self.commit(worker, writer, describer.describe(NO_IMAGES), bad, counts)

    def _decoded(self, worker: Worker, bad: list[dict[str, Any]]) -> Iterator[tuple[RawImage, bytes, Decoded]]:
        decoder = worker.decoder(self.work.channel.extractor.view, self.limits)
        decoded = decoder.map(self._raw(worker, bad))
        while True:
            with worker.timer.phase("decode"):
                item = next(decoded, None)
            if item is None:
                return
            (raw, digest), result = item
            if isinstance(result, BadImage):
                bad.append(self.quarantined(raw, result.reason, result.detail))
            else:
                yield raw, digest, result

    def _raw(self, worker: Worker, bad: list[dict[str, Any]]) -> Iterator[tuple[tuple[RawImage, bytes], bytes]]:
        images = read_images(self.shard, self.input, int(self.limits.megabytes * 1e6))
        while True:
            with worker.timer.phase("read"):
                raw = next(images, None)
            if raw is None:
                return
            if raw.data is None:
                bad.append(self.quarantined(raw, "too_many_bytes", f"over {self.limits.megabytes:g} MB"))
            else:
                yield (replace(raw, data=None), hashlib.sha256(raw.data).digest()), raw.data

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

    def _row(self, raw: RawImage, digest: bytes, decoded: Decoded) -> dict[str, Any]:
        return {
            "image_id": image_id(raw.key),
            "key": raw.key,
            "content_sha256": digest,
            "source": self.source,
            "kind": raw.at.kind,
            "object": raw.at.object,
            "start": raw.at.start,
            "num_bytes": raw.size,
            "height": decoded.size[0],
            "width": decoded.size[1],
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


_BOX_BYTES = 16

NO_IMAGES = ImageBatch(np.empty(0, np.int64), [], np.empty((0, 2), np.int32))


def _batches(
    items: Iterator[tuple[RawImage, bytes, Decoded]], size: int
) -> Iterator[list[tuple[RawImage, bytes, Decoded]]]:
    while batch := list(islice(items, size)):
        yield batch
