"""Tentative matches: which features of a query and of database images may show the same point.

Three ways: Lowe's ratio test, mutual nearest neighbours, and the same visual word with similar binary codes. All of
them may be followed by the one-to-one filter, without which repeated patterns make verification worse than none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveInt

from cbir.rerank.reranker import RerankerSpec
from cbir.rerank.word_matches import QueryWords, match_words
from cbir.types import Array, FeatureBatch, Floats, Int32s, Int64s

__all__ = ["Matcher", "Matches", "MatchingSpec", "mutual_matches", "ratio_matches"]

Pairs = tuple[Int32s, Int32s, Floats]
"""Rows of the query, rows of the database, and their distances (M,), nearest first."""


@dataclass(frozen=True)
class Matches:
    """Matches of a query with N images of a batch: those of image i are offsets[i] to offsets[i + 1], nearest first.

    `images` (N,) are positions in the batch. `query` (M,) and `database` (M,) are rows of the query and of the batch; a
    feature that has several rows, one for each of its words, is named by one of them.
    """

    images: Int64s
    offsets: Int64s
    query: Int32s
    database: Int32s

    def __len__(self) -> int:
        return len(self.images)

    def per_image(self) -> Iterator[slice]:
        """The matches of each image."""
        for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield slice(start, end)

    def points(self, query: FeatureBatch, database: FeatureBatch) -> Floats:
        """x, y in the query and x, y in the database image (M, 4)."""
        sides = query.geometry[self.query, :2], database.geometry[self.database, :2]
        return np.ascontiguousarray(np.hstack(sides), np.float32)


Matcher = Callable[[FeatureBatch, FeatureBatch, Int64s], Matches]
"""Matches a query (a batch of one image) with the images at some positions of a batch."""


class MatchingSpec(RerankerSpec):
    """What all rerankers by local matches have in common: which hits, and which matches."""

    channel: str = Field(examples=["local"], description="channel with local features")
    top: NonNegativeInt = Field(default=100, description="how many of the best hits are compared; 0: all of them")
    matches: Literal["ratio", "mutual", "word"] = Field(
        default="word",
        description="nearest descriptors by the ratio test, mutually nearest ones, or the same visual word. The first "
        "two need keep_features: true in the channel, the last one an inverted file",
    )
    ratio: float = Field(
        default=0.8, gt=0, le=1, description="nearest over second nearest distance of a match, at most"
    )
    root: bool = Field(default=True, description="compare square roots of L1-normalised descriptors (RootSIFT)")
    max_hamming: float = Field(
        default=0.35, ge=0, le=1, description="share of the bits in which the codes of a match differ, at most"
    )
    one_to_one: bool = Field(default=True, description="a feature of either image is matched at most once")
    max_matches: PositiveInt = Field(default=1000, description="the nearest so many matches of a pair of images count")

    @property
    def reads(self) -> Literal["features", "signatures"]:
        """Visual words and codes for matches by words, else raw features."""
        return "signatures" if self.matches == "word" else "features"

    def matcher(self) -> Matcher:
        """What finds the matches."""
        return self._match_words if self.matches == "word" else self._match_descriptors

    def _match_words(self, query: FeatureBatch, database: FeatureBatch, images: Int64s) -> Matches:
        words = QueryWords.of(query)
        found = match_words(words, database, images, self.max_hamming, self.one_to_one, self.max_matches)
        return Matches(images, *found)

    def _match_descriptors(self, query: FeatureBatch, database: FeatureBatch, images: Int64s) -> Matches:
        left = _comparable(query.descriptors, self.root)
        pairs = [self._pairs(left, database, database.rows(image)) for image in images.tolist()]
        offsets = np.zeros(len(pairs) + 1, np.int64)
        np.cumsum([len(rows) for rows, _ in pairs], out=offsets[1:])
        sides = [np.concatenate([np.empty(0, np.int32), *side]) for side in zip(*pairs, strict=True)] or [_NONE, _NONE]
        return Matches(images, offsets, *sides)

    def _pairs(self, left: Floats, database: FeatureBatch, rows: slice) -> tuple[Int32s, Int32s]:
        right = _comparable(database.descriptors[rows], self.root)
        if self.matches == "mutual":
            query, stored, _ = mutual_matches(left, right)
        else:
            query, stored, _ = ratio_matches(left, right, self.ratio, self.one_to_one)
        return query[: self.max_matches], stored[: self.max_matches] + np.int32(rows.start)


_NONE = np.empty(0, np.int32)


def ratio_matches(left: Floats, right: Floats, ratio: float, one_to_one: bool) -> Pairs:
    """Lowe's ratio test (2004): features of the left image (K, D) whose nearest in the right one (K', D) is nearer than
    `ratio` times the second nearest; with `one_to_one` only the nearest left feature of each right one."""
    if len(left) == 0 or len(right) < 2:
        return _NONE, _NONE, np.empty(0, np.float32)
    near = _nearness(left, right)
    rows, nearest = np.arange(len(left)), near.argmax(1)
    best = near[rows, nearest]
    near[rows, nearest] = -np.inf
    squares = np.einsum("kd,kd->k", left, left)
    first, second = (np.maximum(squares - 2 * score, 0) for score in (best, near.max(1)))
    matched = np.flatnonzero(first < ratio**2 * second)
    if one_to_one:
        by_distance = matched[np.lexsort((matched, first[matched], nearest[matched]))]
        matched = by_distance[np.unique(nearest[by_distance], return_index=True)[1]]
    return _nearest_first(matched, nearest[matched], first[matched])


def mutual_matches(left: Floats, right: Floats) -> Pairs:
    """Features of the left (K, D) and of the right image (K', D) that are nearest to each other."""
    if len(left) == 0 or len(right) == 0:
        return _NONE, _NONE, np.empty(0, np.float32)
    near = _nearness(left, right)
    nearest = near.argmax(1)
    # The left side's own norms do not matter along a row, but do along a column.
    squares = np.einsum("kd,kd->k", left, left)
    back = (near - squares[:, None] / 2).argmax(0)
    matched = np.flatnonzero(back[nearest] == np.arange(len(left)))
    distances = np.maximum(squares[matched] - 2 * near[matched, nearest[matched]], 0)
    return _nearest_first(matched, nearest[matched], distances)


def _nearness(left: Floats, right: Floats) -> Floats:
    """x.y - |y|^2 / 2 of all pairs (K, K'), by one product: its largest value in a row is the nearest y."""
    product: Floats = _with_column(left, 1.0) @ _with_column(right, -np.einsum("kd,kd->k", right, right) / 2).T
    return product


def _with_column(rows: Floats, column: float | Array) -> Floats:
    wider = np.empty((len(rows), rows.shape[1] + 1), np.float32)
    wider[:, :-1], wider[:, -1] = rows, column
    return wider


def _nearest_first(left: npt.NDArray[np.intp], right: npt.NDArray[np.intp], squares: Floats) -> Pairs:
    order = np.lexsort((left, squares))
    return left[order].astype(np.int32), right[order].astype(np.int32), np.sqrt(squares[order])


def _comparable(descriptors: Array, root: bool) -> Floats:
    """Rows (K, D) in float32, RootSIFT of them if wanted."""
    rows = descriptors.astype(np.float32)
    if root:
        rows /= np.maximum(rows.sum(1, keepdims=True), 1e-12)
        np.sqrt(rows, out=rows)
    return rows
