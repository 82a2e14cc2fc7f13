"""The inverted file with additively quantised residuals."""

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
from pydantic import Field, PositiveInt, model_validator

from cbir.errors import DataError
from cbir.index.additive import AdditiveEncoder
from cbir.index.coarse import Coarse
from cbir.index.codes import Codes, ListCode
from cbir.index.dense import FAISS_METRIC, Metric
from cbir.index.ivf import set_clustering
from cbir.index.refine import RefinableFile
from cbir.types import Floats, Int64s, State

__all__ = ["AdditiveCode", "IvfAq", "LocalSearchCode"]

Kind = Literal["residual", "local_search", "product_residual"]

_FAISS_FILE: dict[Kind, Any] = {
    "residual": faiss.IndexIVFResidualQuantizer,
    "local_search": faiss.IndexIVFLocalSearchQuantizer,
    "product_residual": faiss.IndexIVFProductResidualQuantizer,
}
_SEARCH_TYPE = {"ip": faiss.AdditiveQuantizer.ST_LUT_nonorm, "l2": faiss.AdditiveQuantizer.ST_norm_float}


class IvfAq(RefinableFile):
    """An inverted file of additive codes (Babenko and Lempitsky 2014): what is left of a vector after its list's
    centroid is a sum of words over all D dimensions, which errs less than a product quantiser of as many bits.

    `residual` (Chen et al. 2010) trains each codebook on what the ones before it leave over; `local_search` (LSQ++,
    Martinez et al. 2018) all together; `product_residual` has one residual quantiser for each of `splits` parts of a
    vector. A partition is the faiss inverted file of that name. Entries: `image_id`, `list` and `code`, packed as faiss
    packs it, with metric l2 ended by the squared norm of the sum as float32; with `refine`, `fine`.
    """

    name: Literal["ivfaq"] = "ivfaq"
    paper: ClassVar[str] = "Babenko and Lempitsky, Additive quantization for extreme vector compression, CVPR 2014"

    metric: Metric = Field(
        default="l2",
        description="ip: inner product; l2: Euclidean distance, for a norm of 4 bytes in each code. A sum tends to be "
        "shorter than the vector it stands for, so l2 ranks unit vectors better",
    )
    bytes: PositiveInt = Field(default=8, description="codebooks, of which each codes a vector with `bits` bits")
    bits: int = Field(default=8, ge=4, le=8, description="a codebook has 2^bits words; fewer are faster to code with")
    iterations: PositiveInt = Field(default=10, description="of the training of each codebook, and of k-means")
    quantiser: Kind = Field(default="residual", description="residual, local_search or product_residual")
    splits: PositiveInt | None = Field(
        default=None, description="for product_residual: parts of a vector; must divide `bytes` and D; 2 if not given"
    )

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        if self.splits is not None and self.quantiser != "product_residual":
            raise ValueError("splits are the parts of quantiser: product_residual; set it, or leave splits out")
        if self.bytes % self.num_splits:
            raise ValueError(f"splits: {self.num_splits} parts do not divide bytes: {self.bytes}; set a divisor")
        return self

    @property
    def num_splits(self) -> int:
        """Parts of a vector with a quantiser of their own."""
        return self.splits or (2 if self.quantiser == "product_residual" else 1)

    def check_dim(self, dim: int) -> None:
        """DataError if the parts do not divide D."""
        if dim % self.num_splits:
            raise DataError(f"splits: {self.num_splits} parts do not divide vectors of D = {dim}; set a divisor of D")
        super().check_dim(dim)

    def check_size(self, found: int, lists: int) -> None:
        """DataError if so many sample vectors are too few for words or lists."""
        self.check_words(found, self.bits)
        super().check_size(found, lists)

    @property
    def holds(self) -> type[faiss.Index]:
        """The inverted file of this quantiser."""
        holds: type[faiss.Index] = _FAISS_FILE[self.quantiser]
        return holds

    def untrained(self, quantiser: faiss.Index, lists: int, seed: int) -> Any:
        """The inverted file of this quantiser."""
        shape = (self.num_splits, self.bytes // self.num_splits, self.bits)
        index = _faiss_file(self.quantiser, quantiser, lists, shape, self.metric)
        for part in _parts(_quantiser_of(index)):
            if isinstance(part, faiss.LocalSearchQuantizer):
                part.random_seed, part.train_iters = seed % 2**31, self.iterations
            else:
                set_clustering(part.cp, self.iterations, seed)
        return index

    def code_of(self, ivf: Any) -> "AdditiveCode":
        """The codebooks."""
        parts = _parts(_quantiser_of(ivf))
        shape = (parts[0].M, 1 << self.bits, parts[0].d)
        codebooks = np.stack([faiss.vector_to_array(part.codebooks).reshape(shape) for part in parts])
        return self._code(codebooks)

    def restored_code(self, state: State) -> "AdditiveCode":
        """The codebooks."""
        return self._code(state["codebooks"])

    def _code(self, codebooks: Floats) -> "AdditiveCode":
        code = LocalSearchCode if self.quantiser == "local_search" else AdditiveCode
        return code(self.quantiser, codebooks, self.metric)

    def code_bytes(self, dim: int) -> int:  # noqa: ARG002 - a code does not grow with D
        """`bits` for each codebook and, with metric l2, 32 for the norm."""
        return (self.bytes * self.bits + (32 if self.metric == "l2" else 0) + 7) // 8


class AdditiveCode(ListCode):
    """Residuals as sums of words of codebooks (S, M / S, 2^bits, D / S) for S parts of a vector, chosen by faiss's beam
    search. It looks at one vector after the other: in a batch it would multiply matrices that depend on all."""

    description = "additive quantiser, packed from the lowest bit as by faiss"

    def __init__(self, kind: Kind, codebooks: Floats, metric: Metric) -> None:
        self.codebooks = codebooks
        self.kind: Kind = kind
        self.faiss: Any = _faiss_quantiser(kind, *_shape(codebooks), metric)
        _set_codebooks(self.faiss, codebooks)

    @property
    def num_bytes(self) -> int:
        """`bits` for each codebook and 32 for a norm, rounded up to whole bytes."""
        return int(self.faiss.code_size)

    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """The words of the residuals and, with metric l2, the squared norms of their sums."""
        residuals = rows - coarse.centroids_of(lists)
        codes = np.empty((len(rows), self.num_bytes), np.uint8)
        for residual, code in zip(residuals, codes, strict=True):
            self.faiss.compute_codes_c(faiss.swig_ptr(residual), faiss.swig_ptr(code), 1)
        return codes

    def empty_index(self, coarse: Coarse) -> Any:
        """The inverted file of this quantiser."""
        index = _faiss_file(
            self.kind, coarse.faiss_index(), coarse.num_lists, _shape(self.codebooks)[1:], coarse.metric
        )
        _set_codebooks(_quantiser_of(index), self.codebooks)
        return index

    def state(self) -> State:
        """Codebooks (S, M / S, 2^bits, D / S)."""
        return {"codebooks": self.codebooks}


class LocalSearchCode(AdditiveCode):
    """Residuals as sums of words of codebooks (1, M, 2^bits, D), which stand side by side, chosen by local search."""

    @cached_property
    def _encoder(self) -> AdditiveEncoder:
        """Made when it is needed: a partition that is only searched can do without its tables."""
        return AdditiveEncoder(self.codebooks[0])

    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """The words of the residuals and, with metric l2, the squared norms of their sums."""
        words = self._encoder.words(rows - coarse.centroids_of(lists)).astype(np.int32)
        sums = np.zeros_like(rows)
        for book, numbers in zip(self.codebooks[0], words.T, strict=True):
            sums += book[numbers]
        norms, codes = np.add.reduce(sums * sums, axis=1), np.empty((len(rows), self.num_bytes), np.uint8)
        words_at, codes_at, norms_at = (faiss.swig_ptr(array) for array in (words, codes, norms))
        self.faiss.pack_codes(len(rows), words_at, codes_at, words.shape[1], norms_at)
        return codes


def _shape(codebooks: Floats) -> tuple[int, int, int, int]:
    """D, and what a faiss quantiser is made with: S, M / S and bits."""
    num_splits, num_books, num_words, width = codebooks.shape
    return num_splits * width, num_splits, num_books, num_words.bit_length() - 1


def _faiss_quantiser(kind: Kind, dim: int, splits: int, books: int, bits: int, metric: Metric) -> Any:
    if kind == "product_residual":
        return faiss.ProductResidualQuantizer(dim, splits, books, bits, _SEARCH_TYPE[metric])
    quantiser = faiss.LocalSearchQuantizer if kind == "local_search" else faiss.ResidualQuantizer
    return quantiser(dim, books, bits, _SEARCH_TYPE[metric])


def _faiss_file(kind: Kind, quantiser: Any, lists: int, shape: tuple[int, int, int], metric: Metric) -> Any:
    """An inverted file of a shape: splits, codebooks of each, bits of each."""
    sizes = shape if kind == "product_residual" else shape[1:]
    file = _FAISS_FILE[kind]
    index = file(quantiser, quantiser.d, lists, *sizes, FAISS_METRIC[metric], _SEARCH_TYPE[metric])
    index.referenced_objects = [quantiser]  # the bindings keep the quantiser alive for two of the three classes only
    return index


def _quantiser_of(index: Any) -> Any:
    """The additive quantiser of an inverted file."""
    return faiss.downcast_AdditiveQuantizer(index.aq)  # type: ignore[attr-defined]


def _parts(quantiser: Any) -> list[Any]:
    """The residual or local-search quantisers that an additive quantiser consists of."""
    if not isinstance(quantiser, faiss.ProductResidualQuantizer):
        return [quantiser]
    parts = [quantiser.subquantizer(number) for number in range(quantiser.nsplits)]
    return [faiss.downcast_AdditiveQuantizer(part) for part in parts]  # type: ignore[attr-defined]


def _set_codebooks(quantiser: Any, codebooks: Floats) -> None:
    parts = _parts(quantiser)
    for part, books in zip(parts, codebooks, strict=True):
        faiss.copy_array_to_vector(books.ravel(), part.codebooks)
        part.is_trained = True
    if len(parts) > 1:
        faiss.copy_array_to_vector(codebooks.ravel(), quantiser.codebooks)
        quantiser.is_trained = True
