"""What the indexes of single vectors share: rows in, exact scores, one hit per image, plain faiss files.

A faiss search is taken as a shortlist only where its float32 sums depend on how many queries are asked together or on
how vectors lie in blocks (a BLAS product does): scores are then found again in double precision, so that neither the
batch of queries nor the number of partitions ever shows in a result.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cbir.errors import ArtifactError, ConfigError, DataError
from cbir.index.index import SearchIndex
from cbir.types import Array, FeatureBatch, Floats, Hits, Int64s, in_order

__all__ = [
    "FAISS_METRIC",
    "DensePartition",
    "Metric",
    "Shortlist",
    "array_view",
    "code_column",
    "codes_of",
    "exact_scores",
    "exact_search",
    "exact_shortlist",
    "float_rows",
    "merge_partitions",
    "open_mapped",
    "score_margin",
    "stored_order",
    "write_index",
]

Metric = Literal["ip", "l2"]
"""`ip`: the inner product, a cosine for unit vectors. `l2`: the negative squared Euclidean distance."""

FAISS_METRIC = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}

Shortlist = Callable[[Floats, int], tuple[Int64s, Floats, Floats]]
"""(rows (K, D), R) -> image ids (K, R) padded with -1, scores (K, R), floor (K,): nothing that was left out scores
above the floor, which is -inf where nothing was left out."""

_SPARE = 8
"""Vectors fetched beyond the depth, so that one look settles most ties at the end of a ranking."""

_BLOCK_VALUES = 1 << 16
"""Values that are scored at a time: their copies in double precision stay in the cache [5 x faster]."""


class DensePartition(SearchIndex):
    """One partition of an index that stores one code per vector. `faiss` is the plain index, ids included."""

    plain: ClassVar[bool] = True
    """Whether faiss can search `faiss` by itself."""

    def __init__(self, index: faiss.Index, dim: int) -> None:
        self.faiss, self.dim = index, dim

    def search(self, queries: FeatureBatch, depth: int) -> Hits:
        """The best `depth` images per query image: the best of all pairs of a vector of either.

        A query without rows finds nothing. DataError for queries of another D, ValueError for a depth below one.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, found {depth}")
        return _per_image(self._nearest(float_rows(queries, self.dim), depth), queries, depth)

    def save(self, path: Path) -> None:
        """Write a file that `faiss.read_index` opens; equal entries give equal bytes."""
        write_index(self.faiss, path)

    @abstractmethod
    def entries(self) -> pa.Table:
        """The entries that the partition was built from, in stored order."""

    @abstractmethod
    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these entries with the trained parts of this one."""

    def _nearest(self, rows: Floats, depth: int) -> Hits:
        """The best `depth` images for every row (K, D)."""
        return _nearest_images(rows, depth, self.faiss.ntotal, self._shortlist)

    @abstractmethod
    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        """A `Shortlist` of the partition's vectors."""


def merge_partitions(partitions: Sequence[SearchIndex]) -> faiss.Index:
    """One faiss index, ids included, of all vectors of the partitions: byte for byte what one build would give."""
    dense = [part for part in partitions if isinstance(part, DensePartition) and part.plain]
    if not dense or len(dense) < len(partitions):
        raise ConfigError("only indexes of vectors can become one faiss index; inverted files of words and lopq cannot")
    return dense[0].with_entries(pa.concat_tables([part.entries() for part in dense])).faiss


def write_index(index: faiss.Index, path: Path) -> None:
    """Write a faiss file; ArtifactError if the disk refuses."""
    try:
        # Through a Python file: faiss itself only prints a message when the last buffer does not fit on the disk.
        with path.open("wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write the index: {error.strerror}; free some space there") from None


def open_mapped(path: Path) -> faiss.Index:
    """Open a faiss file memory-mapped.

    IO_FLAG_MMAP_IFC maps vectors and inverted lists alike, where IO_FLAG_MMAP reads a flat index into memory. The table
    of precomputed distances is left out: it costs lists x bytes x 1 KiB per partition and saves no measurable time.
    """
    flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE | faiss.IO_FLAG_PQ_SKIP_SDC_TABLE
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: not a whole faiss file: {str(error).rsplit(': Error: ', 1)[-1]}") from None


def array_view(pointer: Any, size: int) -> Array:
    """An array over memory that belongs to a faiss index, which must outlive it."""
    return np.asarray(faiss.rev_swig_ptr(pointer, size))


def float_rows(batch: FeatureBatch, dim: int | None = None) -> Floats:
    """The descriptors (K, D) as contiguous float32; DataError if D is not `dim` or a value is not finite."""
    rows = np.ascontiguousarray(batch.descriptors, np.float32)
    if dim is not None and rows.shape[1] != dim:
        raise DataError(
            f"these features have D = {rows.shape[1]}, but the index was trained on D = {dim}; "
            "use the extractor and encoders that it was trained with, or train it again"
        )
    if not np.isfinite(rows).all():
        broken = np.flatnonzero(~np.isfinite(rows).all(1))
        image = batch.image_ids[np.searchsorted(batch.offsets, broken[0], side="right") - 1]
        raise DataError(f"image {image} has a descriptor with NaN or infinite values; see what its encoders returned")
    return rows


def exact_scores(rows: Floats, vectors: Floats, positions: Int64s, metric: Metric) -> npt.NDArray[np.float64]:
    """Scores (K, R) of the vectors at `positions` (K, R) for rows (K, D), in double precision; -inf at -1."""
    scores = np.empty(positions.shape)
    step = max(1, _BLOCK_VALUES // max(1, positions.shape[1] * rows.shape[1]))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        near, queries = vectors[positions[some]].astype(np.float64), rows[some].astype(np.float64)
        if metric == "ip":
            scores[some] = np.einsum("krd,kd->kr", near, queries)
        else:
            near -= queries[:, None]
            scores[some] = 0.0 - np.einsum("krd,krd->kr", near, near)
    return np.where(positions < 0, -np.inf, scores)


def exact_shortlist(
    rows: Floats, num: int, vectors: Floats, image_ids: Int64s, metric: Metric
) -> tuple[Int64s, Floats, Floats]:
    """A `Shortlist` by comparison with every vector (n, D) of `image_ids` (n,)."""
    approximate, positions = faiss.knn(rows, vectors, num, FAISS_METRIC[metric])
    scores = exact_scores(rows, vectors, positions, metric).astype(np.float32)
    ids = np.where(positions < 0, -1, image_ids[positions])
    if num >= len(vectors):
        return ids, scores, np.full(len(rows), -np.inf, np.float32)
    last = approximate[:, -1] if metric == "ip" else -approximate[:, -1]
    return ids, scores, last + score_margin(rows, vectors[positions[:, -1]])


def score_margin(rows: Floats, vectors: Floats) -> Floats:
    """How far a float32 score of rows and vectors (K, D) may be off: 16 units in the last place of their norms."""
    squares = np.einsum("kd,kd->k", rows, rows) + np.einsum("kd,kd->k", vectors, vectors)
    return np.asarray(squares * (16 * np.finfo(np.float32).eps), np.float32)


def exact_search(queries: FeatureBatch, database: FeatureBatch, metric: Metric, depth: int) -> Hits:
    """The best `depth` images of the database for every query image, by comparison with every vector."""
    vectors = float_rows(database, queries.descriptors.shape[1])
    ids = np.repeat(database.image_ids, database.counts)

    def shortlist(rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        return exact_shortlist(rows, num, vectors, ids, metric)

    return _per_image(_nearest_images(float_rows(queries), depth, len(vectors), shortlist), queries, depth)


def _nearest_images(rows: Floats, depth: int, num_vectors: int, shortlist: Shortlist, spare: int = _SPARE) -> Hits:
    """The best images for every row, ties by id: shortlists are widened until what they left out cannot matter."""
    if not len(rows) or not num_vectors:
        shape = len(rows), depth
        return Hits(np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32))
    num = min(depth + spare, num_vectors)
    found, scores, floor = shortlist(rows, num)
    best = Hits.ranked(*_best_of_each(found, scores), depth)
    unsettled = np.flatnonzero((floor > -np.inf) & (best.scores[:, -1] <= floor))
    if num < num_vectors and len(unsettled):
        more = _nearest_images(rows[unsettled], depth, num_vectors, shortlist, depth + 2 * spare)
        best.image_ids[unsettled], best.scores[unsettled] = more.image_ids, more.scores
    return best


def _best_of_each(image_ids: Int64s, scores: Floats) -> tuple[Int64s, Floats]:
    """Only the best score of an image stays in a row; its others become -1."""
    order = np.lexsort((-scores, image_ids))
    ids, sorted_scores = in_order(image_ids, order), in_order(scores, order)
    ids[:, 1:][np.diff(ids, axis=1) == 0] = -1
    return ids, sorted_scores


def _per_image(hits: Hits, queries: FeatureBatch, depth: int) -> Hits:
    """The hits of every row become those of every query image, which may have none or many rows."""
    counts = queries.counts
    if (counts == 1).all():
        return hits
    columns = np.arange(counts.max(initial=0))
    own = columns < counts[:, None]
    rows = np.where(own, queries.offsets[:-1, None] + columns, 0)
    shape = (len(queries), len(columns) * depth)
    if not own.any():
        return Hits.ranked(np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32), depth)
    ids = np.where(own[:, :, None], hits.image_ids[rows], -1).reshape(shape)
    return Hits.ranked(*_best_of_each(ids, hits.scores[rows].reshape(shape)), depth)


def code_column(codes: Array) -> pa.FixedSizeBinaryArray:
    """Rows of numbers (K, B) as one fixed-size binary value each, without a copy."""
    rows = np.ascontiguousarray(codes)
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])


def codes_of(entries: pa.Table, dtype: npt.DTypeLike, width: int, name: str = "code") -> Array:
    """A column of codes as an array (K, width); DataError if the codes have another size."""
    column, size = entries.column(name), width * np.dtype(dtype).itemsize
    if column.type != pa.binary(size):
        raise DataError(f"entries hold codes of type {column.type}, but this index stores {size} bytes per vector")
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size) for chunk in column.chunks
    ]
    return np.concatenate([np.empty(0, np.uint8), *parts]).view(dtype).reshape(-1, width)


def stored_order(lists: npt.NDArray[Any], image_ids: Int64s, codes: Array) -> Int64s:
    """The order in which entries are stored, by list, image and code, whatever order they came in."""
    order = np.lexsort((image_ids, lists))
    repeated = (np.diff(image_ids[order]) == 0) & (np.diff(lists[order]) == 0)
    if not repeated.any():
        return order
    whole = codes.view(f"S{codes.shape[1] * codes.itemsize}").ravel()
    return np.lexsort((whole, image_ids, lists))
