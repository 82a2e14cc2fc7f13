"""The inverted file with whole vectors."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import faiss
import numpy as np
from pydantic import Field

from cbir.index.coarse import Coarse
from cbir.index.codes import Codes, ListCode, list_contents
from cbir.index.dense import FAISS_METRIC, exact_scores, score_margin
from cbir.index.ivf import InvertedFile, InvertedFilePartition
from cbir.index.scalar import FAISS_TYPES, NumberFormat, ScalarCode, bytes_of
from cbir.types import Floats, Int64s, State

__all__ = ["IvfFlat", "IvfFlatPartition", "VectorCode"]

_BLOCK_VALUES = 1 << 21
_PLACE_BITS = 32


class VectorCode(ListCode):
    """Vectors, or for sq8 their residuals, in a format."""

    def __init__(self, scalar: ScalarCode) -> None:
        self.scalar = scalar

    @property
    def description(self) -> str:
        """The format."""
        return f"{self.scalar.form}, as by faiss" if self.scalar.form == "sq8" else f"{self.scalar.form}, little-endian"

    @property
    def num_bytes(self) -> int:
        """Those of the format."""
        return self.scalar.num_bytes

    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """In the format."""
        return self.scalar.encode(rows - coarse.centroids_of(lists) if self.scalar.form == "sq8" else rows)

    def decode(self, codes: Codes, lists: Int64s, coarse: Coarse) -> Floats:
        """Codes (K, B) of these lists (K,) -> rows (K, D)."""
        rows = self.scalar.decode(codes)
        return rows + coarse.centroids_of(lists) if self.scalar.form == "sq8" else rows

    def empty_index(self, coarse: Coarse) -> Any:
        """An inverted file of this format."""
        index = _faiss_file(self.scalar.form, coarse.faiss_index(), coarse.num_lists, FAISS_METRIC[coarse.metric])
        if self.scalar.ranges is not None:
            faiss.copy_array_to_vector(self.scalar.ranges.ravel(), index.sq.trained)
        return index

    def state(self) -> State:
        """D, and for sq8 the ranges (2, D)."""
        return {"dim": np.array([self.scalar.dim]), **self.scalar.state("ranges")}


class IvfFlatPartition(InvertedFilePartition):
    """Lists of vectors. What faiss finds is scored again in double precision, as the index flat does it."""

    def __init__(self, index: faiss.Index, code_of: Callable[[Any], VectorCode], probes: int) -> None:
        super().__init__(index, code_of, probes)
        self._code = code_of(self.ivf)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        parts = []
        step = max(1, _BLOCK_VALUES // (num * self.dim))
        for start in range(0, len(rows), step):
            parts.append(self._scored(rows[start : start + step], num))
        ids, scores, floor = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ids, scores, floor

    def _scored(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        places, approximate = self._scan(rows, num, places=True)
        needed, positions = np.unique(places, return_inverse=True)
        positions = np.where(places < 0, -1, positions.reshape(places.shape))
        image_ids, vectors = self._stored(needed)
        scores = exact_scores(rows, vectors, positions, self.quantisers.coarse.metric).astype(np.float32)
        floor = approximate[:, -1] + score_margin(rows, vectors[positions[:, -1]])
        return np.where(positions < 0, -1, image_ids[positions]), scores, np.where(positions[:, -1] < 0, -np.inf, floor)

    def _stored(self, places: Int64s) -> tuple[Int64s, Floats]:
        """Image ids (n,) and vectors (n, D) at these sorted places (n,), of which a first -1 stands for nothing."""
        lists, positions = places >> _PLACE_BITS, places & (2**_PLACE_BITS - 1)
        ids, codes = np.empty(len(places), np.int64), np.zeros((len(places), self._code.num_bytes), np.uint8)
        for number in np.unique(lists[places >= 0]).tolist():
            some = slice(*np.searchsorted(lists, [number, number + 1]))
            stored_ids, stored_codes = list_contents(self.ivf.invlists, number)
            ids[some], codes[some] = stored_ids[positions[some]], stored_codes[positions[some]]
        return ids, self._code.decode(codes, np.maximum(lists, 0), self.quantisers.coarse)


class IvfFlat(InvertedFile):
    """An inverted file (Sivic and Zisserman 2003) of whole vectors: exact among those in the lists that it looks into.

    A partition is a faiss `IndexIVFFlat`, or an `IndexIVFScalarQuantizer` for float16 and for sq8, which codes what is
    left of a vector after its list's centroid. Entries: `image_id`, `list` and `code`, the vector in that format.
    """

    name: Literal["ivfflat"] = "ivfflat"
    paper: ClassVar[str] = "Sivic and Zisserman, Video Google: a text retrieval approach to object matching, ICCV 2003"

    code: NumberFormat = Field(
        default="float32", description="4, 2 or 1 bytes per dimension; sq8: 8 bits of each dimension's range"
    )

    @property
    def partition(self) -> type[IvfFlatPartition]:
        """That with exact scores."""
        return IvfFlatPartition

    @property
    def holds(self) -> type[faiss.Index]:
        """IndexIVFFlat or IndexIVFScalarQuantizer."""
        return faiss.IndexIVFFlat if self.code == "float32" else faiss.IndexIVFScalarQuantizer

    def untrained(self, quantiser: faiss.Index, lists: int, seed: int) -> Any:  # noqa: ARG002 - nothing is random here
        """An inverted file of this format."""
        return _faiss_file(self.code, quantiser, lists, FAISS_METRIC[self.metric])

    def code_of(self, ivf: Any) -> VectorCode:
        """The format and its ranges."""
        return VectorCode(ScalarCode.of_index(ivf))

    def restored_code(self, state: State) -> VectorCode:
        """The format with the ranges of the state."""
        return VectorCode(ScalarCode.restore(self.code, int(state["dim"][0]), state, "ranges"))

    def code_bytes(self, dim: int) -> int:
        """Those of the format."""
        return bytes_of(self.code, dim)


def _faiss_file(form: NumberFormat, quantiser: faiss.Index, lists: int, metric: int) -> Any:
    if form == "float32":
        return faiss.IndexIVFFlat(quantiser, quantiser.d, lists, metric)
    return faiss.IndexIVFScalarQuantizer(quantiser, quantiser.d, lists, FAISS_TYPES[form], metric, form == "sq8")
