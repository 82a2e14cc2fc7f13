"""The inverted file with product-quantised residuals."""

from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
from pydantic import Field, PositiveInt, model_validator

from cbir.errors import DataError
from cbir.index.coarse import Coarse
from cbir.index.codes import Codes, ListCode, Quantisers
from cbir.index.dense import FAISS_METRIC, codes_of
from cbir.index.ivf import InvertedFilePartition, set_clustering
from cbir.index.quantisers import codebooks_of, product_codes
from cbir.index.refine import RefinableFile
from cbir.types import Floats, Int64s, State

__all__ = ["FastScanCode", "FastScanPartition", "IvfPq", "ProductCode"]

_FAST_DIMS = 15
"""From 16 dimensions of a part on, faiss fills its tables by matrix products, whose last bits depend on the batch."""


class IvfPq(RefinableFile):
    """IVFADC (Jégou et al. 2011): a coarse quantiser divides the vectors among lists, a product quantiser codes what is
    left of each after its list's centroid; with `opq`, after a learned rotation (Ge et al. 2013).

    Without `lists`, the sample decides: the power of two nearest to 4 sqrt(n) for n sample vectors, but at most n / 39,
    the fewest points that k-means should have per centroid. A partition is a faiss `IndexIVFPQ` with the image ids in
    its lists, inside an `IndexPreTransform` with `opq`; with `fast_scan`, an `IndexIVFPQFastScan` (André et al. 2017),
    which is read into memory; with `refine`, inside an `IndexIDMap` over an `IndexRefine`. Entries: `image_id`, `list`
    and `code`, packed as faiss packs it; with `refine`, `fine`.
    """

    name: Literal["ivfpq"] = "ivfpq"
    paper: ClassVar[str] = "Jégou et al., Product quantization for nearest neighbor search, IEEE TPAMI 2011"

    bytes: PositiveInt = Field(default=16, description="parts of a vector, each coded with `bits` bits; must divide D")
    bits: int = Field(default=8, ge=4, le=8, description="a part has 2^bits centroids; fewer suit small collections")
    opq: bool = Field(default=False, description="rotate the vectors so that their parts are easier to code")
    opq_dim: PositiveInt | None = Field(default=None, description="dimensions kept by the rotation; D if not given")
    polysemous: bool = Field(
        default=False,
        description="order centroids so that Hamming distances imitate distances, for users of faiss's polysemous_ht; "
        "changes no result here and makes training several times dearer",
    )
    fast_scan: bool = Field(
        default=False,
        description="look up 32 codes of 4 bits at once, in tables of 8 bits: several times faster, a little coarser, "
        "so give it `refine`",
    )

    @model_validator(mode="after")
    def _rotation_fits(self) -> Self:
        if self.opq_dim is not None and not self.opq:
            raise ValueError("opq_dim is the size of OPQ's rotation; set opq: true, or leave it out")
        if self.opq_dim is not None and self.opq_dim % self.bytes:
            raise ValueError(f"opq_dim: {self.opq_dim} is not a multiple of bytes: {self.bytes}")
        if self.fast_scan and self.bits != 4:
            raise ValueError(f"fast_scan looks up codes of 4 bits, not of bits: {self.bits}; set bits: 4")
        return self

    def check_dim(self, dim: int) -> None:
        """DataError if the parts do not divide D."""
        kept = self.opq_dim or dim
        if kept > dim:
            raise DataError(f"opq_dim: {kept} dimensions cannot be kept of vectors with D = {dim}; set at most {dim}")
        if kept % self.bytes:
            divisor = next(number for number in range(min(self.bytes, kept), 0, -1) if kept % number == 0)
            rotation = f", or opq: true with opq_dim: {dim - dim % self.bytes}" if dim > self.bytes else ""
            raise DataError(
                f"bytes: {self.bytes} parts do not divide vectors of D = {kept}; "
                f"set a divisor of D, for example bytes: {divisor}{rotation}"
            )
        if self.fast_scan and kept // self.bytes > _FAST_DIMS:
            most = next(number for number in range(_FAST_DIMS, 0, -1) if kept % number == 0)
            raise DataError(
                f"fast_scan: parts of {kept // self.bytes} dimensions are too coarse for 4 bits each; a part may have "
                f"{_FAST_DIMS}: set a divisor of D from bytes: {kept // most} on"
            )
        super().check_dim(kept)

    def check_size(self, found: int, lists: int) -> None:
        """DataError if so many sample vectors are too few for words or lists."""
        self.check_words(found, self.bits)
        super().check_size(found, lists)

    def rotation_identity(self) -> dict[str, Any]:
        """The settings of OPQ."""
        return self.model_dump(mode="json", include={"opq_dim", "bytes", "bits"}) if self.opq else {}

    def train_rotation(self, rows: Floats, seed: int) -> Floats | None:
        """OPQ's rotation (D', D)."""
        if not self.opq:
            return None
        if len(rows) < rows.shape[1]:  # faiss would write beyond its memory
            raise DataError(
                f"opq: a rotation of vectors with D = {rows.shape[1]} needs a sample of at least {rows.shape[1]} "
                f"vectors, found {len(rows)}; set opq: false, take a larger sample, or reduce D by the encoder pca"
            )
        dim = self.opq_dim or rows.shape[1]
        opq = faiss.OPQMatrix(rows.shape[1], self.bytes, dim)
        quantiser = faiss.ProductQuantizer(dim, self.bytes, self.bits)
        set_clustering(quantiser.cp, self.iterations, seed)
        opq.pq, opq.niter = quantiser, self.iterations
        opq.train(rows)
        return faiss.vector_to_array(opq.A).reshape(dim, rows.shape[1])

    def untrained(self, quantiser: faiss.Index, lists: int, seed: int) -> Any:
        """An IndexIVFPQ."""
        index: Any = faiss.IndexIVFPQ(quantiser, quantiser.d, lists, self.bytes, self.bits, FAISS_METRIC[self.metric])
        index.do_polysemous_training = self.polysemous
        set_clustering(index.pq.cp, self.iterations, seed)
        return index

    @property
    def partition(self) -> type[InvertedFilePartition]:
        """That of its fast form, or any inverted file's."""
        return FastScanPartition if self.fast_scan else InvertedFilePartition

    @property
    def holds(self) -> type[faiss.Index]:
        """IndexIVFPQ or its fast form."""
        return faiss.IndexIVFPQFastScan if self.fast_scan else faiss.IndexIVFPQ

    def code_of(self, ivf: Any) -> "ProductCode":
        """The codebooks."""
        return self._code(codebooks_of(ivf.pq))

    def restored_code(self, state: State) -> "ProductCode":
        """The codebooks."""
        return self._code(state["codebooks"])

    def _code(self, codebooks: Floats) -> "ProductCode":
        return (FastScanCode if self.fast_scan else ProductCode)(codebooks)

    def code_bytes(self, dim: int) -> int:  # noqa: ARG002 - a code does not grow with D
        """`bits` for each part."""
        return (self.bytes * self.bits + 7) // 8


class ProductCode(ListCode):
    """Residuals in words of codebooks (parts, 2^bits, D / parts)."""

    description = "product quantiser, packed from the lowest bit as by faiss"

    def __init__(self, codebooks: Floats) -> None:
        self.codebooks = codebooks

    @property
    def num_bytes(self) -> int:
        """`bits` for each part, rounded up to whole bytes."""
        num_parts, num_words, _ = map(int, self.codebooks.shape)
        return (num_parts * (num_words.bit_length() - 1) + 7) // 8

    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """The nearest words of the residuals."""
        return product_codes(rows - coarse.centroids_of(lists), self.codebooks)

    def empty_index(self, coarse: Coarse) -> Any:
        """An IndexIVFPQ."""
        num_parts, num_words, _ = self.codebooks.shape
        num_bits, metric = num_words.bit_length() - 1, FAISS_METRIC[coarse.metric]
        index: Any = faiss.IndexIVFPQ(coarse.faiss_index(), coarse.dim, coarse.num_lists, num_parts, num_bits, metric)
        faiss.copy_array_to_vector(np.ravel(self.codebooks), index.pq.centroids)
        index.use_precomputed_table = -1
        return index

    def state(self) -> State:
        """Codebooks (parts, 2^bits, D / parts)."""
        return {"codebooks": self.codebooks}


class FastScanCode(ProductCode):
    """The same codes of 4 bits, stored in blocks of 32 for the registers of a processor."""

    def searchable(self, index: Any) -> Any:
        """An IndexIVFPQFastScan."""
        packed = faiss.IndexIVFPQFastScan(index)
        index.reset()  # the two share a coarse quantiser, so that the first stays; its lists need not
        return packed

    def code_lists(self, index: Any) -> Any:
        """The codes taken out of their blocks."""
        lists = faiss.ArrayInvertedLists(index.nlist, self.num_bytes)
        index.orig_invlists = lists
        index.reconstruct_orig_invlists()
        index.orig_invlists = None
        return lists


class FastScanPartition(InvertedFilePartition):
    """Lists of blocks of codes, read into memory.

    faiss divides the tables of a query by their range. Where that is zero, as for a vector of zeros, it finds nothing
    or scores that are no numbers, and the codes are looked up in tables of floats.
    """

    def _scan(self, rows: Floats, num: int, *, places: bool = False) -> tuple[Int64s, Floats]:
        ids, scores = super()._scan(rows, num, places=places)
        lost = np.flatnonzero(np.isnan(scores).any(1) | (ids < 0).all(1))
        if len(lost):
            ids[lost], scores[lost] = self._floats._scan(rows[lost], num, places=places)
        return ids, scores

    @cached_property
    def _floats(self) -> InvertedFilePartition:
        """The same codes one after the other."""
        entries, codebooks = self.entries(), codebooks_of(self.ivf.pq)
        quantisers = Quantisers(None, self.quantisers.coarse, ProductCode(codebooks))
        ids, lists = (entries.column(name).to_numpy() for name in ("image_id", "list"))
        codes = codes_of(entries, np.uint8, quantisers.code.num_bytes)
        index = quantisers.index_of([(ids, lists, codes)], self.probes)
        return InvertedFilePartition(index, lambda ivf: ProductCode(codebooks_of(ivf.pq)), self.probes)
