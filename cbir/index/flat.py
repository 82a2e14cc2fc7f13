"""The exact index: every vector is compared."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field

from cbir.errors import ArtifactError, DataError
from cbir.index.dense import (
    FAISS_METRIC,
    DensePartition,
    Metric,
    array_view,
    code_column,
    codes_of,
    exact_shortlist,
    float_rows,
    open_mapped,
    stored_order,
)
from cbir.index.index import Index, IndexSpec
from cbir.types import FeatureBatch, Floats, Int64s, State

__all__ = ["Flat", "FlatIndex", "FlatPartition"]

_BLOCK_ROWS = 1 << 14


class Flat(IndexSpec):
    """Exact nearest neighbours by comparison with every vector: no approximation, time and memory grow with N x D.

    A partition is a faiss `IndexIDMap` over an `IndexFlat`. Entries: `image_id` and `code`, the vector's D values as
    little-endian float32 (`np.frombuffer(code, "<f4")`).
    """

    name: Literal["flat"] = "flat"
    paper: ClassVar[str] = "Johnson et al., Billion-scale similarity search with GPUs, IEEE Trans. Big Data 2021"
    suffix: ClassVar[str] = "faiss"

    metric: Metric = Field(default="ip", description="ip: inner product; l2: Euclidean distance")

    @property
    def trained(self) -> bool:
        """Only D matters."""
        return False

    def train(self, sample: FeatureBatch, seed: int) -> "FlatIndex":  # noqa: ARG002 - nothing is random here
        """Take note of D."""
        return FlatIndex(self, sample.descriptors.shape[1])

    def restore(self, state: State) -> "FlatIndex":
        """From D."""
        return FlatIndex(self, int(state["dim"][0]))

    def load(self, *paths: Path) -> "FlatPartition":
        """Open a partition memory-mapped; only the ids, 8 bytes per vector, are read into memory."""
        (path,) = paths
        index = open_mapped(path)
        if not isinstance(index, faiss.IndexIDMap) or not isinstance(
            faiss.downcast_index(index.index), faiss.IndexFlat
        ):
            raise ArtifactError(f"{path}: holds a faiss {type(index).__name__}, expected an IndexIDMap over IndexFlat")
        return FlatPartition(index, self.metric)

    def entry_bytes(self, dim: int) -> int:
        """D float32 and the id."""
        return 4 * dim + 8


class FlatIndex(Index):
    """The empty index of vectors of one D."""

    def __init__(self, spec: Flat, dim: int) -> None:
        if dim < 1:
            raise DataError("the sample holds no features with D > 0, so the size of a vector is unknown")
        self._dim = dim
        self._empty = FlatPartition(faiss.IndexIDMap(faiss.IndexFlat(dim, FAISS_METRIC[spec.metric])), spec.metric)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, code fixed_size_binary[4 D]."""
        return _entries(np.repeat(batch.image_ids, batch.counts), float_rows(batch, self._dim))

    def build(self, entries: pa.Table, totals: State | None = None) -> "FlatPartition":  # noqa: ARG002 - needs none
        """The vectors in the order of their images."""
        return self._empty.with_entries(entries)

    def state(self) -> State:
        """D."""
        return {"dim": np.array([self._dim], np.int64)}


class FlatPartition(DensePartition):
    """Vectors of one partition."""

    def __init__(self, index: faiss.IndexIDMap, metric: Metric) -> None:
        super().__init__(index, index.d)
        self._metric = metric
        flat: Any = faiss.downcast_index(index.index)
        self._vectors: Floats = np.empty((0, index.d), np.float32)
        self._ids: Int64s = np.empty(0, np.int64)
        if index.ntotal:
            # Views into the index, so that a mapped file stays on the disk until it is searched.
            self._vectors = array_view(flat.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
            self._ids = array_view(index.id_map.data(), index.ntotal)

    def entries(self) -> pa.Table:
        """The vectors and their images."""
        return _entries(self._ids.copy(), self._vectors.copy())

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these vectors."""
        ids, codes = entries.column("image_id").to_numpy(), codes_of(entries, np.float32, self.dim)
        order = stored_order(np.zeros(len(ids), np.int8), ids, codes)
        index = faiss.IndexIDMap(faiss.IndexFlat(self.dim, FAISS_METRIC[self._metric]))
        for start in range(0, len(order), _BLOCK_ROWS):
            some = order[start : start + _BLOCK_ROWS]
            index.add_with_ids(codes[some], ids[some])
        return type(self)(index, self._metric)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        return exact_shortlist(rows, num, self._vectors, self._ids, self._metric)


def _entries(image_ids: Int64s, vectors: Floats) -> pa.Table:
    schema = pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("code", pa.binary(4 * vectors.shape[1]), nullable=False),
        ],
        metadata={"code": "float32, little-endian", "dim": str(vectors.shape[1])},
    )
    return pa.table([pa.array(image_ids), code_column(vectors)], schema=schema)
