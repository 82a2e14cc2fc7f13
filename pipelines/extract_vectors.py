"""Stage `extract` where vectors take the place of images: one Parquet file and one channel -> features."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cbir.artifacts import Done
from cbir.collection import Place, RawImage, VectorRows, read_vectors
from cbir.features.vectors import Vectors
from cbir.layout import IDS_SCHEMA
from cbir.types import FeatureBatch, image_id
from pipelines.extract import NO_IMAGES, ExtractTask
from pipelines.tables import ShardWriter
from pipelines.work import Worker

__all__ = ["VectorsTask"]


@dataclass(frozen=True)
class VectorsTask(ExtractTask):
    """Take over the vectors of one shard for one channel."""

    def run(self, worker: Worker) -> Done:
        """Read, check, write."""
        spec, describer = self.work.channel.extractor, worker.describer(self.work)
        assert isinstance(spec, Vectors)
        writer = ShardWriter(worker.scratch("features.arrow"))
        bad: list[dict[str, Any]] = []
        found, num_features, num_bytes = read_vectors(self.shard, self.input, spec.dim, spec.dtype), 0, 0
        while True:
            with worker.timer.phase("read"):
                rows = next(found, None)
            if rows is None:
                break
            bad += [self._unusable(rows, row, reason) for row, reason in enumerate(rows.reasons) if reason]
            good = np.flatnonzero(np.array([not reason for reason in rows.reasons], np.bool_))
            with worker.timer.phase("write"):
                ids = self._ids(rows, good)
                writer.add(FeatureBatch.of_global(ids.column("image_id").to_numpy(), rows.vectors[good]), ids)
            num_features += len(good)
            num_bytes += len(rows.keys) * rows.at.size
        counts = {"features": num_features, "bytes": num_bytes}
        return self.commit(worker, writer, describer.describe(NO_IMAGES), bad, counts)

    def _unusable(self, rows: VectorRows, row: int, reason: str) -> dict[str, Any]:
        at = Place(rows.at.kind, rows.at.object, rows.at.start + row, rows.at.size)
        raw = RawImage(rows.keys[row], at.describe(self.shard.root, ""), at, None)
        return self.quarantined(raw, reason, f"no vector of {rows.vectors.shape[1]} finite numbers")

    def _ids(self, rows: VectorRows, good: np.ndarray[Any, Any]) -> pa.Table:
        """The rows of the id map of these rows; a vector has no size in pixels."""
        num, keys, vectors = len(good), [rows.keys[row] for row in good], np.ascontiguousarray(rows.vectors[good])
        nothing = np.zeros(num, np.int32)
        columns = {
            "image_id": np.fromiter((image_id(key) for key in keys), np.int64, num),
            "key": keys,
            "content_sha256": [hashlib.sha256(vector).digest() for vector in vectors],
            "source": np.full(num, self.source, np.int16),
            "kind": pa.repeat(rows.at.kind, num),
            "object": pa.repeat(rows.at.object, num),
            "start": rows.at.start + good,
            "num_bytes": np.full(num, rows.at.size, np.int64),
            "height": nothing,
            "width": nothing,
        }
        return pa.table(columns, schema=IDS_SCHEMA)
