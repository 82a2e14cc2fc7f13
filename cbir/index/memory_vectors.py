"""Group testing: groups of vectors are compared by one memory vector, and only the best groups are opened."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from cbir.errors import ArtifactError
from cbir.index.dense import DensePartition, array_view, codes_of, exact_shortlist, open_mapped, stored_order
from cbir.index.flat import Flat, FlatIndex
from cbir.index.index import Index, IndexSpec
from cbir.types import FeatureBatch, Float64s, Floats, Hits, Int64s, State

__all__ = ["MemoryVectors", "MemoryVectorsIndex", "MemoryVectorsPartition", "memory_vectors"]

Form = Literal["sum", "pinv"]

_SPARE_GROUPS = 8
_BLOCK = 1 << 9
_RCOND = 1e-6


class MemoryVectors(IndexSpec):
    """Memory vectors (Iscen et al. 2018): the vectors of a group are summarised by one, m = Σ x (sum) or the m with
    m·x = 1 for all of them (pinv, m = X (XᵀX)⁻¹ 1 for the columns X); a search scores the groups by m·q and compares
    the vectors of the best ones.

    Groups are consecutive images by id, which is as good as at random. With G groups of n vectors a query costs
    G + n x `expand` comparisons instead of G n; for vectors of unit norm and high D, and queries with few true
    neighbours. Where a search errs depends on how images were divided among partitions. A partition is a faiss
    `IndexIVFFlat` whose centroids are the memory vectors and whose lists are the groups. Entries: those of `flat`.
    """

    name: Literal["memory_vectors"] = "memory_vectors"
    paper: ClassVar[str] = (
        "Iscen et al., Memory vectors for similarity search in high-dimensional spaces, IEEE Trans. Big Data 2018"
    )
    suffix: ClassVar[str] = "faiss"
    effort: ClassVar[str | None] = "expand"

    group: int = Field(default=10, ge=2, description="vectors of a group; pinv holds at most D")
    form: Form = Field(default="pinv", description="sum of the group's vectors, or pinv: equal scores for all of them")
    expand: PositiveInt = Field(default=64, description="groups of a partition whose vectors a search compares")
    metric: Literal["ip"] = Field(default="ip", description="ip: inner product")

    @property
    def trained(self) -> bool:
        """Only D matters."""
        return False

    def train(self, sample: FeatureBatch, seed: int) -> "MemoryVectorsIndex":  # noqa: ARG002 - nothing is random here
        """Take note of D."""
        return MemoryVectorsIndex(self, sample.descriptors.shape[1])

    def restore(self, state: State) -> "MemoryVectorsIndex":
        """From D."""
        return MemoryVectorsIndex(self, int(state["dim"][0]))

    def load(self, *paths: Path) -> "MemoryVectorsPartition":
        """Open a partition memory-mapped: groups stay on the disk until they are opened."""
        (path,) = paths
        index = open_mapped(path)
        if not isinstance(index, faiss.IndexIVFFlat):
            raise ArtifactError(f"{path}: holds a faiss {type(index).__name__}, expected an IndexIVFFlat")
        return MemoryVectorsPartition(index, self)

    def entry_bytes(self, dim: int) -> int:
        """D float32 and the id, and a part of the group's memory vector and length."""
        return 4 * dim + 8 + -(-(4 * dim + 8) // self.group)


class MemoryVectorsIndex(Index):
    """The empty index of vectors of one D."""

    def __init__(self, spec: MemoryVectors, dim: int) -> None:
        self._vectors = FlatIndex(Flat(), dim)
        nothing = np.empty(0, np.int64), np.empty((0, dim), np.float32)
        self._empty = MemoryVectorsPartition(_grouped(*nothing, spec), spec)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, code fixed_size_binary[4 D]."""
        return self._vectors.entries(batch)

    def build(self, entries: pa.Table, totals: State | None = None) -> "MemoryVectorsPartition":  # noqa: ARG002
        """The groups of these vectors."""
        return self._empty.with_entries(entries)

    def state(self) -> State:
        """D."""
        return self._vectors.state()


class MemoryVectorsPartition(DensePartition):
    """The groups of one partition."""

    def __init__(self, index: Any, spec: MemoryVectors) -> None:
        super().__init__(index, index.d)
        self._spec, self._ivf = spec, index
        self._ivf.nprobe = min(spec.expand, index.nlist)
        memory: Any = faiss.downcast_index(index.quantizer)
        self._memory: Floats = array_view(memory.get_xb(), index.nlist * index.d).reshape(-1, index.d)

    def entries(self) -> pa.Table:
        """The vectors and their images."""
        ids, vectors = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for number in range(self._ivf.nlist if self._ivf.ntotal else 0):
            size = self._ivf.invlists.list_size(number)
            ids.append(array_view(self._ivf.invlists.get_ids(number), size))
            vectors.append(array_view(self._ivf.invlists.get_codes(number), 4 * self.dim * size).view(np.float32))
        batch = FeatureBatch.of_global(np.concatenate(ids), np.concatenate(vectors).reshape(-1, self.dim))
        return FlatIndex(Flat(), self.dim).entries(batch)

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these vectors."""
        ids, vectors = entries.column("image_id").to_numpy(), codes_of(entries, np.float32, self.dim)
        order = stored_order(np.zeros(len(ids), np.int8), ids, vectors)
        return type(self)(_grouped(ids[order], vectors[order], self._spec), self._spec)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        scores, ids = self._ivf.search_preassigned(rows, num, self._best_groups(rows), None)
        return ids, scores, np.where(ids[:, -1] < 0, -np.inf, scores[:, -1]).astype(np.float32)

    def _best_groups(self, rows: Floats) -> Int64s:
        """The numbers (K, expand) of the groups with the best memory vectors, in double precision."""
        numbers, most = np.arange(len(self._memory)), self._ivf.nprobe
        near, scores, _ = exact_shortlist(rows, min(most + _SPARE_GROUPS, len(numbers)), self._memory, numbers, "ip")
        return Hits.ranked(near, scores, most).image_ids


def _grouped(image_ids: Int64s, vectors: Floats, spec: MemoryVectors) -> Any:
    """The faiss index of vectors in stored order; one without vectors has one empty group."""
    dim, num_groups = vectors.shape[1], max(1, -(-len(vectors) // spec.group))
    memory = faiss.IndexFlat(dim, faiss.METRIC_INNER_PRODUCT)
    memory.add(memory_vectors(vectors, spec.group, spec.form) if len(vectors) else np.zeros((1, dim), np.float32))
    index: Any = faiss.IndexIVFFlat(memory, dim, num_groups, faiss.METRIC_INNER_PRODUCT)
    index.is_trained, index.nprobe = True, min(spec.expand, num_groups)
    groups = np.arange(len(vectors)) // spec.group
    index.add_core(len(vectors), *(faiss.swig_ptr(array) for array in (vectors, image_ids, groups)))
    return index


def memory_vectors(vectors: Floats, group: int, form: Form) -> Floats:
    """(n, D) -> (n / group, D): one for every `group` consecutive vectors, the last of which may be fewer.

    With `pinv`, vectors that cannot all have m·x = 1, because they are more than D or a zero vector is among them, come
    as near to it as they can.
    """
    whole = len(vectors) - len(vectors) % group
    full = vectors[:whole].reshape(-1, group, vectors.shape[1])
    parts = [_summaries(full[start : start + _BLOCK], form) for start in range(0, len(full), _BLOCK)]
    if whole < len(vectors):
        parts.append(_summaries(vectors[None, whole:], form))
    return np.concatenate([np.empty((0, vectors.shape[1])), *parts]).astype(np.float32)


def _summaries(groups: Floats, form: Form) -> Float64s:
    """(G, n, D) -> (G, D)."""
    wide = groups.astype(np.float64)
    if form == "sum":
        return np.asarray(wide.sum(1))
    return np.asarray(np.linalg.pinv(wide, rcond=_RCOND).sum(2))
