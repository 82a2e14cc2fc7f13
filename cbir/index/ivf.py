"""What the inverted files of faiss share: lists, probes, training, entries, partitions. A family says how vectors are
coded."""

import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from cbir.encoding.product import ReproducibleProduct
from cbir.errors import ArtifactError, DataError
from cbir.index.coarse import Coarse, CoarseKind, FlatCoarse, HnswCoarse, MultiIndex
from cbir.index.codes import Codes, ListCode, Quantisers, inverted_file, list_contents
from cbir.index.dense import (
    FAISS_METRIC,
    DensePartition,
    Metric,
    code_column,
    codes_of,
    float_rows,
    open_mapped,
    stored_order,
)
from cbir.index.index import Index, IndexSpec
from cbir.index.quantisers import codebooks_of
from cbir.types import FeatureBatch, Floats, Int64s, State

__all__ = ["InvertedFile", "InvertedFileIndex", "InvertedFilePartition", "choose_lists", "set_clustering"]

_POINTS_PER_LIST = 39


class InvertedFilePartition(DensePartition):
    """Lists of codes of one partition. `code_of` reads the code of a faiss inverted file."""

    def __init__(self, index: faiss.Index, code_of: Callable[[Any], ListCode], probes: int) -> None:
        super().__init__(index, index.d)
        self.ivf = inverted_file(index)
        self.quantisers = Quantisers.of_index(index, code_of)
        self._code_of, self.probes = code_of, min(probes, self.ivf.nlist)

    def entries(self) -> pa.Table:
        """The codes and their lists and images."""
        stored = self.quantisers.code.code_lists(self.ivf)
        sizes = [stored.list_size(number) for number in range(stored.nlist)]
        contents = [list_contents(stored, number) for number in np.flatnonzero(sizes).tolist() or [0]]
        ids, codes = (np.concatenate(parts) for parts in zip(*contents, strict=True))
        return _entries(ids, np.repeat(np.arange(stored.nlist), sizes), codes, self.quantisers.code)

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these codes."""
        ids, lists = (entries.column(name).to_numpy() for name in ("image_id", "list"))
        codes = codes_of(entries, np.uint8, self.quantisers.code.num_bytes)
        order = stored_order(lists, ids, codes)
        index = self.quantisers.index_of(ids[order], lists[order], codes[order], self.probes)
        return type(self)(index, self._code_of, self.probes)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        ids, scores = self._scan(self.quantisers.rotate(rows), num)
        return ids, scores, np.where(ids[:, -1] < 0, -np.inf, scores[:, -1]).astype(np.float32)

    def _scan(self, rows: Floats, num: int, *, places: bool = False) -> tuple[Int64s, Floats]:
        """faiss's best ids (K, num), padded with -1, and scores for rotated rows (K, D'); with `places`, where vectors
        are stored, list * 2^32 + position, in place of ids."""
        lists, to_lists = self.quantisers.coarse.nearest_lists(rows, self.probes)
        distances, ids = np.empty((len(rows), num), np.float32), np.empty((len(rows), num), np.int64)
        parameters = faiss.SearchParametersIVF(nprobe=self.probes)  # type: ignore[call-arg]
        x, probed, offsets, out, labels = [faiss.swig_ptr(array) for array in (rows, lists, to_lists, distances, ids)]
        self.ivf.search_preassigned_c(len(rows), x, num, probed, offsets, out, labels, places, parameters)
        return ids, distances if self.quantisers.coarse.metric == "ip" else 0 - distances


class InvertedFileIndex(Index):
    """A trained inverted file without content."""

    def __init__(self, spec: "InvertedFile", quantisers: Quantisers) -> None:
        self.quantisers = quantisers
        nothing, no_codes = np.empty(0, np.int64), np.empty((0, quantisers.code.num_bytes), np.uint8)
        index = quantisers.index_of(nothing, nothing, no_codes, spec.probes)
        self.empty = spec.partition(index, spec.code_of, spec.probes)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, list int32, code fixed_size_binary."""
        rows = self.quantisers.rotate(float_rows(batch, self.quantisers.dim))
        lists, codes = self.quantisers.encode(rows)
        return _entries(np.repeat(batch.image_ids, batch.counts), lists, codes, self.quantisers.code)

    def build(self, entries: pa.Table, totals: State | None = None) -> DensePartition:  # noqa: ARG002 - needs none
        """The codes in the order of their lists and images."""
        return self.empty.with_entries(entries)

    def state(self) -> State:
        """The arrays of the quantisers."""
        return self.quantisers.state()


class InvertedFile(IndexSpec):
    """An inverted file: a coarse quantiser divides the vectors among lists, of which a search looks into the nearest.

    Without `lists`, the sample decides: the power of two nearest to 4 sqrt(n) for n sample vectors, but at most n / 39,
    the fewest points that k-means should have per centroid.
    """

    suffix: ClassVar[str] = "faiss"
    effort: ClassVar[str | None] = "probes"

    lists: PositiveInt | None = Field(default=None, description="inverted lists; without it, chosen from the sample")
    coarse: CoarseKind = Field(
        default="flat",
        description="how the lists of a vector are found: flat compares with every centroid; hnsw walks through a "
        "graph of them, for tens of thousands of lists and more; imi has a list for every pair of words of the two "
        "halves of a vector, for millions of lists",
    )
    metric: Metric = Field(default="ip", description="ip: inner product; l2: Euclidean distance")
    probes: PositiveInt = Field(default=16, description="lists that a search looks into")
    iterations: PositiveInt = Field(default=25, description="of k-means, and of what else is trained in rounds")

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if self.coarse != "imi":
            return self
        if self.metric != "l2":
            raise ValueError(
                "coarse: imi finds lists by Euclidean distance; set metric: l2 (for unit vectors the order is that of "
                "ip), or coarse: flat"
            )
        if self.lists is not None and (self.lists < 4 or self.lists != 4 ** _word_bits(self.lists)):
            raise ValueError(
                f"lists: {self.lists} are not all pairs of 2^b words; coarse: imi has a power of 4 lists, for example "
                f"{4 ** _word_bits(self.lists)}"
            )
        return self

    @property
    def partition(self) -> type[InvertedFilePartition]:
        """The class of its partitions."""
        return InvertedFilePartition

    @property
    @abstractmethod
    def holds(self) -> type[faiss.Index]:
        """The faiss class of its inverted files."""

    @abstractmethod
    def code_of(self, ivf: Any) -> ListCode:
        """The code of a trained faiss inverted file, which need not outlive it."""

    @abstractmethod
    def restored_code(self, state: State) -> ListCode:
        """The code that had this state."""

    @abstractmethod
    def untrained(self, quantiser: faiss.Index, lists: int, seed: int) -> Any:
        """A faiss inverted file on this untrained coarse quantiser, ready to train."""

    @abstractmethod
    def code_bytes(self, dim: int) -> int:
        """Bytes of the code of a vector of D = dim."""

    def train_rotation(self, rows: Floats, seed: int) -> Floats | None:  # noqa: ARG002 - most families have none
        """A matrix (D', D) by which all vectors are multiplied first."""
        return None

    def check_dim(self, dim: int) -> None:
        """DataError if vectors of D = dim cannot be coded."""
        if self.coarse == "imi" and dim % 2:
            raise DataError(
                f"coarse: imi halves a vector, but D = {dim} is odd; set coarse: flat, or reduce D by the encoder pca"
            )

    @staticmethod
    def check_words(found: int, bits: int) -> None:
        """DataError if so many sample vectors are too few for codebooks of 2^bits words."""
        if found < 2**bits:
            raise DataError(
                f"bits: {bits} bits need a sample of at least {2**bits} vectors, found {found}; "
                "set fewer bits (4 need 16 vectors), take a larger sample, or use the index flat"
            )

    def check_size(self, found: int, lists: int) -> None:
        """DataError if so many sample vectors are too few."""
        needed = math.isqrt(lists) if self.coarse == "imi" else lists
        if found < needed:
            raise DataError(
                f"lists: {lists} lists need a sample of at least {needed} vectors, found {found}; "
                "set fewer lists, take a larger sample, or use the index flat"
            )

    def train(self, sample: FeatureBatch, seed: int) -> Index:
        """The quantisers of the sample's rows; DataError if these are too few or do not fit."""
        return self.trained_file(sample, seed)

    def trained_file(self, sample: FeatureBatch, seed: int) -> InvertedFileIndex:
        """The inverted file with quantisers of the sample's rows, without content."""
        rows = float_rows(sample)
        self.check_dim(rows.shape[1])
        lists = self._num_lists(len(rows))
        self.check_size(len(rows), lists)
        rotation = self.train_rotation(rows, seed)
        rotated = rows if rotation is None else ReproducibleProduct(rotation)(rows).astype(np.float32)
        return InvertedFileIndex(self, Quantisers(rotation, *self._train_quantisers(rotated, lists, seed)))

    def _num_lists(self, num_vectors: int) -> int:
        lists = self.lists or choose_lists(num_vectors)
        return 4 ** _word_bits(lists) if self.coarse == "imi" else lists

    def _train_quantisers(self, rows: Floats, lists: int, seed: int) -> tuple[Coarse, ListCode]:
        dim = rows.shape[1]
        quantiser: Any = faiss.IndexFlat(dim, FAISS_METRIC[self.metric])
        if self.coarse == "imi":
            quantiser = faiss.MultiIndexQuantizer(dim, 2, _word_bits(lists))
            set_clustering(quantiser.pq.cp, self.iterations, seed)
        index = self.untrained(quantiser, lists, seed)
        set_clustering(index.cp, self.iterations, seed)
        index.quantizer_trains_alone = "\x01" if self.coarse == "imi" else "\0"
        index.train(rows)
        return self._coarse_of(quantiser), self.code_of(index)

    def _coarse_of(self, quantiser: Any) -> Coarse:
        if self.coarse == "imi":
            return MultiIndex(codebooks_of(quantiser.pq))
        centroids = quantiser.reconstruct_n(0, quantiser.ntotal)
        return (HnswCoarse.build if self.coarse == "hnsw" else FlatCoarse)(centroids, self.metric)

    def restore(self, state: State) -> Index:
        """From the arrays of the quantisers."""
        return self.restored_file(state)

    def restored_file(self, state: State) -> InvertedFileIndex:
        """The inverted file that had these quantisers, without content."""
        return InvertedFileIndex(self, Quantisers.restore(state, self.metric, self.restored_code(state)))

    def load(self, *paths: Path) -> DensePartition:
        """Open a partition memory-mapped: lists stay on the disk until they are searched."""
        (path,) = paths
        return self.opened(open_mapped(path), path)

    def opened(self, index: faiss.Index, path: Path) -> InvertedFilePartition:
        """The partition that a faiss index from this path is; ArtifactError if it is another."""
        if not isinstance(inverted_file(index), self.holds):
            raise ArtifactError(f"{path}: holds a faiss {type(index).__name__}, expected an {self.holds.__name__}")
        return self.partition(index, self.code_of, self.probes)

    def entry_bytes(self, dim: int) -> int:
        """The code and the id."""
        return self.code_bytes(dim) + 8


def choose_lists(num_vectors: int) -> int:
    """The power of two nearest to 4 sqrt(n), at most n / 39, at least 1."""
    most = max(1, num_vectors // _POINTS_PER_LIST)
    return int(min(2 ** round(math.log2(4 * math.sqrt(max(1, num_vectors)))), 2 ** int(math.log2(most))))


def _word_bits(lists: int) -> int:
    """b such that all pairs of 2^b words are about so many lists."""
    return max(1, round(math.log2(lists) / 2))


def set_clustering(parameters: faiss.ClusteringParameters, iterations: int, seed: int) -> None:
    """Have faiss's k-means take these iterations and this seed."""
    parameters.seed, parameters.niter = seed % 2**31, iterations
    parameters.min_points_per_centroid = 1  # `train` has already refused what cannot work; faiss would only warn


def _entries(image_ids: Int64s, lists: Int64s, codes: Codes, code: ListCode) -> pa.Table:
    schema = pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("list", pa.int32(), nullable=False),
            pa.field("code", pa.binary(codes.shape[1]), nullable=False),
        ],
        metadata={"code": code.description, "bytes": str(codes.shape[1])},
    )
    return pa.table([pa.array(image_ids), pa.array(lists.astype(np.int32)), code_column(codes)], schema=schema)
