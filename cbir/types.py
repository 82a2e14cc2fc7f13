"""The nouns that travel between stages, and the legend of shape letters.

Shape letters, used in every docstring: N images, K features (rows of descriptors), D dimensions, G geometry
columns, W visual words, Q queries, R results per query, C channels of a feature map, H height and W width in pixels.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cbir.errors import ArtifactError

__all__ = [
    "FEATURES_SCHEMA",
    "Array",
    "FeatureBatch",
    "Float64s",
    "Floats",
    "Hits",
    "ImageBatch",
    "Int32s",
    "Int64s",
    "Pixels",
    "Regions",
    "State",
    "image_id",
    "in_order",
]

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
State = Mapping[str, Array]
"""What training found, as named arrays; stored as one safetensors file."""


def in_order(rows: Array, order: Int64s) -> Array:
    """Row by row the values of (Q, R) at these positions (Q, R'): `np.take_along_axis` at a fraction of what that costs
    for the few rows of a query."""
    return rows[np.arange(len(rows))[:, None], order]


def image_id(key: str) -> int:
    """The stable id of an image: 63 bits of BLAKE2b of its key, the same in every shard, order and run."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class ImageBatch:
    """Decoded, upright RGB images.

    `images[i]` is (H, W, 3) uint8. `sizes` (N, 2) holds height and width in pixels of the upright original, so that an
    extractor can report geometry in pixels of the original whatever size it was decoded at.
    """

    image_ids: Int64s
    images: Sequence[Pixels]
    sizes: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        if len(self.images) != n or self.sizes.shape != (n, 2):
            raise ValueError(f"{n} image ids, {len(self.images)} images and sizes {self.sizes.shape} do not agree")

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class Regions:
    """Boxes in N images: image i owns rows offsets[i] to offsets[i+1] of `boxes` (M, 4) float32: left, top, right and
    bottom edge in pixels of the upright original; the whole image (0, 0, width, height) is a box only where it is
    listed as one."""

    offsets: Int64s
    boxes: Floats

    def take(self, indices: Int64s) -> "Regions":
        """Those of the images at these positions."""
        offsets, rows = _taken(self.offsets, indices)
        return Regions(offsets, self.boxes[rows])

    def of(self, i: int) -> Floats:
        """The boxes of image number i."""
        return self.boxes[int(self.offsets[i]) : int(self.offsets[i + 1])]


@dataclass(frozen=True)
class FeatureBatch:
    """Features of N images, K rows in all: a global descriptor is the case of one row per image.

    `image_ids` (N,) int64; `offsets` (N+1,) int64: image i owns rows offsets[i] to offsets[i+1]; `descriptors` (K, D),
    C-contiguous; `geometry` (K, G) float32, G = 0 for global descriptors, else x, y in pixels of the upright original
    image, size in pixels (diameter), angle in degrees, and two optional columns of affine shape. Extractors give the
    rows of an image by falling strength, so that the best n are the first n.

    Where it is known: `sizes` (N, 2) int32, height and width of the upright originals, else 0; `regions`, boxes that
    were proposed in the images; `words` (K,) int32, the visual words that an index found for the rows of a query;
    `weights` (K,) float64, what each row of a query counts, which is never stored.
    """

    image_ids: Int64s
    offsets: Int64s
    descriptors: Array
    geometry: Floats = field(default_factory=lambda: np.empty((0, 0), np.float32))
    sizes: Int32s = field(default_factory=lambda: np.empty((0, 2), np.int32))
    regions: Regions | None = None
    words: Int32s | None = None
    weights: Float64s | None = None

    def __post_init__(self) -> None:
        n, k = len(self.image_ids), len(self.descriptors)
        if self.geometry.size == 0 and len(self.geometry) != k:
            object.__setattr__(self, "geometry", np.empty((k, 0), np.float32))
        if self.sizes.size == 0 and n:
            object.__setattr__(self, "sizes", np.zeros((n, 2), np.int32))
        if self.descriptors.ndim != 2:
            raise ValueError(f"descriptors must be (K, D), found shape {self.descriptors.shape}")
        ends = self.offsets.shape == (n + 1,) and self.offsets[0] == 0 and self.offsets[-1] == k
        if not ends or (self.offsets[1:] < self.offsets[:-1]).any():
            raise ValueError(f"offsets {self.offsets.shape} do not divide {k} rows among {n} images")
        if any(column is not None and len(column) != k for column in (self.geometry, self.words, self.weights)):
            raise ValueError(f"geometry has {len(self.geometry)} rows, descriptors {k}; as words and weights must have")
        if self.sizes.shape != (n, 2) or (self.regions is not None and len(self.regions.offsets) != n + 1):
            raise ValueError(f"sizes {self.sizes.shape} and regions must be those of {n} images")

    @classmethod
    def of_global(cls, image_ids: Int64s, descriptors: Array) -> "FeatureBatch":
        """One row per image: descriptors (N, D)."""
        return cls(image_ids, np.arange(len(image_ids) + 1, dtype=np.int64), descriptors)

    @classmethod
    def of_images(
        cls, image_ids: Int64s, descriptors: Sequence[Array], geometry: Sequence[Floats] | None = None
    ) -> "FeatureBatch":
        """From one array of rows per image; at least one image."""
        offsets = np.zeros(len(image_ids) + 1, np.int64)
        np.cumsum([len(rows) for rows in descriptors], out=offsets[1:])
        stacked = np.ascontiguousarray(np.concatenate(descriptors))
        if geometry is None:
            return cls(image_ids, offsets, stacked)
        return cls(image_ids, offsets, stacked, np.ascontiguousarray(np.concatenate(geometry)))

    @classmethod
    def concatenate(cls, batches: Iterable["FeatureBatch"]) -> "FeatureBatch":
        """Batches one after the other: `a ++ b`. At least one batch, all of one D and G."""
        parts = list(batches)
        regions = [part.regions for part in parts if part.regions is not None]
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            _joined([part.offsets for part in parts]),
            np.concatenate([part.descriptors for part in parts]),
            np.concatenate([part.geometry for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            _joined_regions(regions) if len(regions) == len(parts) else None,
            _joined_columns([part.words for part in parts]),
            _joined_columns([part.weights for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def counts(self) -> Int64s:
        """Rows per image (N,)."""
        return np.diff(self.offsets)

    def rows(self, i: int) -> slice:
        """The rows of image number i."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def members(self, i: int) -> npt.NDArray[np.bool_]:
        """Which features of image number i lie in which of its regions, by their centres: (regions, features).

        An image without regions is one region. A place on an edge belongs to the box on its right or below; places that
        an extractor found a little outside of the image count as its rim, so that the whole image holds all features.
        """
        num, boxes = int(self.counts[i]), self.regions.of(i) if self.regions is not None else None
        if boxes is None or not len(boxes):
            return np.ones((1, num), np.bool_)
        left, top, right, bottom = boxes.T[:, :, None]
        # A pixel's centre has whole coordinates in the geometry; boxes count from the edge of the first pixel.
        x, y = self.geometry[self.rows(i), :2].T + np.float32(0.5)
        height, width = self.sizes[i].astype(np.float32)
        if height and width:
            x, y = (np.clip(place, 0, np.nextafter(side, np.float32(0))) for place, side in ((x, width), (y, height)))
        inside: npt.NDArray[np.bool_] = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        return inside

    def take(self, indices: Int64s) -> "FeatureBatch":
        """The images with these positions, in this order; positions may repeat."""
        offsets, rows = _taken(self.offsets, indices)
        regions = self.regions.take(indices) if self.regions is not None else None
        kept = self.descriptors[rows], self.geometry[rows], self.sizes[indices]
        optional = _rows_of(self.words, rows), _rows_of(self.weights, rows)
        return FeatureBatch(self.image_ids[indices], offsets, *kept, regions, *optional)

    def take_rows(self, chosen: npt.NDArray[np.bool_]) -> "FeatureBatch":
        """The same images with the rows for which `chosen` (K,) is true."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])[self.offsets]
        kept = self.descriptors[chosen], self.geometry[chosen]
        optional = _rows_of(self.words, chosen), _rows_of(self.weights, chosen)
        return FeatureBatch(self.image_ids, offsets, *kept, self.sizes, self.regions, *optional)

    def with_descriptors(self, descriptors: Array) -> "FeatureBatch":
        """The same images and geometry with other descriptors (K, D')."""
        return replace(self, descriptors=descriptors)

    def to_arrow(self) -> pa.RecordBatch:
        """One row per image in FEATURES_SCHEMA; dtype, D and G stand in the schema's metadata."""
        metadata = {
            "dtype": self.descriptors.dtype.name,
            "dim": str(self.descriptors.shape[1]),
            "geometry_columns": str(self.geometry.shape[1]),
            "has_regions": str(int(self.regions is not None)),
            "has_words": str(int(self.words is not None)),
        }
        words = self.words if self.words is not None else np.empty(0, np.int32)
        word_offsets = self.offsets if self.words is not None else np.zeros(len(self) + 1, np.int64)
        regions = self.regions or Regions(np.zeros(len(self) + 1, np.int64), np.empty((0, 4), np.float32))
        columns = [
            pa.array(self.image_ids),
            pa.array(self.sizes[:, 0]),
            pa.array(self.sizes[:, 1]),
            pa.array(self.counts.astype(np.int32)),
            _binary_column(self.descriptors, self.offsets),
            _binary_column(self.geometry, self.offsets),
            _binary_column(regions.boxes, regions.offsets),
            _binary_column(words[:, None], word_offsets),
        ]
        return pa.record_batch(columns, schema=FEATURES_SCHEMA.with_metadata(metadata))

    @classmethod
    def from_arrow(cls, table: pa.Table | pa.RecordBatch) -> "FeatureBatch":
        """Back from `to_arrow`; other columns of the table are ignored. ArtifactError if it is no table of features."""
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        missing = {"dtype", "dim", "geometry_columns", "has_regions", "has_words"} - metadata.keys()
        if missing:
            raise ArtifactError(
                f"the table's metadata lacks {', '.join(sorted(missing))}; "
                f"its columns are {', '.join(table.schema.names)}, so it was not written as a table of features"
            )
        counts = table.column("num_features").to_numpy().astype(np.int64)
        sizes = np.stack([table.column(name).to_numpy() for name in ("height", "width")], axis=1)
        return cls(
            np.ascontiguousarray(table.column("image_id").to_numpy()),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            _from_binary(table.column("descriptors"), np.dtype(metadata["dtype"]), int(metadata["dim"])),
            _from_binary(table.column("geometry"), np.dtype(np.float32), int(metadata["geometry_columns"])),
            np.ascontiguousarray(sizes, np.int32),
            _regions_from_arrow(table.column("regions")) if metadata["has_regions"] == "1" else None,
            _words_from_arrow(table.column("words")) if metadata["has_words"] == "1" else None,
        )


FEATURES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_features", pa.int32(), nullable=False),
        pa.field("descriptors", pa.large_binary(), nullable=False),
        pa.field("geometry", pa.large_binary(), nullable=False),
        pa.field("regions", pa.large_binary(), nullable=False),
        pa.field("words", pa.large_binary(), nullable=False),
    ]
)
"""One row per image. `descriptors` holds num_features x dim values, row-major and little-endian, in the dtype that the
schema's metadata names: `np.frombuffer(row["descriptors"], dtype).reshape(-1, dim)`. `geometry` and `regions` (boxes of
four) likewise in float32, `words` in int32; the last two are empty where the metadata says that there are none."""


def _taken(offsets: Int64s, indices: Int64s) -> tuple[Int64s, Int64s]:
    """The offsets of the images at these positions, and the positions of their rows."""
    counts = np.diff(offsets)[indices]
    taken = np.zeros(len(indices) + 1, np.int64)
    np.cumsum(counts, out=taken[1:])
    return taken, np.repeat(offsets[indices] - taken[:-1], counts) + np.arange(taken[-1])


def _rows_of(column: Array | None, rows: Array) -> Array | None:
    return None if column is None else column[rows]


def _joined_columns(columns: Sequence[Array | None]) -> Array | None:
    """One column, unless a part has none."""
    known = [column for column in columns if column is not None]
    return np.concatenate(known) if len(known) == len(columns) else None


def _joined(offsets: Sequence[Int64s]) -> Int64s:
    counts = np.concatenate([np.diff(part) for part in offsets])
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _joined_regions(parts: Sequence[Regions]) -> Regions:
    return Regions(_joined([part.offsets for part in parts]), np.concatenate([part.boxes for part in parts]))


def _words_from_arrow(column: pa.ChunkedArray | pa.Array) -> Int32s:
    return _from_binary(column, np.dtype(np.int32), 1).ravel()


def _regions_from_arrow(column: pa.ChunkedArray | pa.Array) -> Regions:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    lengths = [np.diff(_chunk_offsets(chunk)) // 16 for chunk in chunks]
    counts = np.concatenate([np.empty(0, np.int64), *lengths])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return Regions(offsets, _from_binary(column, np.dtype(np.float32), 4))


def _binary_column(rows: Array, offsets: Int64s) -> pa.LargeBinaryArray:
    width = rows.shape[1] * rows.itemsize
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets * width)), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def _from_binary(column: pa.ChunkedArray | pa.Array, dtype: np.dtype[Any], width: int) -> Array:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_chunk_bytes(chunk) for chunk in chunks]
    raw = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])
    return raw.view(dtype).reshape(-1, width) if width else np.empty((0, 0), dtype)


def _chunk_bytes(chunk: pa.LargeBinaryArray) -> npt.NDArray[np.uint8]:
    data = chunk.buffers()[2]
    if len(chunk) == 0 or data is None:
        return np.empty(0, np.uint8)
    offsets = _chunk_offsets(chunk)
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]


def _chunk_offsets(chunk: pa.LargeBinaryArray) -> Int64s:
    if len(chunk) == 0:
        return np.zeros(1, np.int64)
    return np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]


@dataclass(frozen=True)
class Hits:
    """Ranked results: `image_ids` (Q, R) int64, padded with -1; `scores` (Q, R) float32, higher is better.

    Every row is sorted by falling score; equal scores are sorted by rising id, so that the number of shards,
    partitions or workers never shows in a ranking. The scores of padding are -inf.
    """

    image_ids: Int64s
    scores: Floats

    def __post_init__(self) -> None:
        if self.image_ids.shape != self.scores.shape or self.image_ids.ndim != 2:
            raise ValueError(f"ids {self.image_ids.shape} and scores {self.scores.shape} must be one (Q, R) shape")

    def __len__(self) -> int:
        return len(self.image_ids)

    @classmethod
    def ranked(cls, image_ids: Int64s, scores: Floats, depth: int) -> "Hits":
        """Sort unordered candidates (Q, M), -1 marking none, and keep the best `depth`, padded if M < depth."""
        scores = np.where(image_ids < 0, -np.inf, scores).astype(np.float32, copy=False)
        order = np.lexsort((image_ids, image_ids < 0, -scores))[:, :depth]
        ids, best = in_order(image_ids, order), in_order(scores, order)
        missing = depth - ids.shape[1]
        if missing > 0:
            ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
            best = np.pad(best, ((0, 0), (0, missing)), constant_values=-np.inf)
        return cls(ids, best)

    def without(self, image_ids: Int64s, depth: int) -> "Hits":
        """The best `depth` of the others."""
        kept = np.where(np.isin(self.image_ids, image_ids), -1, self.image_ids)
        return Hits.ranked(kept, self.scores, depth)

    @classmethod
    def merge(cls, parts: Sequence["Hits"], depth: int) -> "Hits":
        """The best `depth` of the hits of several partitions; an image lies in one partition only."""
        ids = np.concatenate([part.image_ids for part in parts], axis=1)
        return cls.ranked(ids, np.concatenate([part.scores for part in parts], axis=1), depth)
