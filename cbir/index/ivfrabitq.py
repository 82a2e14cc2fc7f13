"""The inverted file with RaBitQ codes."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import faiss
import numpy as np
from pydantic import Field

from cbir.index.coarse import Coarse
from cbir.index.codes import Codes, ListCode
from cbir.index.dense import FAISS_METRIC, Metric, array_view
from cbir.index.ivf import InvertedFilePartition
from cbir.index.refine import RefinableFile
from cbir.types import Floats, Int64s, State

__all__ = ["IvfRabitq", "RabitqCode", "RabitqPartition"]

_QUERY_BITS = 8
_BLOCK_ROWS = 64


class IvfRabitq(RefinableFile):
    """RaBitQ (Gao and Long 2024) in an inverted file: after a random rotation, the signs of what is left of a vector
    after its list's centroid, and two numbers with which the estimated distance has no bias; no codebook is trained.
    With more `bits` (Gao et al. 2025), a finer grid than the signs.

    A partition is a faiss `IndexIVFRaBitQ` inside an `IndexPreTransform`. Entries: `image_id`, `list` and `code`; with
    `refine`, `fine`.
    """

    name: Literal["ivfrabitq"] = "ivfrabitq"
    paper: ClassVar[str] = "Gao and Long, RaBitQ: quantizing high-dimensional vectors for ANN search, SIGMOD 2024"

    bits: int = Field(
        default=1, ge=1, le=9, description="bits of a dimension; 1 is by far the fastest and should have `refine`"
    )

    @property
    def partition(self) -> type[InvertedFilePartition]:
        """For more than one bit, that which compares with all codes of a list."""
        return InvertedFilePartition if self.bits == 1 else RabitqPartition

    @property
    def holds(self) -> type[faiss.Index]:
        """IndexIVFRaBitQ."""
        return faiss.IndexIVFRaBitQ

    def rotation_identity(self) -> dict[str, Any]:
        """It depends on the seed alone."""
        return {"random": True}

    def train_rotation(self, rows: Floats, seed: int) -> Floats:
        """A random rotation (D, D)."""
        dim = rows.shape[1]
        rotation: Any = faiss.RandomRotationMatrix(dim, dim)
        rotation.init(seed % 2**31)
        return faiss.vector_to_array(rotation.A).reshape(dim, dim)

    def untrained(self, quantiser: faiss.Index, lists: int, seed: int) -> Any:  # noqa: ARG002 - the code is not trained
        """An IndexIVFRaBitQ."""
        return faiss.IndexIVFRaBitQ(quantiser, quantiser.d, lists, FAISS_METRIC[self.metric], True, self.bits)

    def code_of(self, ivf: Any) -> "RabitqCode":
        """Bits for D."""
        return RabitqCode(ivf.d, self.bits, self.metric)

    def restored_code(self, state: State) -> "RabitqCode":
        """Bits for D."""
        return RabitqCode(len(state["rotation"]), self.bits, self.metric)

    def code_bytes(self, dim: int) -> int:
        """`bits` for each dimension and the numbers of the estimate."""
        return RabitqCode(dim, self.bits, self.metric).num_bytes


class RabitqCode(ListCode):
    """`bits` bits of every dimension of the residual, with the numbers of the estimate."""

    description = "RaBitQ, as by faiss"

    def __init__(self, dim: int, bits: int, metric: Metric) -> None:
        self._bits = bits
        self._quantiser: Any = faiss.RaBitQuantizer(dim, FAISS_METRIC[metric], bits)  # type: ignore[call-arg]

    @property
    def num_bytes(self) -> int:
        """The bits of all dimensions and the numbers of the estimate."""
        return int(self._quantiser.code_size)

    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """List by list; faiss codes every vector by itself."""
        codes = np.zeros((len(rows), self.num_bytes), np.uint8)
        order = np.argsort(lists, kind="stable")
        numbers, starts, sizes = np.unique(lists[order], return_index=True, return_counts=True)
        for centroid, start, size in zip(coarse.centroids_of(numbers), starts, sizes, strict=True):
            some = order[start : start + size]
            codes[some] = self._encode(rows[some], centroid)
        return codes

    def _encode(self, rows: Floats, centroid: Floats) -> Codes:
        codes = np.zeros((len(rows), self.num_bytes), np.uint8)
        rows_at, codes_at, centroid_at = (faiss.swig_ptr(array) for array in (rows, codes, centroid))
        self._quantiser.compute_codes_core(rows_at, codes_at, len(rows), centroid_at)
        return codes

    def empty_index(self, coarse: Coarse) -> Any:
        """An IndexIVFRaBitQ."""
        metric = FAISS_METRIC[coarse.metric]
        index = faiss.IndexIVFRaBitQ(coarse.faiss_index(), coarse.dim, coarse.num_lists, metric, True, self._bits)
        index.qb = _QUERY_BITS
        return index

    def state(self) -> State:
        """Nothing."""
        return {}


class RabitqPartition(InvertedFilePartition):
    """Lists of codes of several bits. faiss's search reads only the first bit of a vector that this bit tells is hardly
    among the best so far, which depends on what else is in the partition; a range search reads all bits of all."""

    def _scan(self, rows: Floats, num: int, *, places: bool = False) -> tuple[Int64s, Floats]:
        ids, scores = np.full((len(rows), num), -1, np.int64), np.full((len(rows), num), -np.inf, np.float32)
        for start in range(0, len(rows), _BLOCK_ROWS):
            for row, (found, distances) in enumerate(self._all(rows[start : start + _BLOCK_ROWS], places), start):
                values = distances if self.quantisers.coarse.metric == "ip" else 0 - distances
                best = np.lexsort((found, -values))[:num]
                ids[row, : len(best)], scores[row, : len(best)] = found[best], values[best]
        return ids, scores

    def _all(self, rows: Floats, places: bool) -> list[tuple[Int64s, Floats]]:
        """The ids and distances of all codes of the lists that each of the rows (K, D') looks into."""
        lists, to_lists = self.quantisers.coarse.nearest_lists(rows, self.probes)
        found: Any = faiss.RangeSearchResult(len(rows))
        radius = -np.inf if self.quantisers.coarse.metric == "ip" else np.inf
        x, probed, offsets = (faiss.swig_ptr(array) for array in (rows, lists, to_lists))
        self.ivf.range_search_preassigned_c(len(rows), x, radius, probed, offsets, found, places)
        ends = array_view(found.lims, len(rows) + 1).copy()
        ids, distances = (array_view(array, int(ends[-1])).copy() for array in (found.labels, found.distances))
        return [(ids[start:end], distances[start:end]) for start, end in pairwise(ends.tolist())]
