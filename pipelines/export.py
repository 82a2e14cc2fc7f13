"""A version as files for other tools: one faiss file with its ids, or Parquet with a vector per image."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbir.artifacts import find_done
from cbir.config import Config, parse_config
from cbir.errors import ArtifactError, ConfigError
from cbir.index.dense import merge_partitions, write_index
from cbir.layout import Layout
from cbir.partition import LocalFiles, Partition
from cbir.queries import encode_all, restore_encoders
from cbir.spec import nearest
from cbir.storage import Store
from cbir.types import FEATURES_SCHEMA, FeatureBatch
from cbir.versions import Manifest
from pipelines.tables import open_parquet

__all__ = ["Format", "export"]

Format = Literal["faiss", "parquet"]

IDS_SCHEMA = pa.schema([pa.field("image_id", pa.int64(), nullable=False), pa.field("key", pa.string(), nullable=False)])

_GROUP_BYTES = 64 << 20


def export(store: Store, manifest: Manifest, folder: Path, channel: str | None, form: Format) -> list[Path]:
    """Write a channel of a version into a folder; returns the files.

    `faiss`: `index.faiss`, all partitions in one index, made in memory, and `ids.parquet` (image_id, key). `parquet`:
    `vectors.parquet` (image_id, key, vector as a fixed-size list of float32), which Lance and Milvus import as it is:
    a row for every vector, shard after shard, within a shard by rising id; an image's vectors stay together.
    """
    config = parse_config(manifest.config, f"version {manifest.version}")
    name = _channel(config, channel)
    folder.mkdir(parents=True, exist_ok=True)
    if form == "faiss":
        return _export_faiss(store, manifest, config, name, folder)
    return [_export_vectors(store, manifest, config, name, folder / "vectors.parquet")]


def _channel(config: Config, channel: str | None) -> str:
    if channel is None and len(config.channels) == 1:
        return next(iter(config.channels))
    if channel is None:
        raise ConfigError(f"the index has several channels: give --channel, one of {', '.join(config.channels)}")
    if channel not in config.channels:
        raise ConfigError(f"--channel: no channel {channel!r}{nearest(channel, config.channels)}")
    return channel


def _export_faiss(store: Store, manifest: Manifest, config: Config, name: str, folder: Path) -> list[Path]:
    layout, files = Layout.from_json(manifest.layout), LocalFiles(store, manifest)
    partitions = [Partition(config, part, files) for part in layout.partitions]
    write_index(merge_partitions([partition.indexes[name] for partition in partitions]), folder / "index.faiss")
    with pq.ParquetWriter(folder / "ids.parquet", IDS_SCHEMA) as writer:
        for partition in partitions:
            writer.write_table(partition.ids.table.select(IDS_SCHEMA.names))
    return [folder / "index.faiss", folder / "ids.parquet"]


def _export_vectors(store: Store, manifest: Manifest, config: Config, name: str, path: Path) -> Path:
    """Encode the stored features again: an index may hold codes only."""
    layout, files = Layout.from_json(manifest.layout), LocalFiles(store, manifest)
    encoders = restore_encoders(config.channels[name], layout.channels[name].encoders, files)
    tables = (
        _vector_table(features, encode_all(encoders, FeatureBatch.from_arrow(features)))
        for features in _features(store, manifest, name)
    )
    writer: pq.ParquetWriter | None = None
    for table in _in_groups(tables):
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is None:
        raise ArtifactError(f"version {manifest.version} holds no image of channel {name} to export")
    writer.close()
    return path


def _features(store: Store, manifest: Manifest, channel: str) -> Iterator[pa.Table]:
    """The rows that `extract` stored for the images of a channel, with their keys; a row group at a time."""
    for prefix in manifest.work:
        _, stage, fingerprint, _ = prefix.split("/")
        done = find_done(store, stage, fingerprint) if stage == "extract" else None
        if done is not None and done.facts["channel"] == channel and done.counts["indexed"]:
            parquet = open_parquet(store, done.file("features"))
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=["key", *FEATURES_SCHEMA.names])


def _vector_table(features: pa.Table, encoded: FeatureBatch) -> pa.Table:
    """One row per vector: the id and key of its image, and the vector."""
    image = np.repeat(np.arange(len(encoded)), encoded.counts)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(encoded.descriptors.ravel(), pa.float32()), encoded.descriptors.shape[1]
    )
    rows = features.select(IDS_SCHEMA.names).cast(IDS_SCHEMA).take(pa.array(image))
    return rows.append_column(pa.field("vector", vectors.type, nullable=False), vectors)


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about 64 MiB, which become row groups."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(some.nbytes for some in waiting) >= _GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
