"""The files of a version: which parts it has, and how a partition's id map and stored features are written and read.

Published tables are Arrow IPC files without compression, so that a query process maps them instead of loading them;
`pyarrow.ipc.open_file`, `pandas.read_feather` and, through pyarrow, DuckDB read them without this library.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cbir.errors import ArtifactError
from cbir.types import FEATURES_SCHEMA, FeatureBatch, Int32s, Int64s

__all__ = [
    "IDS_SCHEMA",
    "ChannelLayout",
    "FeatureFile",
    "IdMap",
    "Labels",
    "Layout",
    "PartitionLayout",
    "partition_bounds",
]

IDS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("content_sha256", pa.binary(32), nullable=False),
        pa.field("source", pa.int16(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("object", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
    ]
)
"""One row per image: its id and key, the sha256 of its bytes, where they lie (`source` numbers the configuration's
`images`; kind, object, start and num_bytes are a `cbir.collection.Place`), and its upright size in pixels."""

ID_BYTES = 128
"""About what an image takes in the id map; keys and paths may be longer."""

_BATCH_IMAGES = 256

_FEW = 64
"""Texts that are read one by one, sooner than Arrow's kernels take them."""


@dataclass(frozen=True)
class ChannelLayout:
    """The trained state of one channel: keys of the store."""

    encoders: tuple[str, ...]
    index: str
    assets: Mapping[str, str]
    background: float | None = None
    """How far above the lowest the scores of irrelevant images lie, where a fusion needs it."""


@dataclass(frozen=True)
class PartitionLayout:
    """One partition: the images with low <= image_id < high; keys of the store by channel."""

    low: int
    high: int
    num_images: int
    ids: str
    quarantine: str
    indexes: Mapping[str, tuple[str, ...]]
    features: Mapping[str, str]
    signatures: Mapping[str, str]
    hidden: str = ""
    """The file of the images that no result shows, the same for all partitions; "" if there are none."""

    @property
    def keys(self) -> set[str]:
        """Every file of the partition."""
        indexes = {key for keys in self.indexes.values() for key in keys}
        hidden = {self.hidden} if self.hidden else set()
        return {self.ids, self.quarantine, *indexes, *self.features.values(), *self.signatures.values(), *hidden}


@dataclass(frozen=True)
class Layout:
    """Which file of a version plays which part."""

    channels: Mapping[str, ChannelLayout]
    partitions: tuple[PartitionLayout, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data for the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Layout":
        """Back from `to_json`, also after a round trip through JSON."""
        channels = {
            name: ChannelLayout(**{**channel, "encoders": tuple(channel["encoders"])})
            for name, channel in data["channels"].items()
        }
        return cls(channels, tuple(_partition(partition) for partition in data["partitions"]))


def _partition(data: Mapping[str, Any]) -> PartitionLayout:
    indexes = {name: tuple(keys) for name, keys in data["indexes"].items()}
    return PartitionLayout(**{**data, "indexes": indexes})


def partition_bounds(num_partitions: int) -> list[tuple[int, int]]:
    """Equal ranges of the 63-bit ids; ids are hashes, so equal ranges hold equally many images."""
    edges = [(number << 63) // num_partitions for number in range(num_partitions + 1)]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True)
class Labels:
    """What results show of N images: `keys` (N,), and `sizes` (N, 2), height and width of the upright original.

    Columns, because those of a batch of queries travel between processes.
    """

    image_ids: Int64s
    keys: Sequence[str]
    sizes: Int32s

    @classmethod
    def none(cls) -> "Labels":
        """Of no image."""
        return cls(np.empty(0, np.int64), [], np.empty((0, 2), np.int32))

    @classmethod
    def concatenate(cls, parts: Sequence["Labels"]) -> "Labels":
        """All of them; those of an image that is in several parts are alike."""
        if len(parts) == 1:
            return parts[0]
        whole = [cls.none(), *parts]
        ids, sizes = (np.concatenate([getattr(part, name) for part in whole]) for name in ("image_ids", "sizes"))
        return cls(ids, [key for part in parts for key in part.keys], sizes)

    @cached_property
    def by_id(self) -> dict[int, tuple[str, list[int]]]:
        """Key and size of each image."""
        return dict(zip(self.image_ids.tolist(), zip(self.keys, self.sizes.tolist(), strict=True), strict=True))


class IdMap:
    """The id map of one partition, memory-mapped and sorted by id."""

    def __init__(self, path: Path) -> None:
        self.table = _mapped(path)
        self.image_ids: Int64s = self.table.column("image_id").to_numpy()
        self._columns = {name: _one_chunk(self.table.column(name)) for name in self.table.column_names}
        self._keys, self._sides = self._columns["key"], [self._columns[name].to_numpy() for name in ("height", "width")]
        self._texts = _Texts(self._keys)

    @staticmethod
    def write(path: Path, table: pa.Table) -> None:
        """Write rows of IDS_SCHEMA sorted by id."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, IDS_SCHEMA) as writer:
            writer.write_table(table.combine_chunks())

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, image_ids: Int64s) -> pa.Table:
        """The rows of these images, in this order; ArtifactError if the partition lacks one."""
        return self.table.take(self._positions(image_ids))

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The same as dictionaries, far sooner if there are few."""
        positions = self._positions(image_ids).tolist()
        return [{name: column[at].as_py() for name, column in self._columns.items()} for at in positions]

    def labels(self, image_ids: Int64s) -> Labels:
        """What results show of these images, in this order."""
        positions = self._positions(image_ids)
        sizes = np.stack([side[positions] for side in self._sides], axis=1)
        few = len(positions) <= _FEW
        keys = self._texts.at(positions.tolist()) if few else self._keys.take(positions).to_pylist()
        return Labels(image_ids, keys, sizes)

    def label(self, image_id: int) -> tuple[str, int, int]:
        """Key, height and width of one image, at a tenth of what the kernels for many cost for one."""
        at = int(self.image_ids.searchsorted(image_id))
        if at == len(self.image_ids) or self.image_ids[at] != image_id:
            raise _not_there(image_id)
        height, width = self._sides
        return self._texts.at([at])[0], height.item(at), width.item(at)

    def _positions(self, image_ids: Int64s) -> Int64s:
        positions, found = _positions(self.image_ids, image_ids)
        if not found.all():
            raise _not_there(int(image_ids[~found][0]))
        return positions


class _Texts:
    """Values of a column of strings, which are read where they lie at a tenth of what Arrow takes for a few."""

    def __init__(self, column: pa.StringArray) -> None:
        _, offsets, values = column.buffers()
        self._ends = np.frombuffer(offsets, np.int32)[column.offset :]
        self._values = memoryview(values if values is not None else b"")

    def at(self, positions: Sequence[int]) -> list[str]:
        """In this order."""
        item, values = self._ends.item, self._values
        return [str(values[item(position) : item(position + 1)], "utf-8") for position in positions]


class FeatureFile:
    """The extractor's features of one partition, memory-mapped and sorted by id."""

    def __init__(self, path: Path) -> None:
        self._table = _mapped(path)
        self.image_ids: Int64s = self._table.column("image_id").to_numpy()

    @staticmethod
    def write(path: Path, batches: Iterator[FeatureBatch], empty: FeatureBatch) -> int:
        """Write batches that are sorted by id; `empty` gives dtype and widths if there are none. Returns the images."""
        first = empty.to_arrow()
        images = 0
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            for batch in batches:
                for start in range(0, len(batch), _BATCH_IMAGES):
                    some = batch.take(np.arange(start, min(start + _BATCH_IMAGES, len(batch))))
                    writer.write_batch(some.to_arrow())
                    images += len(some)
        return images

    def read(self, image_ids: Int64s) -> FeatureBatch:
        """The features of these images, in this order; no rows for an image that has none here.

        An image that one channel indexed may have been quarantined in another.
        """
        positions, found = _positions(self.image_ids, image_ids)
        rows = [self._table.slice(position, 1) for position in positions[found]]
        table = pa.concat_tables(rows) if rows else self._table.slice(0, 0)
        held = FeatureBatch.from_arrow(table.select(FEATURES_SCHEMA.names))
        counts, sizes = np.zeros(len(image_ids), np.int64), np.zeros((len(image_ids), 2), np.int32)
        counts[found], sizes[found] = held.counts, held.sizes
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return FeatureBatch(image_ids, offsets, held.descriptors, held.geometry, sizes, words=held.words)


def _not_there(image_id: int) -> ArtifactError:
    return ArtifactError(f"image id {image_id} is in the index but not in its id map; run `cbir verify`")


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """Without a copy if it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _mapped(path: Path) -> pa.Table:
    """A table over the mapped file; ArtifactError if the file is not whole."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}: not a whole Arrow file ({error}); run `cbir verify`") from None


def _positions(known: Int64s, wanted: Int64s) -> tuple[Int64s, npt.NDArray[np.bool_]]:
    """Where the wanted ids lie among the known ones, which are sorted, and which of them are there at all."""
    positions = np.searchsorted(known, wanted)
    found = positions < len(known)
    if len(known):
        found &= known[np.minimum(positions, len(known) - 1)] == wanted
    return positions, found
