"""Vectors stored one number per dimension: float32, float16, or 8 bits of each dimension's range.

Every vector is coded by itself, so that its code does not depend on the batch.
"""

from typing import Any, Literal, Self

import faiss
import numpy as np
import numpy.typing as npt

from cbir.errors import DataError
from cbir.types import Floats, State

__all__ = ["NumberFormat", "ScalarCode", "bytes_of"]

NumberFormat = Literal["float32", "float16", "sq8"]

_NUM_BYTES = {"float32": 4, "float16": 2, "sq8": 1}
FAISS_TYPES = {"float16": faiss.ScalarQuantizer.QT_fp16, "sq8": faiss.ScalarQuantizer.QT_8bit}
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def bytes_of(form: NumberFormat, dim: int) -> int:
    """Bytes of a vector of D = dim."""
    return _NUM_BYTES[form] * dim


class ScalarCode:
    """Vectors of D = dim in one format. `ranges`: for sq8, the least value and the width of each dimension (2, D)."""

    def __init__(self, form: NumberFormat, dim: int, ranges: Floats | None = None) -> None:
        self.form, self.dim, self.ranges = form, dim, ranges
        self.num_bytes = bytes_of(form, dim)
        self.faiss: Any = None if form == "float32" else faiss.ScalarQuantizer(dim, FAISS_TYPES[form])
        if self.faiss is not None and ranges is not None:
            faiss.copy_array_to_vector(ranges.ravel(), self.faiss.trained)

    @classmethod
    def train(cls, form: NumberFormat, rows: Floats) -> Self:
        """For sq8, the range of every dimension of the rows (K, D); beyond it, values are cut."""
        dim = rows.shape[1]
        if form != "sq8":
            return cls(form, dim)
        if not len(rows):
            raise DataError("sq8: the range of values needs a sample of at least 1 vector, found 0; set float16")
        quantiser = faiss.ScalarQuantizer(dim, FAISS_TYPES[form])
        quantiser.train(rows)
        return cls(form, dim, faiss.vector_to_array(quantiser.trained).reshape(2, dim))

    @classmethod
    def of_index(cls, index: Any) -> Self:
        """That of a faiss index: an IndexFlat or IndexIVFFlat, or one with a scalar quantiser."""
        if not hasattr(index, "sq"):
            return cls("float32", index.d)
        if index.sq.qtype == FAISS_TYPES["float16"]:
            return cls("float16", index.d)
        return cls("sq8", index.d, faiss.vector_to_array(index.sq.trained).reshape(2, index.d))

    @classmethod
    def restore(cls, form: NumberFormat, dim: int, state: State, key: str) -> Self:
        """With the ranges at this key of a state."""
        return cls(form, dim, state.get(key))

    def encode(self, rows: Floats) -> npt.NDArray[np.uint8]:
        """(K, D) -> (K, B). DataError for a value that float16 cannot hold."""
        if self.faiss is None:
            return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), self.num_bytes)
        if self.form == "float16" and len(rows) and (most := float(np.abs(rows).max())) > _FLOAT16_MAX:
            raise DataError(
                f"float16 holds values up to {_FLOAT16_MAX:g}, found {most:g}; set float32, or add the encoder l2"
            )
        codes: npt.NDArray[np.uint8] = self.faiss.compute_codes(rows)
        return codes

    def decode(self, codes: npt.NDArray[np.uint8]) -> Floats:
        """(K, B) -> (K, D)."""
        if self.faiss is None:
            return np.ascontiguousarray(codes).view(np.float32).reshape(len(codes), self.dim)
        rows: Floats = self.faiss.decode(np.ascontiguousarray(codes))
        return rows

    def state(self, key: str) -> State:
        """The ranges (2, D) of sq8 at this key."""
        return {} if self.ranges is None else {key: self.ranges}
