"""Navigable small-world graphs over float vectors."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt
from threadpoolctl import threadpool_limits

from cbir.errors import ArtifactError
from cbir.index.dense import (
    FAISS_METRIC,
    DensePartition,
    Metric,
    array_view,
    codes_of,
    exact_scores,
    exact_shortlist,
    open_mapped,
    stored_order,
)
from cbir.index.flat import Flat, FlatIndex
from cbir.index.index import Index, IndexSpec
from cbir.types import FeatureBatch, Floats, Int64s, State

__all__ = ["Hnsw", "HnswIndex", "HnswPartition"]


class Hnsw(IndexSpec):
    """Hierarchical navigable small worlds (Malkov and Yashunin 2020): a search walks greedily through a graph of near
    vectors, and keeps the best `ef_search` that it has met.

    Fast, but it takes more memory than `flat`, and the time of a build is that of many searches. The graph of a
    partition depends on the vectors in it, so where a search errs depends on how images were divided among partitions.
    A partition of at most `ef_search` vectors is searched exactly. It is a faiss `IndexIDMap` over an `IndexHNSWFlat`.
    Entries: those of `flat`.
    """

    name: Literal["hnsw"] = "hnsw"
    paper: ClassVar[str] = (
        "Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using hierarchical navigable "
        "small world graphs, IEEE TPAMI 2020"
    )
    suffix: ClassVar[str] = "faiss"
    effort: ClassVar[str | None] = "ef_search"

    neighbours: int = Field(default=32, ge=2, description="links of a vector in upper layers (M); twice as many below")
    ef_construction: PositiveInt = Field(default=80, description="vectors that a build keeps to choose links from")
    ef_search: PositiveInt = Field(
        default=128, description="vectors that a search keeps; more find more and take longer"
    )
    metric: Metric = Field(default="ip", description="ip: inner product; l2: Euclidean distance")

    @property
    def trained(self) -> bool:
        """Only D matters."""
        return False

    def train(self, sample: FeatureBatch, seed: int) -> "HnswIndex":  # noqa: ARG002 - faiss draws the layers alike
        """Take note of D."""
        return HnswIndex(self, sample.descriptors.shape[1])

    def restore(self, state: State) -> "HnswIndex":
        """From D."""
        return HnswIndex(self, int(state["dim"][0]))

    def load(self, *paths: Path) -> "HnswPartition":
        """Open a partition memory-mapped: vectors and links stay on the disk until a search meets them."""
        (path,) = paths
        index = open_mapped(path)
        if not isinstance(index, faiss.IndexIDMap) or not isinstance(
            faiss.downcast_index(index.index), faiss.IndexHNSWFlat
        ):
            raise ArtifactError(
                f"{path}: holds a faiss {type(index).__name__}, expected an IndexIDMap over IndexHNSWFlat"
            )
        return HnswPartition(index, self)

    def entry_bytes(self, dim: int) -> int:
        """D float32, the id, the links of all layers, and where these begin."""
        upper = round(4 * self.neighbours / (self.neighbours - 1))  # a vector has 1 / (M - 1) upper layers on average
        return 4 * dim + 8 + 8 * self.neighbours + upper + 12


class HnswIndex(Index):
    """The empty index of vectors of one D."""

    def __init__(self, spec: Hnsw, dim: int) -> None:
        self._vectors = FlatIndex(Flat(metric=spec.metric), dim)
        self._empty = HnswPartition(_mapped(spec, dim), spec)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, code fixed_size_binary[4 D]."""
        return self._vectors.entries(batch)

    def build(self, entries: pa.Table, totals: State | None = None) -> "HnswPartition":  # noqa: ARG002 - needs none
        """The graph of these vectors."""
        return self._empty.with_entries(entries)

    def state(self) -> State:
        """D."""
        return self._vectors.state()


class HnswPartition(DensePartition):
    """The graph of one partition."""

    def __init__(self, index: faiss.IndexIDMap, spec: Hnsw) -> None:
        super().__init__(index, index.d)
        self._spec = spec
        graph: Any = faiss.downcast_index(index.index)
        self._graph = graph
        self._vectors: Floats = np.empty((0, index.d), np.float32)
        self._ids: Int64s = np.empty(0, np.int64)
        if index.ntotal:
            flat: Any = faiss.downcast_index(graph.storage)
            self._vectors = array_view(flat.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
            self._ids = array_view(index.id_map.data(), index.ntotal)

    def entries(self) -> pa.Table:
        """The vectors and their images, a copy that may outlive the partition."""
        vectors = FeatureBatch.of_global(self._ids.copy(), self._vectors.copy())
        return FlatIndex(Flat(metric=self._spec.metric), self.dim).entries(vectors)

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these vectors, which are linked one after the other in the order of their images."""
        ids, vectors = entries.column("image_id").to_numpy(), codes_of(entries, np.float32, self.dim)
        order = stored_order(np.zeros(len(ids), np.int8), ids, vectors)
        index = _mapped(self._spec, self.dim)
        # Before version 1.15 of faiss, several threads link vectors in whatever order they come to them.
        with threadpool_limits(1, user_api="openmp"):
            index.add_with_ids(vectors[order], ids[order])
        return type(self)(index, self._spec)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        metric = self._spec.metric
        if len(self._vectors) <= max(num, self._spec.ef_search):
            return exact_shortlist(rows, num, self._vectors, self._ids, metric)
        parameters = faiss.SearchParametersHNSW(efSearch=self._spec.ef_search)  # type: ignore[attr-defined]
        _, positions = self._graph.search(rows, num, params=parameters)
        scores = exact_scores(rows, self._vectors, positions, metric).astype(np.float32)
        return np.where(positions < 0, -1, self._ids[positions]), scores, scores.min(1)


def _mapped(spec: Hnsw, dim: int) -> Any:
    """An empty IndexIDMap over an IndexHNSWFlat."""
    graph = faiss.IndexHNSWFlat(dim, spec.neighbours, FAISS_METRIC[spec.metric])
    graph.hnsw.efConstruction, graph.hnsw.efSearch = spec.ef_construction, spec.ef_search
    return faiss.IndexIDMap(graph)
