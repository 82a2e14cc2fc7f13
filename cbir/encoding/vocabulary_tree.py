"""Vocabulary trees: visual words by hierarchical k-means."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from cbir.encoding.kmeans import kmeans_in_groups, sampled_rows
from cbir.encoding.scan import WordLists
from cbir.errors import DataError
from cbir.types import Array, Float64s, Floats, Int32s, State

__all__ = ["VocabularyTree"]


class VocabularyTree:
    """Hierarchical k-means (Nistér and Stewénius 2006): `levels[l]` (N, D) float32 are the nodes of a level, first the
    children of the root, and `parents[l]` (N,) int32 their parents in the level above, the root being number 0.

    The words are the nodes of the last level, `centroids` (W, D). Ten branches and six levels make a million words, and
    finding one costs 60 comparisons. `breadth` nodes are kept per level when words are looked for: one, as published,
    is a single way down; more find the nearest word more often.
    """

    name: ClassVar[str] = "tree"

    def __init__(self, levels: Sequence[Floats], parents: Sequence[Int32s], breadth: int = 1) -> None:
        self.levels, self.parents, self.breadth = tuple(levels), tuple(parents), breadth
        self.centroids: Floats = self.levels[-1]
        sizes = [1, *(len(nodes) for nodes in levels)]
        self._lists = [
            WordLists(nodes, above, size) for nodes, above, size in zip(levels, parents, sizes[:-1], strict=True)
        ]

    @classmethod
    def train(
        cls, rows: Array, branches: int = 10, depth: int = 6, *, iterations: int = 10, seed: int, breadth: int = 1
    ) -> "VocabularyTree":
        """Divide rows (n, D) of any numeric dtype, and every part again, `depth` times into up to `branches` parts.

        At most 256 rows per word are used; 39 are recommended. A part with few rows has fewer children, and words that
        no row is nearest to are left out. The same rows and seed give the same bytes. DataError with fewer rows than
        words, or with rows that are not finite.
        """
        if len(rows) < branches**depth:
            raise DataError(
                f"a tree of {branches} branches and depth {depth} has {branches**depth} words and needs at least as "
                f"many descriptors, but the sample has {len(rows)}; take a larger sample, or a smaller depth"
            )
        sample = sampled_rows(rows, branches**depth, seed)
        levels: list[Floats] = []
        parents: list[Int32s] = []
        node_of, num_nodes = np.zeros(len(sample), np.int32), 1
        for level in range(depth):
            wanted = np.minimum(np.bincount(node_of, minlength=num_nodes), branches)
            nodes, above = kmeans_in_groups(sample, node_of, wanted, iterations, seed + level)
            found = WordLists(nodes, above, num_nodes).nearest(sample, node_of[:, None], 1)[0][:, 0]
            used, places = np.unique(found, return_inverse=True)
            node_of, num_nodes = places.astype(np.int32), len(used)
            levels.append(nodes[used])
            parents.append(above[used])
        return cls(levels, parents, breadth)

    def paths(self, rows: Array) -> Int32s:
        """The way of rows (K, D) down the tree, to the nearest child of every node: node numbers (K, depth)."""
        paths = np.zeros((len(rows), len(self.levels) + 1), np.int32)
        for level, lists in enumerate(self._lists):
            paths[:, level + 1 :] = lists.nearest(rows, paths[:, level : level + 1].copy(), 1)[0]
        return paths[:, 1:]

    def nearest(self, rows: Array, num: int) -> tuple[Int32s, Float64s]:
        """The nearest words met when the `breadth` nearest nodes of every level, or `num` if more, are followed."""
        nodes, squared = np.zeros((len(rows), 1), np.int32), np.zeros((len(rows), 1))
        for lists in self._lists:
            nodes, squared = lists.nearest(rows, nodes, max(self.breadth, num))
        return nodes[:, :num].copy(), squared[:, :num].copy()

    def state(self) -> State:
        """`parents0` (N,) int32 and so on, `level0` (N, D) float32 and so on but the last, and `breadth` (1,) int64."""
        levels = {f"level{level}": nodes for level, nodes in enumerate(self.levels[:-1])}
        parents = {f"parents{level}": above for level, above in enumerate(self.parents)}
        return {**levels, **parents, "breadth": np.array([self.breadth])}

    @classmethod
    def restore(cls, centroids: Floats, state: State) -> "VocabularyTree":
        """From `state()` and the centroids, which are the last level."""
        depth = sum(name.startswith("parents") for name in state)
        levels = [*(state[f"level{level}"] for level in range(depth - 1)), centroids]
        return cls(levels, [state[f"parents{level}"] for level in range(depth)], int(state["breadth"][0]))
