"""Extracted features as files for other tools: Parquet by shard, and all rows of a channel as one `.npy`."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap

from cbir.artifacts import StoredFile
from cbir.config import Config
from cbir.storage import Store, open_store
from cbir.types import FeatureBatch
from pipelines.stages import Extracted
from pipelines.tables import open_parquet, read_features, write_parquet

__all__ = ["write_features"]

COUNTED = ("indexed", "quarantined", "features")


def write_features(
    config: Config, extracted: Mapping[str, Sequence[Extracted]], target: str, *, npy: bool
) -> dict[str, Counter[str]]:
    """Write the features of all channels below a folder or URI; returns the counts of each channel.

    `CHANNEL/SHARD.parquet` are the files of the stage `extract` as they are, `CHANNEL/SHARD.quarantine.parquet` its
    ledgers. With `npy`, `CHANNEL/features.npy` has the descriptors of all shards (K, D), in the order of the files'
    names, and `CHANNEL/images.parquet` says which rows are whose: image_id, key, first_row, num_rows.
    """
    source, store = open_store(config.store), open_store(target)
    counts = {}
    with tempfile.TemporaryDirectory(prefix="cbir-") as folder:
        for channel, parts in extracted.items():
            for part in parts:
                _copy(source, part.done.file("features"), store, f"{channel}/{part.shard}.parquet", Path(folder))
                ledger = part.done.file("quarantine")
                _copy(source, ledger, store, f"{channel}/{part.shard}.quarantine.parquet", Path(folder))
            if npy:
                _write_rows(source, parts, store, channel, Path(folder))
            counts[channel] = Counter({name: sum(part.done.counts[name] for part in parts) for name in COUNTED})
    return counts


def _copy(source: Store, file: StoredFile, target: Store, key: str, folder: Path) -> None:
    path = source.local_path(file.key) or source.fetch(file.key, folder / file.sha256, file.sha256)
    target.write(key, path)
    (folder / file.sha256).unlink(missing_ok=True)


def _write_rows(source: Store, parts: Sequence[Extracted], target: Store, channel: str, folder: Path) -> None:
    rows, images = folder / "features.npy", folder / "images.parquet"
    total = sum(part.done.counts["features"] for part in parts)
    written, array, tables = 0, None, []
    for part in sorted(parts, key=lambda part: part.shard):
        keys = open_parquet(source, part.done.file("features")).read(columns=["image_id", "key"])
        offsets = [np.full(1, written, np.int64)]
        for batch in read_features(source, part.done):
            if array is None:
                array = _matrix(rows, batch, total)
            array[written : written + len(batch.descriptors)] = batch.descriptors
            offsets.append(written + batch.offsets[1:])
            written += len(batch.descriptors)
        starts = np.concatenate(offsets)
        tables.append(keys.append_column("first_row", [starts[:-1]]).append_column("num_rows", [np.diff(starts)]))
    if array is not None:
        array.flush()
        target.write(f"{channel}/{rows.name}", rows)
    write_parquet(images, pa.concat_tables(tables))
    target.write(f"{channel}/{images.name}", images)


def _matrix(path: Path, like: FeatureBatch, rows: int) -> np.memmap:
    """A file of so many rows of this kind, mapped, so that memory does not grow with them."""
    return open_memmap(path, "w+", like.descriptors.dtype, (rows, like.descriptors.shape[1]))
