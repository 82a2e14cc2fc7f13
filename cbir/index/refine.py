"""Re-ranking by finer codes (Jégou et al. 2011): what an inverted file finds by short codes is scored again.

All is in one plain faiss file: an `IndexIDMap` over an `IndexRefine`, whose inverted file holds the places of vectors
in place of image ids, and whose finer codes lie in the order of image ids.
"""

from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from cbir.errors import ArtifactError
from cbir.index.codes import Codes
from cbir.index.dense import (
    FAISS_METRIC,
    DensePartition,
    Metric,
    array_view,
    code_column,
    codes_of,
    exact_scores,
    float_rows,
    open_mapped,
    stored_order,
)
from cbir.index.index import Assignment, Index
from cbir.index.ivf import InvertedFile, InvertedFileIndex, InvertedFilePartition
from cbir.index.scalar import FAISS_TYPES, NumberFormat, ScalarCode, bytes_of
from cbir.types import FeatureBatch, Floats, Hits, Int64s, State

__all__ = ["RefinableFile", "RefinedIndex", "RefinedPartition"]

_BLOCK_VALUES = 1 << 21
_KEY = "refine_ranges"


class RefinedPartition(DensePartition):
    """One partition: an inverted file whose ids are the places of vectors, and finer codes in this order."""

    def __init__(self, index: faiss.IndexIDMap, base: InvertedFilePartition, factor: int) -> None:
        super().__init__(index, index.d)
        self._base, self._factor = base, factor
        refine: Any = faiss.downcast_index(index.index)
        fine: Any = faiss.downcast_index(refine.refine_index)
        self._fine = ScalarCode.of_index(fine)
        self._metric: Metric = "ip" if fine.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        self._ids, self._codes = np.empty(0, np.int64), np.empty((0, self._fine.num_bytes), np.uint8)
        if index.ntotal:
            # Views into the index, so that a mapped file stays on the disk until it is searched.
            self._ids = array_view(index.id_map.data(), index.ntotal)
            stored = array_view(fine.codes.data(), index.ntotal * self._fine.num_bytes)
            self._codes = stored.reshape(-1, self._fine.num_bytes)

    @classmethod
    def of(cls, base: InvertedFilePartition, fine: ScalarCode, codes: Codes, image_ids: Int64s, factor: int) -> Self:
        """Of an inverted file of places, and codes (n, B) and image ids (n,) by place, in the order of image ids."""
        stored = _faiss_index(fine, FAISS_METRIC[base.quantisers.coarse.metric])
        stored.add_sa_codes(codes)
        refine: Any = faiss.IndexRefine(base.faiss, stored)
        refine.k_factor, refine.ntotal = factor, 0  # an IndexIDMap takes only what is empty
        index: Any = faiss.IndexIDMap(refine)
        refine.ntotal = index.ntotal = len(image_ids)
        faiss.copy_array_to_vector(image_ids, index.id_map)
        return cls(index, base, factor)

    def entries(self) -> pa.Table:
        """The codes, and their lists and images."""
        entries = self._base.entries()
        places = entries.column("image_id").to_numpy()
        entries = entries.set_column(0, entries.schema.field(0), pa.array(self._ids[places]))
        return _with_fine(entries, self._codes[places])

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these codes."""
        ids, lists = (entries.column(name).to_numpy() for name in ("image_id", "list"))
        codes = codes_of(entries, np.uint8, self._base.quantisers.code.num_bytes)
        fine = codes_of(entries, np.uint8, self._fine.num_bytes, name="fine")
        order = _place_order(ids, lists, codes, fine)
        places = {"image_id": np.arange(len(ids)), "list": lists[order], "code": code_column(codes[order])}
        base = self._base.with_entries(pa.table(places))
        return self.of(base, self._fine, fine[order], ids[order], self._factor)

    def _nearest(self, rows: Floats, depth: int) -> Hits:
        candidates = super()._nearest(rows, depth * self._factor).image_ids
        scores = np.empty(candidates.shape, np.float32)
        step = max(1, _BLOCK_VALUES // (candidates.shape[1] * self.dim))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            scores[some] = self._fine_scores(rows[some], candidates[some])
        return Hits.ranked(candidates, scores, depth)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        places, scores, floor = self._base._shortlist(rows, num)
        return np.where(places < 0, -1, self._ids[places]), scores, floor

    def _fine_scores(self, rows: Floats, image_ids: Int64s) -> Floats:
        """For each of the images (K, F), which -1 pads, the score of the best of its vectors."""
        if not len(self._ids):
            return np.full(image_ids.shape, -np.inf, np.float32)
        first, end = (np.searchsorted(self._ids, image_ids, side) for side in ("left", "right"))
        places = first[:, :, None] + np.arange((end - first).max(initial=1))
        places = np.where(places < end[:, :, None], places, -1)
        needed, positions = np.unique(places, return_inverse=True)
        flat = np.where(places < 0, -1, positions.reshape(places.shape)).reshape(len(rows), -1)
        scores = exact_scores(rows, self._fine.decode(self._codes[needed]), flat, self._metric)
        best: Floats = scores.reshape(places.shape).max(2).astype(np.float32)
        return best


class RefinedIndex(Index):
    """A trained inverted file with a finer code, without content."""

    def __init__(self, index: InvertedFileIndex, fine: ScalarCode, factor: int) -> None:
        self._index, self._fine = index, fine
        nothing = np.empty((0, fine.num_bytes), np.uint8)
        self._empty = RefinedPartition.of(index.empty, fine, nothing, np.empty(0, np.int64), factor)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, list int32, code and fine fixed_size_binary."""
        return _with_fine(self._index.entries(batch), self._fine.encode(float_rows(batch)))

    def build(self, entries: pa.Table, totals: State | None = None) -> RefinedPartition:  # noqa: ARG002 - needs none
        """The codes in the order of their lists and images, the finer ones in that of images."""
        return self._empty.with_entries(entries)

    def assignment(self, batch: FeatureBatch) -> Assignment:
        """That of the inverted file."""
        return self._index.assignment(batch)

    def state(self) -> State:
        """The arrays of the quantisers, and for sq8 refine_ranges (2, D)."""
        return {**self._index.state(), **self._fine.state(_KEY)}


class RefinableFile(InvertedFile):
    """An inverted file of short codes, which finer codes may refine."""

    refine: NumberFormat | None = Field(
        default=None,
        description="keep each vector also in 4, 2 or 1 bytes per dimension, and score the best images again by it; "
        "every partition does so with its own best images, so that more partitions find no less",
    )
    refine_factor: PositiveInt = Field(
        default=10, description="with `refine`: how many times the images asked for are scored again"
    )

    def finish(self, codebook: State, sample: FeatureBatch, seed: int) -> Index:
        """The code of what the lists leave of the sample's rows, and the finer code."""
        index = self.finished_file(codebook, sample, seed)
        if not self.refine:
            return index
        return RefinedIndex(index, ScalarCode.train(self.refine, float_rows(sample)), self.refine_factor)

    def restore(self, state: State) -> Index:
        """From the arrays of the quantisers, and of the finer code."""
        index = self.restored_file(state)
        if not self.refine:
            return index
        return RefinedIndex(
            index, ScalarCode.restore(self.refine, index.quantisers.dim, state, _KEY), self.refine_factor
        )

    def load(self, *paths: Path) -> DensePartition:
        """Open a partition memory-mapped; with `refine`, only image ids, 8 bytes per vector, are read into memory."""
        if not self.refine:
            return super().load(*paths)
        (path,) = paths
        whole: Any = open_mapped(path)
        refine: Any = faiss.downcast_index(whole.index) if isinstance(whole, faiss.IndexIDMap) else whole
        if not isinstance(refine, faiss.IndexRefine):
            raise ArtifactError(
                f"{path}: holds a faiss {type(whole).__name__}, expected an IndexIDMap over IndexRefine"
            )
        base = self.opened(faiss.downcast_index(refine.base_index), path)
        return RefinedPartition(whole, base, self.refine_factor)

    def entry_bytes(self, dim: int) -> int:
        """The code and the id; with `refine`, also the finer code and the place."""
        return super().entry_bytes(dim) + (bytes_of(self.refine, dim) + 8 if self.refine else 0)


def _place_order(image_ids: Int64s, lists: Int64s, codes: Codes, fine: Codes) -> Int64s:
    """The order of image ids; several vectors of an image by all that is stored of them."""
    order = np.argsort(image_ids, kind="stable")
    if (np.diff(image_ids[order]) > 0).all():
        return order
    stored = np.hstack([lists.astype(">i4")[:, None].view(np.uint8), codes, fine])
    return stored_order(np.zeros(len(image_ids), np.int8), image_ids, stored)


def _faiss_index(fine: ScalarCode, metric: int) -> Any:
    """An empty faiss index of these codes."""
    if fine.form == "float32":
        return faiss.IndexFlat(fine.dim, metric)
    index: Any = faiss.IndexScalarQuantizer(fine.dim, FAISS_TYPES[fine.form], metric)
    if fine.ranges is not None:
        faiss.copy_array_to_vector(fine.ranges.ravel(), index.sq.trained)
    index.is_trained = True
    return index


def _with_fine(entries: pa.Table, codes: Codes) -> pa.Table:
    field = pa.field("fine", pa.binary(codes.shape[1]), nullable=False)
    return entries.append_column(field, code_column(codes))
