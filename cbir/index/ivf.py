"""What the inverted files of faiss share: lists, probes, training, entries, partitions. A family says how vectors are
coded."""

import copy
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from cbir.encoding.kmeans import Sums, sampled_rows
from cbir.encoding.product import ReproducibleProduct
from cbir.errors import ArtifactError, DataError
from cbir.index.coarse import Coarse, CoarseKind, FlatCoarse, HnswCoarse, MultiIndex
from cbir.index.codes import Codes, ListCode, Quantisers, StoredCodes, inverted_file, list_contents
from cbir.index.dense import (
    DensePartition,
    Metric,
    code_column,
    codes_of,
    float_rows,
    open_mapped,
    stored_order,
)
from cbir.index.index import Assignment, Index, IndexSpec, SearchIndex
from cbir.index.lists import EXACT_LISTS, BegunLists
from cbir.index.quantisers import codebooks_of
from cbir.types import FeatureBatch, Floats, Int64s, State

__all__ = ["InvertedFile", "InvertedFileIndex", "InvertedFilePartition", "choose_lists", "set_clustering"]

_POINTS_PER_LIST = 39

_BLOCK_BYTES = 128 << 20

_ROUNDS, _ROUNDS_OF_MANY = 4, 2
"""Rounds over the whole sample after those over parts of it [4,096 lists of 204,800 clustered vectors: the error of ten
of faiss from drawn vectors in half of their time; a fifth round gains 0.1 %], and where lists are found approximately
[8,192: 1.7 % more error than ten of faiss in a sixth of their time; two rounds more gain 1.3 % in 1.7 x the time]."""

_SMALL = 1024
"""Fewer lists are trained at once, without rounds over all workers."""


class InvertedFilePartition(DensePartition):
    """Lists of codes of one partition. `code_of` reads the code of a faiss inverted file."""

    def __init__(self, index: faiss.Index, code_of: Callable[[Any], ListCode], probes: int) -> None:
        super().__init__(index, index.d)
        self.ivf = inverted_file(index)
        self.quantisers = Quantisers.of_index(index, code_of)
        self._code_of, self.probes = code_of, min(probes, self.ivf.nlist)
        self._effort = faiss.SearchParametersIVF(nprobe=self.probes)  # type: ignore[call-arg]

    def entries(self) -> pa.Table:
        """The codes and their lists and images."""
        stored = self.quantisers.code.code_lists(self.ivf)
        sizes = [stored.list_size(number) for number in range(stored.nlist)]
        contents = [list_contents(stored, number) for number in np.flatnonzero(sizes).tolist() or [0]]
        ids, codes = (np.concatenate(parts) for parts in zip(*contents, strict=True))
        return _entries(ids, np.repeat(np.arange(stored.nlist), sizes), codes, self.quantisers.code)

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these codes."""
        index = self.quantisers.index_of(_as_stored(entries, self.quantisers.code.num_bytes), self.probes)
        return type(self)(index, self._code_of, self.probes)

    def joined(self, others: Sequence[SearchIndex]) -> SearchIndex | None:
        """One inverted file whose lists are those of all partitions end to end, so that the lists of a query are found
        once; None for families that read their lists in other ways than by faiss's scan."""
        parts = [part for part in (self, *others) if type(part) is InvertedFilePartition]
        return JoinedPartition(parts) if len(parts) == 1 + len(others) else None

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        ids, scores = self._scan(self.quantisers.rotate(rows), num)
        return ids, scores, np.where(ids[:, -1] < 0, -np.inf, scores[:, -1]).astype(np.float32)

    def _scan(self, rows: Floats, num: int, *, places: bool = False) -> tuple[Int64s, Floats]:
        """faiss's best ids (K, num), padded with -1, and scores for rotated rows (K, D'); with `places`, where vectors
        are stored, list * 2^32 + position, in place of ids."""
        lists, to_lists = self.quantisers.coarse.nearest_lists(rows, self.probes)
        distances, ids = np.empty((len(rows), num), np.float32), np.empty((len(rows), num), np.int64)
        x, probed, offsets, out, labels = [faiss.swig_ptr(array) for array in (rows, lists, to_lists, distances, ids)]
        self.ivf.search_preassigned_c(len(rows), x, num, probed, offsets, out, labels, places, self._effort)
        return ids, distances if self.quantisers.coarse.metric == "ip" else 0 - distances


class JoinedPartition(InvertedFilePartition):
    """Several partitions of one version, for search alone: list by list what all of them hold, read where it lies."""

    def __init__(self, parts: Sequence[InvertedFilePartition]) -> None:
        first = parts[0]
        coarse = copy.copy(first.quantisers.coarse)
        coarse.faiss_index = lambda: first.ivf.quantizer  # type: ignore[method-assign] # lent: one copy is enough
        quantisers = Quantisers(first.quantisers.rotation, coarse, first.quantisers.code)
        index = quantisers.index_of([], first.probes)
        pointers: Any = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
        for part in parts:
            pointers.push_back(part.ivf.invlists)
        self._lenders = parts, faiss.HStackInvertedLists(pointers.size(), pointers.data())
        inverted_file(index).replace_invlists(self._lenders[1], False)
        index.ntotal = inverted_file(index).ntotal = sum(part.faiss.ntotal for part in parts)
        super().__init__(index, first._code_of, first.probes)


class InvertedFileIndex(Index):
    """A trained inverted file without content."""

    def __init__(self, spec: "InvertedFile", quantisers: Quantisers) -> None:
        self.quantisers = quantisers
        index = quantisers.index_of([], spec.probes)
        self.empty = spec.partition(index, spec.code_of, spec.probes)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, list int32, code fixed_size_binary."""
        rows = self.quantisers.rotate(float_rows(batch, self.quantisers.dim))
        lists, codes = self.quantisers.encode(rows)
        return _entries(np.repeat(batch.image_ids, batch.counts), lists, codes, self.quantisers.code)

    def assignment(self, batch: FeatureBatch) -> Assignment:
        """The nearest list of every row, and how far its centroid is."""
        rows = self.quantisers.rotate(float_rows(batch, self.quantisers.dim))
        lists = self.quantisers.coarse.nearest(rows)
        errors = np.square(rows - self.quantisers.coarse.centroids_of(lists), dtype=np.float64).sum(1)
        return Assignment(lists, errors, self.quantisers.coarse.num_lists)

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
    has_codebook: ClassVar[bool] = True
    fits_sample: ClassVar[bool] = True

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

    def codebook_identity(self) -> dict[str, Any]:
        """The lists, and the rotation before them."""
        lists = self.model_dump(mode="json", include={"lists", "metric", "iterations"})
        return {**lists, "pairs": self.coarse == "imi", "rotation": self.rotation_identity()}

    def rotation_identity(self) -> dict[str, Any]:
        """What identifies the matrix of `train_rotation`, if there is one."""
        return {}

    @property
    def codebook_rounds(self) -> int:
        """Over the whole sample, where there may be many lists; few, and pairs of words, are trained at once."""
        if self.coarse == "imi" or (self.lists and self.lists < _SMALL):
            return 0
        return min(self.iterations, _ROUNDS_OF_MANY if self.lists and self.lists >= EXACT_LISTS else _ROUNDS)

    def train(self, sample: FeatureBatch, seed: int) -> Index:
        """The quantisers of the sample's rows; DataError if these are too few or do not fit."""
        codebook = self.train_codebook(sample, seed)
        for number in range(1, self.codebook_rounds + 1):
            sums = self.codebook_sums(codebook, sample)
            codebook = self.next_codebook(codebook, sums, last=number == self.codebook_rounds)
        return self.finish(codebook, sample, seed)

    def train_codebook(self, sample: FeatureBatch, seed: int) -> State:
        """`centroids` (lists, D') and `exponent`, or `words` of pairs; `rotation` (D', D) where there is one."""
        rows = float_rows(sample)
        lists = self._fitting_lists(rows)
        rotation = self.train_rotation(rows, seed)
        rotated = rows if rotation is None else _rotated(rows, rotation)
        state: State = {} if rotation is None else {"rotation": rotation}
        if self.coarse == "imi":
            return {**state, **self._trained_pairs(rotated, lists, seed).state()}
        begun = BegunLists.of(rotated, lists, seed, spherical=self.metric == "ip")
        if lists < _SMALL:
            some = sampled_rows(rotated, lists, seed)
            for _ in range(self.iterations):
                begun = begun.after(begun.sums(some))
        return {**state, **_begun_state(begun)}

    def _fitting_lists(self, rows: Floats) -> int:
        """How many lists; DataError if rows (n, D) are too few or cannot be coded."""
        self.check_dim(rows.shape[1])
        lists = self.lists or choose_lists(len(rows))
        lists = 4 ** _word_bits(lists) if self.coarse == "imi" else lists
        self.check_size(len(rows), lists)
        return lists

    def _trained_pairs(self, rows: Floats, lists: int, seed: int) -> MultiIndex:
        quantiser: Any = faiss.MultiIndexQuantizer(rows.shape[1], 2, _word_bits(lists))
        set_clustering(quantiser.pq.cp, self.iterations, seed)
        quantiser.train(rows)
        return MultiIndex(codebooks_of(quantiser.pq))

    def codebook_sums(self, codebook: State, batch: FeatureBatch) -> State:
        """Of `kmeans.Sums`, the arrays."""
        rotation = codebook.get("rotation")
        rows = float_rows(batch, codebook["centroids"].shape[1] if rotation is None else rotation.shape[1])
        sums = self._begun(codebook).sums(rows if rotation is None else _rotated(rows, rotation))
        return {"sums": sums.sums, "counts": sums.counts, "errors": sums.errors}

    def next_codebook(self, codebook: State, sums: State, *, last: bool) -> State:  # noqa: ARG002 - `finish` does it
        """With the means of all rows."""
        begun = self._begun(codebook)
        added = Sums(sums["sums"], sums["counts"], sums["errors"], begun.exponent)
        return {**codebook, **_begun_state(begun.after(added))}

    def _begun(self, codebook: State) -> BegunLists:
        return BegunLists(codebook["centroids"], int(codebook["exponent"][0]), spherical=self.metric == "ip")

    def finish(self, codebook: State, sample: FeatureBatch, seed: int) -> Index:
        """The code of what the lists leave of the sample's rows."""
        return self.finished_file(codebook, sample, seed)

    def finished_file(self, codebook: State, sample: FeatureBatch, seed: int) -> InvertedFileIndex:
        """The inverted file with this codebook, without content."""
        rows, rotation = float_rows(sample), codebook.get("rotation")
        self._fitting_lists(rows)
        coarse = self._coarse_of(codebook)
        index = self.untrained(coarse.faiss_index(), coarse.num_lists, seed)
        index.train(rows if rotation is None else _rotated(rows, rotation))  # leaves a trained coarse quantiser alone
        return InvertedFileIndex(self, Quantisers(rotation, coarse, self.code_of(index)))

    def _coarse_of(self, codebook: State) -> Coarse:
        if self.coarse == "imi":
            return MultiIndex(codebook["words"])
        return (HnswCoarse.build if self.coarse == "hnsw" else FlatCoarse)(codebook["centroids"], self.metric)

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


def _rotated(rows: Floats, rotation: Floats) -> Floats:
    return ReproducibleProduct(rotation)(rows).astype(np.float32)


def _begun_state(begun: BegunLists) -> State:
    return {"centroids": begun.centroids, "exponent": np.array([begun.exponent], np.int64)}


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


def _as_stored(entries: pa.Table, num_bytes: int) -> Iterator[StoredCodes]:
    """Entries in the order in which they are stored, so many lists at a time that copies of them take little memory."""
    all_lists = entries.column("list").to_numpy()
    ends = np.cumsum(np.bincount(all_lists) * (num_bytes + 12))
    groups = np.unique(ends // _BLOCK_BYTES, return_index=True)[1].tolist() or [0]
    for first, end in itertools.pairwise([*groups, len(ends)]):
        is_whole = len(groups) == 1
        some = entries if is_whole else entries.filter(pa.array((first <= all_lists) & (all_lists < end)))
        ids, lists = (some.column(name).to_numpy() for name in ("image_id", "list"))
        codes = codes_of(some, np.uint8, num_bytes)
        order = stored_order(lists, ids, codes)
        yield ids[order], lists[order], codes[order]


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
