"""Vocabularies: large codebooks of visual words, with a fast way to find the nearest ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from cbir.encoding.assigners import CellAssigner, ExactAssigner, HnswAssigner
from cbir.encoding.kmeans import (
    Assigner,
    Sums,
    assignment_sums,
    common_exponent,
    kmeans_in_groups,
    sampled_rows,
    two_level_words,
    update,
)
from cbir.encoding.vocabulary_tree import VocabularyTree
from cbir.errors import ConfigError, DataError
from cbir.types import Array, Float64s, Floats, Int32s, State

__all__ = ["AssignerName", "Begun", "Vocabulary", "WordAssigner", "in_rounds"]

AssignerName = Literal["auto", "exact", "hnsw", "ivf", "tree"]
"""How the nearest words are found. `exact`: by comparison with all; `hnsw`: by a walk on a graph of the words; `ivf`:
among the words of the nearest cells; `tree`: down a vocabulary tree of ten branches; `auto`: exact below 1,024 words,
else ivf, which on 65,536 words agrees with exact as often as hnsw does in half of the time."""

SMALL = 1024
"""Comparing with fewer words costs no more than being clever."""

BRANCHES = 10

TRAINING_PROBES = 6
"""While words still move, the nearest of most rows is enough: more cells lower the error by less than 0.1 %."""


class WordAssigner(Assigner, Protocol):
    """An assigner that a vocabulary can keep."""

    name: ClassVar[str]

    def state(self) -> State:
        """What it would take time to build again from the centroids."""
        ...


def in_rounds(words: int, assigner: AssignerName) -> bool:
    """Whether a vocabulary is trained in rounds over a sample that may lie in several places."""
    return words >= SMALL and assigner != "tree"


@dataclass(frozen=True)
class Begun:
    """A large vocabulary in training: k-means from two levels, then rounds of Lloyd with approximate assignment
    (Philbin et al. 2007), or with exact one if the assigner is.

    A round is `after(sums(rows of one place) + sums(rows of another) + ...)`, to the same bytes wherever rows lie.
    """

    centroids: Floats
    exponent: int
    assigner: AssignerName

    @classmethod
    def of(cls, rows: Array, words: int, seed: int, assigner: AssignerName) -> "Begun":
        """From rows (n, D), of which at most 256 per word are used."""
        sample = sampled_rows(rows, words, seed)
        return cls(two_level_words(sample, words, seed), common_exponent(sample), assigner)

    def sums(self, rows: Array) -> Sums:
        """What these rows (n, D) add to the next round."""
        exact = self.assigner == "exact"
        words = ExactAssigner.of(self.centroids) if exact else CellAssigner.of(self.centroids, TRAINING_PROBES)
        return assignment_sums(rows, words, self.exponent)

    def after(self, sums: Sums) -> "Begun":
        """With the means of the rows of all places."""
        return replace(self, centroids=update(self.centroids, sums))

    def vocabulary(self) -> "Vocabulary":
        """Training has ended."""
        return Vocabulary.of(self.centroids, self.assigner)


class Vocabulary:
    """Visual words (Sivic and Zisserman 2003): `centroids` (W, D) float32, and an assigner that finds the nearest.

    A row's words depend on this row alone, whatever the batch, the number of threads and the processor.
    """

    def __init__(self, assigner: WordAssigner) -> None:
        self.assigner = assigner

    @classmethod
    def of(cls, centroids: Floats, assigner: AssignerName = "auto") -> "Vocabulary":
        """Of given words (W, D); ConfigError for a tree, whose words come from its training."""
        if assigner == "tree":
            raise ConfigError(
                "assigner: a tree finds only the words that it was trained with; use auto, exact, hnsw or ivf"
            )
        build = _BUILDERS[_chosen(assigner, len(centroids))]
        return cls(build(np.require(centroids, np.float32, ["C", "W"])))

    @classmethod
    def train(
        cls, rows: Array, words: int, iterations: int, seed: int, assigner: AssignerName = "auto"
    ) -> "Vocabulary":
        """k-means on rows (n, D) of any numeric dtype, of which at most 256 per word are used; 39 are recommended.

        Small vocabularies take `iterations` rounds of Lloyd from drawn rows. Others are `Begun` and take `iterations`
        rounds; a tree takes them in every part. The same rows and seed give the same bytes. DataError with fewer rows
        than words, or with rows that are not finite; ConfigError where a tree's are not 10, 100, 1,000 ... words.
        """
        if assigner == "tree":
            depth = _depth(words)
            return cls(VocabularyTree.train(rows, BRANCHES, depth, iterations=iterations, seed=seed))
        sample = sampled_rows(rows, words, seed)
        if not in_rounds(words, assigner):
            everywhere = np.zeros(len(sample), np.int32)
            return cls.of(kmeans_in_groups(sample, everywhere, np.array([words]), iterations, seed)[0], assigner)
        begun = Begun.of(sample, words, seed, assigner)
        for _ in range(iterations):
            begun = begun.after(begun.sums(sample))
        return begun.vocabulary()

    @property
    def centroids(self) -> Floats:
        """The words (W, D) float32."""
        return self.assigner.centroids

    def __len__(self) -> int:
        return len(self.centroids)

    def nearest(self, rows: Array, num: int = 1) -> Int32s:
        """The nearest words of rows (K, D) of any numeric dtype: (K, num) int32 by rising distance.

        DataError if D is not the vocabulary's, a value is not finite, or there are fewer than `num` words.
        """
        return self.nearest_with_distances(rows, num)[0]

    def nearest_with_distances(self, rows: Array, num: int = 1) -> tuple[Int32s, Float64s]:
        """The nearest words (K, num), and their Euclidean distances (K, num) in double precision.

        `distances[:, 0] <= tau` are the rows to keep where those far from their word are dropped (Cai et al.).
        """
        if not 1 <= num <= len(self):
            raise DataError(f"{num} words per descriptor were asked for, but the vocabulary has {len(self)}")
        words, squared = self.assigner.nearest(rows, num)
        return words, np.sqrt(squared)

    def state(self) -> State:
        """`centroids` (W, D) float32, `assigner`, its name in bytes, and what that would take time to build again."""
        name = np.frombuffer(self.assigner.name.encode(), np.uint8)
        return {"centroids": self.centroids, "assigner": name, **self.assigner.state()}

    @classmethod
    def restore(cls, state: State) -> "Vocabulary":
        """The vocabulary that had this state."""
        restore = _RESTORERS[state["assigner"].tobytes().decode()]
        return cls(restore(np.require(state["centroids"], np.float32, ["C", "W"]), state))


_BUILDERS: dict[str, Callable[[Floats], WordAssigner]] = {
    "exact": ExactAssigner.of,
    "hnsw": HnswAssigner.of,
    "ivf": CellAssigner.of,
}

_RESTORERS: dict[str, Callable[[Floats, State], WordAssigner]] = {
    "exact": ExactAssigner.restore,
    "hnsw": HnswAssigner.restore,
    "ivf": CellAssigner.restore,
    "tree": VocabularyTree.restore,
}


def _chosen(assigner: AssignerName, words: int) -> str:
    if assigner != "auto":
        return assigner
    return "exact" if words < SMALL else "ivf"


def _depth(words: int) -> int:
    depth = len(str(words)) - 1
    if depth < 1 or words != BRANCHES**depth:
        raise ConfigError(f"words: a tree of {BRANCHES} branches has 10, 100, 1,000 ... words, found {words}")
    return depth
