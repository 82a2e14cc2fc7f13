"""Coarse quantisers: the list that a vector belongs to, and the lists that a query looks into.

What they decide does not depend on the batch, see `cbir.index.quantisers`.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import faiss
import numpy as np

from cbir.index.dense import FAISS_METRIC, Metric, array_view
from cbir.index.nearest import nearest_centroid
from cbir.index.quantisers import codebooks_of, nearest_centroids, ranked_centroids
from cbir.types import Floats, Int64s, State, in_order

__all__ = ["Coarse", "CoarseKind", "FlatCoarse", "HnswCoarse", "MultiIndex", "coarse_of", "restore_coarse"]

CoarseKind = Literal["flat", "hnsw", "imi"]

_LINKS = 32
_CANDIDATES = 4
"""How many centroids a walk through the graph brings home, of which the nearest is chosen exactly."""
_BREADTH = 64
"""How many candidates a walk through the graph holds, or twice as many as it looks for."""


class Coarse(ABC):
    """A trained division of the vectors of D = dim among lists."""

    def __init__(self, num_lists: int, dim: int, metric: Metric) -> None:
        self.num_lists, self.dim, self.metric = num_lists, dim, metric

    @abstractmethod
    def nearest(self, rows: Floats) -> Int64s:
        """The lists (K,) of rows (K, D)."""

    @abstractmethod
    def nearest_lists(self, rows: Floats, num: int) -> tuple[Int64s, Floats]:
        """The best `num` lists (K, num) of rows (K, D) and faiss's distances to their centroids."""

    @abstractmethod
    def centroids_of(self, lists: Int64s) -> Floats:
        """The centroids (K, D) of these lists (K,)."""

    @abstractmethod
    def faiss_index(self) -> Any:
        """A faiss index that finds the same lists and belongs to the caller."""

    @abstractmethod
    def state(self) -> State:
        """What `restore_coarse` needs."""


class FlatCoarse(Coarse):
    """Centroids (lists, D), all of which are compared."""

    def __init__(self, centroids: Floats, metric: Metric) -> None:
        super().__init__(len(centroids), centroids.shape[1], metric)
        self.centroids = centroids

    def nearest(self, rows: Floats) -> Int64s:
        """The nearest centroids."""
        return nearest_centroid(rows, self.centroids, self.metric)

    def nearest_lists(self, rows: Floats, num: int) -> tuple[Int64s, Floats]:
        """The nearest centroids, best first."""
        return nearest_centroids(rows, num, self.centroids, self.metric)

    def centroids_of(self, lists: Int64s) -> Floats:
        """The rows of the centroids."""
        return self.centroids[lists]

    def faiss_index(self) -> Any:
        """An IndexFlat."""
        index = faiss.IndexFlat(self.dim, FAISS_METRIC[self.metric])
        index.add(self.centroids)
        return index

    def state(self) -> State:
        """Centroids (lists, D)."""
        return {"centroids": self.centroids}


class HnswCoarse(FlatCoarse):
    """Centroids found by walks through a navigable graph (Malkov and Yashunin 2020), at a cost that grows with the
    logarithm of their number. The nearest one may be missed, but by every vector in the same way."""

    def __init__(self, graph: Any, metric: Metric) -> None:
        super().__init__(_vectors_of(graph.storage), metric)
        self._graph = graph

    @classmethod
    def build(cls, centroids: Floats, metric: Metric) -> Self:
        """Link the centroids one by one: inserted together, the order of threads would show in the graph."""
        graph: Any = faiss.IndexHNSWFlat(centroids.shape[1], _LINKS, FAISS_METRIC[metric])
        graph.hnsw.efSearch = _BREADTH
        for number in range(len(centroids)):
            graph.add(centroids[number : number + 1])
        return cls(graph, metric)

    def nearest(self, rows: Floats) -> Int64s:
        """The nearest of a few near centroids."""
        return self.nearest_lists(rows, 1)[0][:, 0]

    def nearest_lists(self, rows: Floats, num: int) -> tuple[Int64s, Floats]:
        """Near centroids, best first; -1 pads where the graph has no more."""
        most = min(num + _CANDIDATES, self.num_lists)
        breadth = faiss.SearchParametersHNSW(efSearch=max(_BREADTH, 2 * most))  # type: ignore[attr-defined]
        _, near = self._graph.search(rows, most, params=breadth)
        return ranked_centroids(rows, near, num, self.centroids, self.metric)

    def faiss_index(self) -> Any:
        """An IndexHNSWFlat."""
        return faiss.clone_index(self._graph)

    def state(self) -> State:
        """The graph with its centroids, as faiss writes it."""
        return {"graph": faiss.serialize_index(self._graph)}


class MultiIndex(Coarse):
    """The inverted multi-index (Babenko and Lempitsky 2012): a list for every pair of a word of the first half of a
    vector's dimensions and a word of the second, words (2, W, D / 2), list = first word + W x second word."""

    def __init__(self, words: Floats) -> None:
        super().__init__(words.shape[1] ** 2, 2 * words.shape[2], "l2")
        self.words = words

    def nearest(self, rows: Floats) -> Int64s:
        """The pairs of nearest words."""
        first, second = (nearest_centroid(*half, "l2") for half in self._halves(rows))
        return first + len(self.words[0]) * second

    def nearest_lists(self, rows: Floats, num: int) -> tuple[Int64s, Floats]:
        """The nearest pairs: as a pair is beaten by all pairs of better words, few come into question."""
        most = min(num, len(self.words[0]))
        found = [nearest_centroids(half, most, words, "l2") for half, words in self._halves(rows)]
        ranks = np.arange(1, most + 1)
        one, other = np.nonzero(ranks[:, None] * ranks <= num)
        lists = found[0][0][:, one] + len(self.words[0]) * found[1][0][:, other]
        distances = found[0][1][:, one] + found[1][1][:, other]
        order = np.lexsort((lists, distances))[:, :num]
        return in_order(lists, order), in_order(distances, order)

    def _halves(self, rows: Floats) -> list[tuple[Floats, Floats]]:
        parts = np.split(rows, 2, axis=1)
        return [(np.ascontiguousarray(part), words) for part, words in zip(parts, self.words, strict=True)]

    def centroids_of(self, lists: Int64s) -> Floats:
        """The two words of each list, one after the other."""
        second, first = np.divmod(lists, len(self.words[0]))
        return np.concatenate([self.words[0][first], self.words[1][second]], axis=1)

    def faiss_index(self) -> Any:
        """A MultiIndexQuantizer."""
        index: Any = faiss.MultiIndexQuantizer(self.dim, 2, len(self.words[0]).bit_length() - 1)
        faiss.copy_array_to_vector(self.words.ravel(), index.pq.centroids)
        index.is_trained, index.ntotal = True, self.num_lists
        return index

    def state(self) -> State:
        """Words (2, W, D / 2)."""
        return {"words": self.words}


def coarse_of(quantiser: faiss.Index, metric: Metric) -> Coarse:
    """The coarse quantiser of a faiss index, which must outlive it."""
    index: Any = faiss.downcast_index(quantiser)
    if isinstance(index, faiss.MultiIndexQuantizer):
        return MultiIndex(codebooks_of(index.pq))
    return HnswCoarse(index, metric) if isinstance(index, faiss.IndexHNSW) else FlatCoarse(_vectors_of(index), metric)


def restore_coarse(state: State, metric: Metric) -> Coarse:
    """The coarse quantiser that had this state."""
    if "words" in state:
        return MultiIndex(state["words"])
    if "graph" in state:
        return HnswCoarse(faiss.deserialize_index(state["graph"]), metric)
    return FlatCoarse(state["centroids"], metric)


def _vectors_of(index: faiss.Index) -> Floats:
    """The vectors (n, D) of an IndexFlat, a view into it."""
    flat: Any = faiss.downcast_index(index)
    return array_view(flat.get_xb(), flat.ntotal * flat.d).reshape(-1, flat.d)
