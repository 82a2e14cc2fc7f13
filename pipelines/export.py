"""A version as files for other tools: one faiss file with its ids, or Parquet with a vector per image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cbir.index.dense import merge_partitions, write_index

from cbir.artifacts import Done
from cbir.config import Config, parse_config
from cbir.errors import ArtifactError, ConfigError
from cbir.layout import IdMap, Layout
from cbir.search import LocalFiles, Partition, encode_all, restore_encoders
from cbir.storage import Store
from cbir.versions import Manifest
from pipelines.tables import read_features

__all__ = ["Format", "export"]

Format = Literal["faiss", "parquet"]


def export(store: Store, manifest: Manifest, folder: Path, channel: str | None, form: Format) -> list[Path]:
    """Write a channel of a version into a folder; returns the files.

    `faiss`: `index.faiss`, all partitions in one index, and `ids.parquet` (image_id, key). `parquet`: `vectors.parquet`
    (image_id, key, vector as a fixed-size list of float32), which Lance and Milvus import as it is.
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
    if channel not in config.channels:
        raise ConfigError(f"--channel must be one of {', '.join(config.channels)}, found {channel!r}")
    return channel


def _export_faiss(store: Store, manifest: Manifest, config: Config, name: str, folder: Path) -> list[Path]:
    layout, files = Layout.from_json(manifest.layout), LocalFiles(store, manifest)
    partitions = [Partition(config, part, files) for part in layout.partitions]
    write_index(merge_partitions([partition.indexes[name] for partition in partitions]), folder / "index.faiss")
    schema = pa.schema([("image_id", pa.int64()), ("key", pa.string())])
    with pq.ParquetWriter(folder / "ids.parquet", schema) as writer:
        for partition in partitions:
            writer.write_table(partition.ids.table.select(schema.names).cast(schema))
    return [folder / "index.faiss", folder / "ids.parquet"]


def _export_vectors(store: Store, manifest: Manifest, config: Config, name: str, path: Path) -> Path:
    """Encode the stored features again: an index may hold codes only."""
    layout, files = Layout.from_json(manifest.layout), LocalFiles(store, manifest)
    encoders = restore_encoders(config.channels[name], layout.channels[name].encoders, files)
    keys = _keys(layout, files)
    writer: pq.ParquetWriter | None = None
    for done in _extracted(store, manifest, name):
        for features in read_features(store, done):
            encoded = encode_all(encoders, features)
            vectors = pa.FixedSizeListArray.from_arrays(encoded.descriptors.ravel(), encoded.descriptors.shape[1])
            ids = np.repeat(encoded.image_ids, encoded.counts)
            columns = {"image_id": ids, "key": [keys[image] for image in ids.tolist()], "vector": vectors}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    if writer is None:
        raise ArtifactError(f"version {manifest.version} holds no image to export")
    writer.close()
    return path


def _keys(layout: Layout, files: LocalFiles) -> dict[int, str]:
    keys: dict[int, str] = {}
    for part in layout.partitions:
        ids = IdMap(files.path(part.ids))
        keys.update(zip(ids.image_ids.tolist(), ids.table.column("key").to_pylist(), strict=True))
    return keys


def _extracted(store: Store, manifest: Manifest, channel: str) -> Iterator[Done]:
    """The `extract` records of a channel that the version is made of."""
    for prefix in manifest.work:
        if prefix.startswith("stages/extract/"):
            done = Done.from_json(store.read(f"{prefix}DONE.json"))
            if done.facts["channel"] == channel and done.counts["indexed"]:
                yield done
