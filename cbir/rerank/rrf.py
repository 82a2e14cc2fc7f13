"""Reciprocal rank fusion: the rankings of several channels become one by their ranks alone."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat

from cbir.rerank.lists import Doubles, RankedList, fuse_lists
from cbir.rerank.reranker import FusionSpec
from cbir.types import Hits

__all__ = ["ReciprocalRankFusion", "Rrf"]


class Rrf(FusionSpec):
    """Reciprocal rank fusion (Cormack et al. 2009): the sum of 1 / (k + rank) over the channels, rank 1 for the best.

    An image that a channel did not return gets nothing from it. Scores do not matter, so that a channel which is sure
    of its first results counts no more than one that is not: a baseline.
    """

    name: Literal["rrf"] = "rrf"
    paper: ClassVar[str] = "Cormack, Clarke, Büttcher, Reciprocal rank fusion outperforms Condorcet, SIGIR 2009"

    k: NonNegativeFloat = 60.0
    """How little the first ranks differ."""

    def build(self, backgrounds: Mapping[str, float] | None = None) -> "ReciprocalRankFusion":  # noqa: ARG002 - needs none
        """The working fusion."""
        return ReciprocalRankFusion(self)


class ReciprocalRankFusion:
    """Sum of reciprocal ranks."""

    def __init__(self, spec: Rrf) -> None:
        self._spec = spec

    def fuse(self, hits: Mapping[str, Hits], depth: int) -> Hits:
        """The best `depth` of all images in any list."""
        return fuse_lists(hits, depth, self._sum)

    def _sum(self, lists: Mapping[str, RankedList], number: int) -> Doubles:
        total = np.zeros(number)
        for found in lists.values():
            total[found.positions] += 1 / (self._spec.k + np.arange(1, len(found.positions) + 1))
        return total
