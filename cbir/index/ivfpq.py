"""The inverted file with product-quantised residuals."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from cbir.encoding.product import ReproducibleProduct
from cbir.errors import ArtifactError, DataError
from cbir.index.dense import (
    FAISS_METRIC,
    DensePartition,
    Metric,
    array_view,
    code_column,
    codes_of,
    float_rows,
    open_mapped,
    stored_order,
)
from cbir.index.index import Index, IndexSpec
from cbir.index.quantisers import Quantisers, codebooks_of, inverted_file
from cbir.types import FeatureBatch, Floats, Int64s, State

__all__ = ["IvfPq", "IvfPqIndex", "IvfPqPartition"]

_POINTS_PER_LIST = 39


class IvfPq(IndexSpec):
    """IVFADC (Jégou et al. 2011): a coarse quantiser divides the vectors among lists, a product quantiser codes what is
    left of each after its list's centroid; with `opq`, after a learned rotation (Ge et al. 2013).

    Without `lists`, the sample decides: the power of two nearest to 4 sqrt(n) for n sample vectors, but at most n / 39,
    the fewest points that k-means should have per centroid. A partition is a faiss `IndexIVFPQ` with the image ids in
    its lists, inside an `IndexPreTransform` with `opq`. Entries: `image_id`, `list` and `code`, packed as faiss
    packs it.
    """

    name: Literal["ivfpq"] = "ivfpq"
    paper: ClassVar[str] = "Jégou et al., Product quantization for nearest neighbor search, IEEE TPAMI 2011"
    suffix: ClassVar[str] = "faiss"

    lists: PositiveInt | None = Field(default=None, description="inverted lists; without it, chosen from the sample")
    bytes: PositiveInt = Field(default=16, description="parts of a vector, each coded with `bits` bits; must divide D")
    bits: int = Field(default=8, ge=4, le=8, description="a part has 2^bits centroids; fewer suit small collections")
    opq: bool = Field(default=False, description="rotate the vectors so that their parts are easier to code")
    opq_dim: PositiveInt | None = Field(default=None, description="dimensions kept by the rotation; D if not given")
    metric: Metric = Field(default="ip", description="ip: inner product; l2: Euclidean distance")
    probes: PositiveInt = Field(default=16, description="lists that a search looks into")
    polysemous: bool = Field(
        default=False,
        description="order centroids so that Hamming distances imitate distances, for users of faiss's polysemous_ht; "
        "changes no result here and makes training several times dearer",
    )
    iterations: PositiveInt = Field(default=25, description="of k-means in both quantisers, and of OPQ")

    @model_validator(mode="after")
    def _rotation_fits(self) -> Self:
        if self.opq_dim is not None and not self.opq:
            raise ValueError("opq_dim is the size of OPQ's rotation; set opq: true, or leave it out")
        if self.opq_dim is not None and self.opq_dim % self.bytes:
            raise ValueError(f"opq_dim: {self.opq_dim} is not a multiple of bytes: {self.bytes}")
        return self

    def train(self, sample: FeatureBatch, seed: int) -> "IvfPqIndex":
        """Rotation, lists and code book of the sample's rows; DataError if these are too few or do not fit."""
        rows = float_rows(sample)
        self._check_dim(rows.shape[1])
        lists = self.lists or choose_lists(len(rows))
        self._check_size(len(rows), lists)
        rotation = self._train_rotation(rows, seed) if self.opq else None
        rotated = rows if rotation is None else ReproducibleProduct(rotation)(rows).astype(np.float32)
        return IvfPqIndex(self, Quantisers(rotation, *self._train_quantisers(rotated, lists, seed), self.metric))

    def _check_dim(self, dim: int) -> None:
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

    def _check_size(self, found: int, lists: int) -> None:
        words = 2**self.bits
        if found < words:
            raise DataError(
                f"bits: {self.bits} bits need a sample of at least {words} vectors, found {found}; "
                "set fewer bits (4 need 16 vectors), take a larger sample, or use the index flat"
            )
        if found < lists:
            raise DataError(
                f"lists: {lists} lists need a sample of at least {lists} vectors, found {found}; "
                "set fewer lists, take a larger sample, or use the index flat"
            )

    def _train_rotation(self, rows: Floats, seed: int) -> Floats:
        if len(rows) < rows.shape[1]:  # faiss would write beyond its memory
            raise DataError(
                f"opq: a rotation of vectors with D = {rows.shape[1]} needs a sample of at least {rows.shape[1]} "
                f"vectors, found {len(rows)}; set opq: false, take a larger sample, or reduce D by the encoder pca"
            )
        dim = self.opq_dim or rows.shape[1]
        opq = faiss.OPQMatrix(rows.shape[1], self.bytes, dim)
        quantiser = faiss.ProductQuantizer(dim, self.bytes, self.bits)
        self._set_clustering(quantiser.cp, seed)
        opq.pq, opq.niter = quantiser, self.iterations
        opq.train(rows)
        return faiss.vector_to_array(opq.A).reshape(dim, rows.shape[1])

    def _train_quantisers(self, rows: Floats, lists: int, seed: int) -> tuple[Floats, Floats]:
        """Centroids (lists, D') and codebooks (parts, 2^bits, D' / parts)."""
        quantiser = faiss.IndexFlat(rows.shape[1], FAISS_METRIC[self.metric])
        index: Any = faiss.IndexIVFPQ(quantiser, rows.shape[1], lists, self.bytes, self.bits, FAISS_METRIC[self.metric])
        index.do_polysemous_training = self.polysemous
        self._set_clustering(index.cp, seed)
        self._set_clustering(index.pq.cp, seed)
        index.train(rows)
        return quantiser.reconstruct_n(0, lists), codebooks_of(index.pq)

    def _set_clustering(self, parameters: faiss.ClusteringParameters, seed: int) -> None:
        parameters.seed, parameters.niter = seed % 2**31, self.iterations
        parameters.min_points_per_centroid = 1  # `train` has already refused what cannot work; faiss would only warn

    def restore(self, state: State) -> "IvfPqIndex":
        """From centroids, codebooks and rotation."""
        return IvfPqIndex(self, Quantisers(state.get("rotation"), state["centroids"], state["codebooks"], self.metric))

    def load(self, *paths: Path) -> "IvfPqPartition":
        """Open a partition memory-mapped: lists stay on the disk until they are searched."""
        (path,) = paths
        index = open_mapped(path)
        if not isinstance(inverted_file(index), faiss.IndexIVFPQ):
            raise ArtifactError(f"{path}: holds a faiss {type(index).__name__}, expected an IndexIVFPQ")
        return IvfPqPartition(index, self.probes)

    def entry_bytes(self, dim: int) -> int:  # noqa: ARG002 - a code does not grow with D
        """The code and the id."""
        return (self.bytes * self.bits + 7) // 8 + 8


def choose_lists(num_vectors: int) -> int:
    """The power of two nearest to 4 sqrt(n), at most n / 39, at least 1."""
    most = max(1, num_vectors // _POINTS_PER_LIST)
    return int(min(2 ** round(math.log2(4 * math.sqrt(max(1, num_vectors)))), 2 ** int(math.log2(most))))


class IvfPqIndex(Index):
    """A trained index without content."""

    def __init__(self, spec: IvfPq, coder: Quantisers) -> None:
        self._quantisers = coder
        self._empty = IvfPqPartition(coder.empty_index(spec.probes), spec.probes)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, list int32, code fixed_size_binary."""
        rows = self._quantisers.rotate(float_rows(batch, self._quantisers.dim))
        return _entries(np.repeat(batch.image_ids, batch.counts), *self._quantisers.encode(rows))

    def build(self, entries: pa.Table, totals: State | None = None) -> "IvfPqPartition":  # noqa: ARG002 - needs none
        """The codes in the order of their lists and images."""
        return self._empty.with_entries(entries)

    def state(self) -> State:
        """Centroids (lists, D'), codebooks (parts, 2^bits, D' / parts) and, with `opq`, rotation (D', D)."""
        state = {"centroids": self._quantisers.centroids, "codebooks": self._quantisers.codebooks}
        return state if self._quantisers.rotation is None else {**state, "rotation": self._quantisers.rotation}


class IvfPqPartition(DensePartition):
    """Lists of codes of one partition."""

    def __init__(self, index: faiss.Index, probes: int) -> None:
        super().__init__(index, index.d)
        self._ivf = inverted_file(index)
        self._quantisers = Quantisers.of_index(index)
        self._probes = min(probes, self._ivf.nlist)

    def entries(self) -> pa.Table:
        """The codes and their lists and images."""
        sizes = [self._ivf.invlists.list_size(number) for number in range(self._ivf.nlist)]
        filled = np.flatnonzero(sizes).tolist()
        ids, codes = [np.empty(0, np.int64)], [np.empty((0, self._ivf.code_size), np.uint8)]
        for number in filled:
            ids.append(array_view(self._ivf.invlists.get_ids(number), sizes[number]))
            stored = array_view(self._ivf.invlists.get_codes(number), sizes[number] * self._ivf.code_size)
            codes.append(stored.reshape(-1, self._ivf.code_size))
        lists = np.repeat(np.arange(self._ivf.nlist), sizes)
        return _entries(np.concatenate(ids), lists, np.concatenate(codes))

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these codes."""
        ids, lists = (entries.column(name).to_numpy() for name in ("image_id", "list"))
        codes = codes_of(entries, np.uint8, self._ivf.code_size)
        order = stored_order(lists, ids, codes)
        ids, lists, codes = ids[order], lists[order], codes[order]
        index = self._quantisers.empty_index(self._probes)
        ivf = inverted_file(index)
        numbers, starts, sizes = np.unique(lists, return_index=True, return_counts=True)
        for number, start, size in zip(numbers.tolist(), starts.tolist(), sizes.tolist(), strict=True):
            some = slice(start, start + size)
            ivf.invlists.add_entries(number, size, faiss.swig_ptr(ids[some]), faiss.swig_ptr(codes[some]))
        ivf.ntotal = index.ntotal = len(ids)
        return type(self)(index, self._probes)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        rows = self._quantisers.rotate(rows)
        lists, to_lists = self._quantisers.nearest_lists(rows, self._probes)
        distances, ids = np.empty((len(rows), num), np.float32), np.empty((len(rows), num), np.int64)
        parameters = faiss.SearchParametersIVF(nprobe=self._probes)  # type: ignore[call-arg]
        x, probed, offsets, out, labels = [faiss.swig_ptr(array) for array in (rows, lists, to_lists, distances, ids)]
        self._ivf.search_preassigned_c(len(rows), x, num, probed, offsets, out, labels, False, parameters)
        scores = distances if self._ivf.metric_type == faiss.METRIC_INNER_PRODUCT else 0 - distances
        return ids, scores, np.where(ids[:, -1] < 0, -np.inf, scores[:, -1]).astype(np.float32)


def _entries(image_ids: Int64s, lists: Int64s, codes: npt.NDArray[np.uint8]) -> pa.Table:
    schema = pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("list", pa.int32(), nullable=False),
            pa.field("code", pa.binary(codes.shape[1]), nullable=False),
        ],
        metadata={"code": "product quantiser, packed from the lowest bit as by faiss", "bytes": str(codes.shape[1])},
    )
    return pa.table([pa.array(image_ids), pa.array(lists.astype(np.int32)), code_column(codes)], schema=schema)
