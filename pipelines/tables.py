"""The Parquet files between stages: features, quarantine, entries and samples, every one sorted by image id.

Sorted files let a reader of an id range (a partition) skip the row groups that lie outside of it: with no more
partitions than row groups in a shard, a merge over all partitions reads every byte about once.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbir.artifacts import Done, StoredFile, read_part
from cbir.layout import IDS_SCHEMA
from cbir.storage import Store
from cbir.types import FEATURES_SCHEMA, FeatureBatch, Int64s

__all__ = [
    "QUARANTINE_SCHEMA",
    "ShardWriter",
    "on_disk",
    "open_parquet",
    "parquet_bytes",
    "parquet_writer",
    "read_features",
    "read_range",
    "sorted_table",
    "write_parquet",
]

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("channel", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("source", pa.int16(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("object", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
    ]
)
"""One row per image that could not be used: where it lies, why, and how large it is."""

_ROW_GROUP_BYTES = 4 << 20
_WHOLE_FILE_BYTES = 64 << 20


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of compressed pages with checksums; only text has a dictionary, which is no use to ids and vectors."""
    text = [field.name for field in schema if pa.types.is_string(field.type)]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=text, write_page_checksum=True)


def write_parquet(path: Path, table: pa.Table, row_bytes: int = 64) -> None:
    """Write a table with row groups of about 4 MiB; equal tables give equal bytes."""
    with parquet_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_size=max(1, min(_ROW_GROUP_BYTES // max(row_bytes, 1), 1 << 20)))


def on_disk(path: Path, tables: Iterable[pa.Table]) -> pa.Table:
    """At least one table, one after the other in a mapped file, so that memory holds one of them at a time.

    The file may be deleted while the result is in use.
    """
    writer: pa.RecordBatchFileWriter | None = None
    with contextlib.ExitStack() as opened:
        for table in tables:
            if writer is None:
                sink = opened.enter_context(pa.OSFile(str(path), "wb"))
                writer = opened.enter_context(pa.ipc.new_file(sink, table.schema))
            writer.write_table(table)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def parquet_bytes(table: pa.Table) -> bytes:
    """A small table as the bytes of a Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def sorted_table(table: pa.Table) -> pa.Table:
    """The rows by rising image id."""
    return table.take(pc.sort_indices(table, [("image_id", "ascending")])).combine_chunks()


class ShardWriter:
    """Collects the features of one shard in a scratch file and writes them sorted by id, in bounded memory."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._sink = pa.OSFile(str(scratch), "wb")
        self._writer: pa.RecordBatchFileWriter | None = None
        self._ids = [IDS_SCHEMA.empty_table()]
        self._num_bytes = 0

    def add(self, batch: FeatureBatch, ids: pa.Table) -> None:
        """Append a batch and its rows of the id map."""
        record = batch.to_arrow()
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._sink, record.schema)
        self._writer.write_batch(record)
        self._ids.append(ids)
        self._num_bytes += batch.descriptors.nbytes + batch.geometry.nbytes

    def finish(self, target: Path, empty: FeatureBatch) -> pa.Table:
        """Write the sorted Parquet file; `empty` gives dtype and widths if nothing was added. Returns the id rows."""
        if self._writer is None:
            self.add(empty, IDS_SCHEMA.empty_table())
        assert self._writer is not None
        self._writer.close()
        self._sink.close()
        ids = pa.concat_tables(self._ids)
        order = pc.sort_indices(ids, [("image_id", "ascending")])
        features = pa.ipc.open_file(pa.memory_map(str(self._scratch))).read_all()
        features = features.combine_chunks()  # or every `take` does it
        own = [field for field in FEATURES_SCHEMA if field.name not in IDS_SCHEMA.names]
        schema = pa.schema([*IDS_SCHEMA, *own], metadata=features.schema.metadata)
        images = max(1, ids.num_rows)
        step = max(1, min(_ROW_GROUP_BYTES // max(self._num_bytes // images, 1), images))
        with parquet_writer(target, schema) as writer:
            for start in range(0, images, step):
                some = order.slice(start, step)
                columns = [*ids.take(some).columns, *features.select([field.name for field in own]).take(some).columns]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=step)
        self._scratch.unlink()
        return ids.take(order)


def open_parquet(store: Store, file: StoredFile, whole_bytes: int = _WHOLE_FILE_BYTES) -> pq.ParquetFile:
    """Open a Parquet file of the store for reading by parts.

    A file of up to `whole_bytes` is read whole and checked against its sha256; of a larger one only the wanted pages
    are read, and each is checked against the checksum in its header.
    """
    if file.num_bytes <= whole_bytes:
        return pq.ParquetFile(pa.BufferReader(read_part(store, file)))
    source = store.local_path(file.key) or store.open(file.key)
    return pq.ParquetFile(source, page_checksum_verification=True)


def read_features(store: Store, done: Done) -> Iterator[FeatureBatch]:
    """The features of one shard, one row group at a time."""
    parquet = open_parquet(store, done.file("features"))
    for group in range(parquet.num_row_groups):
        yield FeatureBatch.from_arrow(parquet.read_row_group(group, columns=FEATURES_SCHEMA.names))


def read_range(store: Store, file: StoredFile, low: int, high: int, columns: list[str] | None = None) -> pa.Table:
    """The rows with low <= image_id < high of a sorted file; row groups outside the range are not read."""
    is_everything = low <= 0 and high >= 1 << 63
    parquet = open_parquet(store, file, _WHOLE_FILE_BYTES if is_everything else _ROW_GROUP_BYTES)
    position = parquet.schema_arrow.get_field_index("image_id")
    groups = []
    for group in range(parquet.num_row_groups):
        found = parquet.metadata.row_group(group).column(position).statistics
        if found is None or not found.has_min_max or (found.min < high and found.max >= low):
            groups.append(group)
    table = parquet.read_row_groups(groups, columns=columns)
    ids: Int64s = table.column("image_id").to_numpy()
    first, last = np.searchsorted(ids, low), np.searchsorted(ids, high - 1, side="right")
    if last - first == len(ids):
        return table
    return table.take(np.arange(first, last))  # a slice would hold all of its row groups in memory
