"""Images that an earlier version knows: what was made of them then is not made again.

A tar is rewritten when one of its members changes, and a folder is cut into other groups when files come and go; most
images of such a shard are what they were. An image is known by its id and the sha256 of its bytes, wherever it lies.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cbir.artifacts import Done, StoredFile, find_done
from cbir.storage import Store
from cbir.types import FeatureBatch, Int32s, Int64s
from pipelines.tables import open_parquet
from pipelines.work import Asset, Worker

__all__ = ["Digests", "KnownImages", "Made", "digests_of", "rows_of"]

Digests = npt.NDArray[np.bytes_]
"""sha256 of images, (N,) of dtype S32."""

_RANGED_BYTES = 4 << 20


@dataclass(frozen=True)
class Made:
    """What was made of a shard: its features, and, where that is asked for, the entries of these."""

    features: Done
    build: Done | None


class KnownImages:
    """The images of earlier shards, each by the number of its shard in `made`; no image is in two of them."""

    def __init__(self, made: Sequence[Made], tables: Sequence[pa.Table]) -> None:
        self.made = list(made)
        ids = [table.column("image_id").to_numpy() for table in tables]
        owners = np.repeat(np.arange(len(ids), dtype=np.int32), [len(some) for some in ids])
        all_ids = np.concatenate([np.empty(0, np.int64), *ids])
        order = np.argsort(all_ids, kind="stable")
        self._ids, self._owners = all_ids[order], owners[order]
        self._digests = np.concatenate([np.empty(0, "S32"), *(digests_of(table) for table in tables)])[order]

    @classmethod
    def of(cls, worker: Worker, earlier: Asset | None) -> "KnownImages":
        """Those of the work that a file of the store lists, as rows of the fingerprints of `extract` and `build`.

        Work that is gone is not known. The file is as `pipelines.before` writes it; without one, nothing is known.
        """
        if earlier is None:
            return cls([], [])
        return worker.cached(("known images", earlier.sha256), lambda: cls._read(worker.store, earlier))

    @classmethod
    def _read(cls, store: Store, earlier: Asset) -> "KnownImages":
        made = []
        for extract, build in json.loads(store.read(earlier.key, sha256=earlier.sha256)):
            features = find_done(store, "extract", extract)
            entries = find_done(store, "build", build) if build else None
            if features is not None and (entries is not None or not build):
                made.append(Made(features, entries))
        columns = ["image_id", "content_sha256"]
        return cls(made, [_opened(store, one.features.file("features")).read(columns=columns) for one in made])

    def __bool__(self) -> bool:
        return bool(self.made)

    def owners(self, image_ids: Int64s, digests: Digests) -> Int32s:
        """The numbers of the shards (N,) that know images of these ids and bytes; -1 where none does."""
        if not len(self._ids):
            return np.full(len(image_ids), -1, np.int32)
        at = np.minimum(np.searchsorted(self._ids, image_ids), len(self._ids) - 1)
        same = (self._ids[at] == image_ids) & (self._digests[at] == digests)
        return np.where(same, self._owners[at], np.int32(-1))

    def features(self, store: Store, image_ids: Int64s, owners: Int32s) -> Iterator[FeatureBatch]:
        """The features of images of these shards, not in their order."""
        for number in np.unique(owners).tolist():
            file = self.made[number].features.file("features")
            for table in rows_of(store, file, image_ids[owners == number]):
                yield FeatureBatch.from_arrow(table)


def rows_of(store: Store, file: StoredFile, image_ids: Int64s) -> Iterator[pa.Table]:
    """The rows of some images of a file that is sorted by image id; row groups without any of them are not read."""
    parquet, wanted = _opened(store, file), np.sort(image_ids)
    ids = parquet.read(columns=["image_id"]).column("image_id").to_numpy()
    start = 0
    for group in range(parquet.num_row_groups):
        end = start + parquet.metadata.row_group(group).num_rows
        chosen = np.flatnonzero(np.isin(ids[start:end], wanted))
        if len(chosen):
            yield parquet.read_row_group(group).take(chosen)
        start = end


def _opened(store: Store, file: StoredFile) -> Any:
    return open_parquet(store, file, _RANGED_BYTES)


def digests_of(table: pa.Table) -> Digests:
    """The column `content_sha256` of a table."""
    column = table.column("content_sha256").combine_chunks()
    return np.frombuffer(column.buffers()[1] or b"", "S32", len(column), 32 * column.offset)
