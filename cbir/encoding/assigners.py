"""Assigners: ways to find the nearest of many visual words; each is a pure function of the words.

In all of them a row's words depend on this row alone. The approximate ones only choose which words are compared; the
words they give are in the order of exact distances.
"""

from typing import Any, ClassVar

import faiss
import numpy as np

from cbir.encoding.kmeans import BLOCK, kmeans_in_groups, unit_rows
from cbir.encoding.scan import Grid, WordLists, finite_rows, nearest_of
from cbir.types import Array, Float64s, Floats, Int32s, State

__all__ = ["CellAssigner", "DirectionAssigner", "ExactAssigner", "HnswAssigner"]


class ExactAssigner:
    """Compares a row with every word."""

    name: ClassVar[str] = "exact"

    def __init__(self, centroids: Floats) -> None:
        self.centroids = centroids
        self._words = WordLists(centroids)

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """The nearest words; of equally near ones the first."""
        return self._words.nearest(rows, None, num)

    @classmethod
    def of(cls, centroids: Floats) -> "ExactAssigner":
        """There is nothing to build."""
        return cls(centroids)

    def state(self) -> State:
        """Nothing: the centroids are enough."""
        return {}

    @classmethod
    def restore(cls, centroids: Floats, state: State) -> "ExactAssigner":  # noqa: ARG003
        """From the centroids."""
        return cls(centroids)


class CellAssigner:
    """Compares a row with the words of its nearest cells, an inverted file of words (Sivic and Zisserman 2003; Jégou et
    al. 2011): `cells` (C, D) and the cell of every word, `cell_of` (W,)."""

    name: ClassVar[str] = "ivf"

    def __init__(self, centroids: Floats, cells: Floats, cell_of: Int32s, probes: int) -> None:
        self.centroids, self.cells, self.cell_of, self.probes = centroids, cells, cell_of, probes
        self._cells = WordLists(cells)
        self._words = WordLists(centroids, cell_of, len(cells))
        self._smallest = np.cumsum(np.sort(np.diff(self._words.begins)))

    @classmethod
    def of(cls, centroids: Floats, probes: int = 20) -> "CellAssigner":
        """With about 1.5 sqrt(W) cells by k-means on the words."""
        num_cells = max(1, min(len(centroids), round(1.5 * len(centroids) ** 0.5)))
        everywhere = np.zeros(len(centroids), np.int32)
        cells, _ = kmeans_in_groups(centroids, everywhere, np.array([num_cells]), 8, 0)
        return cls(centroids, cells, WordLists(cells).nearest(centroids, None, 1)[0][:, 0], probes)

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """The nearest words in `probes` cells, or in as many as are sure to hold `num` words."""
        enough = int(np.searchsorted(self._smallest, num)) + 1
        probes = min(len(self.cells), max(self.probes, enough))
        return self._words.nearest(rows, self._cells.nearest(rows, None, probes)[0], num)

    def state(self) -> State:
        """`cells` (C, D) float32, `cell_of` (W,) int32 and `probes` (1,) int64."""
        return {"cells": self.cells, "cell_of": self.cell_of, "probes": np.array([self.probes])}

    @classmethod
    def restore(cls, centroids: Floats, state: State) -> "CellAssigner":
        """From `state()`."""
        return cls(centroids, state["cells"], state["cell_of"], int(state["probes"][0]))


class DirectionAssigner:
    """Compares a row with the words of its nearest cells, for rounds of k-means over many words.

    A cell is a range of directions from the mean of the words (spherical k-means, Dhillon and Modha 2001). Cells of
    places would be of very unequal size where words lie in no hierarchy: whatever lies near the mean is near to all in
    many dimensions (Radovanović et al., Hubs in space, 2010), so that a word there, once it has drawn in rows of which
    the own word was missed, makes the next round dearer and worse.
    """

    PROBES, ITERATIONS = 24, 4

    def __init__(self, centroids: Floats) -> None:
        self.centroids = centroids
        self._mean = np.add.reduce(centroids, axis=0, dtype=np.float64) / len(centroids)
        num_cells = min(len(centroids), round((self.PROBES * len(centroids)) ** 0.5))
        directions, everywhere = self._directions(centroids), np.zeros(len(centroids), np.int32)
        cells, _ = kmeans_in_groups(directions, everywhere, np.array([num_cells]), self.ITERATIONS, 0)
        nearest = WordLists(unit_rows(cells)).nearest(directions, None, 1)[0][:, 0]
        used, cell_of = np.unique(nearest, return_inverse=True)
        self._cells = WordLists(unit_rows(cells[used]))
        self._words = WordLists(centroids, cell_of.astype(np.int32), len(used))

    def _directions(self, rows: Floats) -> Floats:
        return unit_rows(rows - self._mean)

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """The nearest words in PROBES cells, none of which is empty; -1 and inf where these hold fewer words."""
        words, squared = np.empty((len(rows), num), np.int32), np.empty((len(rows), num))
        probes = min(self.PROBES, len(self._cells.words))
        for start in range(0, len(rows), BLOCK):
            some = slice(start, start + BLOCK)
            block = finite_rows(rows[some], self.centroids.shape[1])
            cells, _ = self._cells.nearest(self._directions(block), None, probes)
            words[some], squared[some] = self._words.nearest(block, cells, num)
        return words, squared


class HnswAssigner:
    """Searches a hierarchical navigable small world graph of the words (Malkov and Yashunin 2018), by faiss.

    The graph holds the words as whole numbers whose float32 distances are exact, so that it and every walk through it
    are the same on every processor; the words found are then compared exactly.
    """

    name: ClassVar[str] = "hnsw"

    WORD_BITS = 10
    """Words have norms up to 2**10 and rows up to twice that: squared distances below 2**24 are exact in float32."""

    DEGREE, CONSTRUCTION_BREADTH, BREADTH = 32, 100, 32

    SPARE = 3
    """Words found beyond those asked for: rounding may have put the nearest ones out of order."""

    def __init__(self, centroids: Floats, graph: faiss.IndexHNSWFlat) -> None:
        self.centroids, self.graph = centroids, graph
        self._grid = Grid.of(centroids, self.WORD_BITS)
        graph.hnsw.efSearch = self.BREADTH

    @classmethod
    def of(cls, centroids: Floats) -> "HnswAssigner":
        """Build the graph."""
        graph = faiss.IndexHNSWFlat(centroids.shape[1], cls.DEGREE)
        graph.hnsw.efConstruction = cls.CONSTRUCTION_BREADTH
        graph.add(_float_numbers(Grid.of(centroids, cls.WORD_BITS), centroids))
        return cls(centroids, graph)

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """The nearest words that the walk meets."""
        block = finite_rows(rows, self.centroids.shape[1])
        wanted = min(num + self.SPARE, len(self.centroids))
        candidates = self.graph.search(_float_numbers(self._grid, block), wanted)[1]
        return nearest_of(block, candidates.astype(np.int32), self.centroids, num)

    def state(self) -> State:
        """The links of the graph: `levels` (W,) int32, `neighbours` int32, and `entry` (2,) int64, where a walk begins
        and at which level."""
        links: Any = self.graph.hnsw  # faiss's stubs lack its tables
        return {
            "levels": faiss.vector_to_array(links.levels),
            "neighbours": faiss.vector_to_array(links.neighbors),
            "entry": np.array([links.entry_point, links.max_level]),
        }

    @classmethod
    def restore(cls, centroids: Floats, state: State) -> "HnswAssigner":
        """From `state()`, without building the graph again."""
        graph = faiss.IndexHNSWFlat(centroids.shape[1], cls.DEGREE)
        faiss.downcast_index(graph.storage).add(_float_numbers(Grid.of(centroids, cls.WORD_BITS), centroids))
        graph.ntotal = len(centroids)
        links: Any = graph.hnsw
        sizes = np.array([links.cum_nb_neighbors(level) for level in range(int(state["levels"].max()) + 1)])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[state["levels"]])])
        faiss.copy_array_to_vector(offsets.astype(np.uint64), links.offsets)
        faiss.copy_array_to_vector(np.array(state["levels"]), links.levels)
        faiss.copy_array_to_vector(np.array(state["neighbours"]), links.neighbors)
        links.entry_point, links.max_level = (int(value) for value in state["entry"])
        return cls(centroids, graph)


def _float_numbers(grid: Grid, rows: Floats) -> Floats:
    """Whole numbers on the grid; rows further out than 2**11 are drawn in."""
    scaled = grid.scaled(rows)
    norms = np.sqrt(np.add.reduce(scaled * scaled, axis=1, keepdims=True))
    largest = 2.0 ** (HnswAssigner.WORD_BITS + 1) - rows.shape[1] ** 0.5  # rounding adds at most sqrt(D) / 2
    scaled *= np.minimum(1.0, largest / np.maximum(norms, 1.0))
    return np.rint(scaled).astype(np.float32)
