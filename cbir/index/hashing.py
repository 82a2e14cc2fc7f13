"""Vectors as bits, compared by the Hamming distance: what all methods of hashing share.

A method finds a projection W (bits, D) and offsets b (bits,), and makes a bit of every value of Wx + b. The values are
computed without rounding errors that depend on the batch, so that an image has the same bits wherever it is encoded.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from cbir.encoding.product import ReproducibleProduct
from cbir.errors import ArtifactError, DataError
from cbir.index.code_partition import CodePartition, code_entries
from cbir.index.dense import array_view, float_rows, open_mapped
from cbir.index.index import Index, IndexSpec
from cbir.types import FeatureBatch, Float64s, Floats, Int64s, Pixels, State

__all__ = ["Hasher", "HashingIndex", "HashingPartition", "HashingSpec", "SignHasher"]

Bits = npt.NDArray[np.bool_]

_BLOCK_ROWS = 1 << 12
_MOST_BITS_OF_A_TABLE = 32


class Hasher(ABC):
    """A projection (bits, D) and offsets (bits,), both float32, and the faiss index that does the same."""

    form: ClassVar[str]
    """The faiss index that holds codes."""

    def __init__(self, projection: Floats, offsets: Floats) -> None:
        self.projection, self.offsets = projection, offsets
        self._product = ReproducibleProduct(projection)

    @property
    def dim(self) -> int:
        """D of the vectors."""
        return int(self.projection.shape[1])

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return len(self.projection)

    def codes(self, rows: Floats) -> Pixels:
        """(K, D) -> (K, bits / 8), the first bit in the lowest place."""
        codes = np.empty((len(rows), self.num_bits // 8), np.uint8)
        for start in range(0, len(rows), _BLOCK_ROWS):
            some = slice(start, start + _BLOCK_ROWS)
            codes[some] = np.packbits(self.bits(self._product(rows[some]) + self.offsets), axis=1, bitorder="little")
        return codes

    def transform(self) -> Any:
        """The projection and the offsets as a step of a faiss index."""
        transform: Any = faiss.LinearTransform(self.dim, self.num_bits, True)
        faiss.copy_array_to_vector(np.ascontiguousarray(self.projection).ravel(), transform.A)
        faiss.copy_array_to_vector(np.ascontiguousarray(self.offsets), transform.b)
        transform.is_trained = True
        return transform

    @classmethod
    def of_transform(cls, step: Any) -> Self:
        """Back from `transform`."""
        transform: Any = faiss.downcast_VectorTransform(step)
        projection = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        return cls(projection, faiss.vector_to_array(transform.b))

    @abstractmethod
    def bits(self, values: Float64s) -> Bits:
        """What becomes of Wx + b (K, bits)."""

    @abstractmethod
    def index(self, image_ids: Int64s, codes: Pixels) -> Any:
        """A faiss index of these codes that makes bits of vectors as this hasher does."""

    @classmethod
    @abstractmethod
    def read(cls, index: Any) -> tuple[Self, Int64s, Pixels] | None:
        """The hasher, the ids (n,) and the codes (n, bits / 8) of an index, views into it; None if it has another
        form."""


class SignHasher(Hasher):
    """A bit says on which side of a hyperplane a vector lies."""

    form = "IndexPreTransform over IndexIDMap over IndexLSH"

    def bits(self, values: Float64s) -> Bits:
        """Values that are not negative."""
        return np.asarray(values >= 0)

    def index(self, image_ids: Int64s, codes: Pixels) -> Any:
        """An IndexLSH that only takes signs, after a linear transform."""
        mapped = faiss.IndexIDMap(faiss.IndexLSH(self.num_bits, self.num_bits, False, False))
        mapped.add_sa_codes(codes, image_ids)
        index = faiss.IndexPreTransform(self.transform(), mapped)
        index.ntotal = len(codes)
        return index

    @classmethod
    def read(cls, index: Any) -> tuple[Self, Int64s, Pixels] | None:
        """From such an index."""
        mapped: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else None
        lsh: Any = faiss.downcast_index(mapped.index) if isinstance(mapped, faiss.IndexIDMap) else None
        if not isinstance(lsh, faiss.IndexLSH):
            return None
        hasher = cls.of_transform(index.chain.at(0))
        ids, codes = np.empty(0, np.int64), np.empty((0, lsh.code_size), np.uint8)
        if index.ntotal:
            ids = array_view(mapped.id_map.data(), index.ntotal)
            codes = array_view(lsh.codes.data(), index.ntotal * lsh.code_size).reshape(-1, lsh.code_size)
        return hasher, ids, codes


class HashingSpec(IndexSpec):
    """Configuration of a method of hashing."""

    suffix: ClassVar[str] = "faiss"
    hasher: ClassVar[type[Hasher]] = SignHasher

    bits: int = Field(ge=8, le=4096, multiple_of=8, examples=[32], description="bits of a code, a multiple of 8")
    tables: PositiveInt | None = Field(
        default=None,
        description="multi-index hashing: cut codes into this many parts with a hash table each, made in memory when a "
        "partition is first searched; without it, every code is compared",
    )
    flips: NonNegativeInt = Field(
        default=1,
        description="bits in which a part may differ to be looked up; codes of distance up to tables (flips + 1) - 1 "
        "are all found, farther ones by chance",
    )

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        if self.tables is not None and self.bits % self.tables:
            raise ValueError(f"tables: {self.tables} parts do not divide {self.bits} bits; set a divisor of bits")
        if self.tables is not None and self.bits // self.tables > _MOST_BITS_OF_A_TABLE:
            least = -(-self.bits // _MOST_BITS_OF_A_TABLE)
            raise ValueError(
                f"tables: {self.tables} parts of {self.bits // self.tables} bits are too long to find anything; "
                f"set at least {least}"
            )
        return self

    def fit(self, rows: Floats, seed: int) -> Hasher:
        """Projection and offsets for the rows (K, D) of the sample; DataError if these are too few."""
        raise NotImplementedError

    def scores(self) -> Floats:
        """The score of every Hamming distance from 0 to bits, falling."""
        return -np.arange(self.bits + 1, dtype=np.float32)

    def train(self, sample: FeatureBatch, seed: int) -> "HashingIndex":
        """Projection and offsets; DataError if the sample does not suffice. Same sample and seed, same bytes."""
        rows = float_rows(sample)
        if not rows.shape[1]:
            raise DataError("the sample holds no features with D > 0, so the size of a vector is unknown")
        return HashingIndex(self, self.fit(rows, seed))

    def restore(self, state: State) -> "HashingIndex":
        """From projection and offsets."""
        return HashingIndex(self, self.hasher(state["projection"], state["offsets"]))

    def load(self, *paths: Path) -> "HashingPartition":
        """Open a partition memory-mapped; only the ids, 8 bytes per vector, are read into memory."""
        (path,) = paths
        index = open_mapped(path)
        if self.hasher.read(index) is None:
            raise ArtifactError(f"{path}: holds a faiss {type(index).__name__}, expected an {self.hasher.form}")
        return HashingPartition(index, self)

    def entry_bytes(self, dim: int) -> int:  # noqa: ARG002 - a code does not grow with D
        """The code and the id."""
        return self.bits // 8 + 8


class HashingIndex(Index):
    """A trained hasher without content."""

    def __init__(self, spec: HashingSpec, hasher: Hasher) -> None:
        self._hasher = hasher
        nothing = np.empty(0, np.int64), np.empty((0, hasher.num_bits // 8), np.uint8)
        self._empty = HashingPartition(hasher.index(*nothing), spec)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, code fixed_size_binary[bits / 8]."""
        codes = self._hasher.codes(float_rows(batch, self._hasher.dim))
        return code_entries(np.repeat(batch.image_ids, batch.counts), codes, HashingPartition.meaning)

    def build(self, entries: pa.Table, totals: State | None = None) -> "HashingPartition":  # noqa: ARG002 - needs none
        """The codes in the order of their images."""
        return self._empty.with_entries(entries)

    def state(self) -> State:
        """`projection` (bits, D) and `offsets` (bits,), float32."""
        return {"projection": self._hasher.projection, "offsets": self._hasher.offsets}


class HashingPartition(CodePartition):
    """Codes of one partition."""

    meaning = "bits, the first in the lowest place of the first byte"

    def __init__(self, index: Any, spec: HashingSpec) -> None:
        stored = spec.hasher.read(index)
        assert stored is not None
        self._hasher, ids, codes = stored
        super().__init__(index, ids, codes)
        self._spec, self._scores = spec, spec.scores()

    def of_codes(self, image_ids: Int64s, codes: Pixels) -> Self:
        """A partition of these codes with the same hasher."""
        return type(self)(self._hasher.index(image_ids, codes), self._spec)

    @cached_property
    def _tables(self) -> Any:
        """The hash tables of the parts of all codes."""
        num = self._spec.tables or 1
        width = self._hasher.num_bits // num
        tables = faiss.IndexBinaryMultiHash(self._hasher.num_bits, num, width)
        tables.nflip = min(self._spec.flips, width)
        tables.add(self._codes)
        return tables

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        asked = self._hasher.codes(rows)
        if self._spec.tables is not None:
            distances, positions = self._tables.search(asked, num)
        else:
            distances, positions = faiss.knn_hamming(asked, self._codes, num)
        missing = positions < 0
        scores = np.where(missing, -np.inf, self._scores[np.where(missing, 0, distances)]).astype(np.float32)
        ids = np.where(missing, -1, self._ids[positions])
        if self._spec.tables is not None:
            return ids, scores, scores[:, -1]
        # Of equal codes faiss keeps the first, and codes lie in the order of their ids: nothing left out can matter.
        return ids, scores, np.nextafter(scores[:, -1], np.float32(-np.inf))
