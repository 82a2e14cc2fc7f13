"""Match kernels: how alike two images are, given the features that share a visual word (Tolias et al. 2013).

    S(X, Y) = gamma(X) gamma(Y) sum_c w_c sum sigma(phi(x), phi(y)),    gamma(X) = S'(X, X)^(-1/2)

over the words c with weights w_c, where the inner sum runs over all pairs of postings of either image, and S' is S
without gamma. The phi of a method says what a posting holds (`embedding`): one vector per image and word, or one per
feature. Its sigma says how two of them compare, and is what this file has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from cbir.index.inverted.consistency import Asked, Stored, peaks, vote, windows
from cbir.index.inverted.embedding import binarised, unit_rows
from cbir.index.inverted.postings import Slice
from cbir.index.inverted.scoring import (
    binary_masses,
    count_matches,
    float_masses,
    score_binary,
    score_binary_bursts,
    score_bm25,
    score_counts,
    score_float,
)
from cbir.types import Array, Float64s, Floats, Int32s, Int64s, Pixels

__all__ = [
    "BinaryKernel",
    "Bm25Kernel",
    "ConsistentKernel",
    "CountKernel",
    "FloatKernel",
    "Images",
    "MatchKernel",
    "QueryRows",
    "monomial_table",
]


@dataclass(frozen=True)
class QueryRows:
    """The postings of a query: where their words stand in a slice (-1: not there), the words' weights, the codes, and
    the geometry (n, 2), or (n, 0) where the kernel does not look at it."""

    slots: Int64s
    weights: Float64s
    codes: Array
    geometry: Pixels


@dataclass(frozen=True)
class Images:
    """The images of a partition: `scores` (N,) to add to, `masses` (N,), and `numbers`, which maps the image numbers of
    a slice to those of the partition."""

    scores: Float64s
    masses: Float64s
    numbers: Int32s


class MatchKernel(Protocol):
    """How postings are made, stored and compared."""

    dtype: ClassVar[type[np.generic]]
    weighted: ClassVar[bool]
    """Whether the words' weights enter `masses`."""

    @property
    def width(self) -> int:
        """How many numbers of `dtype` a posting stores."""
        ...

    def code(self, vectors: Floats) -> Array:
        """The stored form of postings, (n, width)."""
        ...

    def masses(self, starts: Int64s, codes: Array) -> Float64s:
        """What each group of postings of one image and word, from starts[g] to starts[g + 1], adds to S'(X, X)."""
        ...

    def score(self, rows: QueryRows, part: Slice, images: Images) -> None:
        """Add the similarity of the query's rows to `images.scores`."""
        ...

    def final(self, scores: Float64s, own: float, others: Float64s) -> Float64s:
        """S from S', given the masses of the query and of every image."""
        ...


def monomial_table(dim: int, alpha: float, tau: float) -> Float64s:
    """sigma of u = 1 - 2 h / D for the Hamming distances h = 0 .. D: sign(u) |u|^alpha where u >= tau, else 0."""
    u = 1.0 - 2.0 * np.arange(dim + 1) / dim
    return np.where(u >= tau, np.copysign(np.abs(u) ** alpha, u), 0.0)


def _normalised(scores: Float64s, own: float, others: Float64s) -> Float64s:
    if own <= 0.0:
        return np.zeros_like(scores)
    result: Float64s = scores / np.sqrt(np.where(others > 0.0, others, np.inf)) / np.sqrt(own)
    return result


@dataclass(frozen=True)
class BinaryKernel:
    """Signs of D components as bits; sigma is a table over Hamming distances."""

    dtype: ClassVar[type[np.generic]] = np.uint8
    weighted: ClassVar[bool] = True

    table: Float64s
    """sigma of the distances 0 .. D."""
    burst: bool = False
    normalise: bool = True

    @property
    def width(self) -> int:
        """Whole 64-bit words."""
        return 8 * -(-(len(self.table) - 1) // 64)

    def code(self, vectors: Floats) -> Array:
        """Packed bits (n, bytes)."""
        return binarised(vectors)

    def masses(self, starts: Int64s, codes: Array) -> Float64s:
        """The table's value of every pair."""
        masses: Float64s = binary_masses(starts, codes.view(np.uint64), self.table, self.burst)
        return masses

    def score(self, rows: QueryRows, part: Slice, images: Images) -> None:
        """By table."""
        score = score_binary_bursts if self.burst else score_binary
        score(
            images.scores,
            images.numbers,
            rows.slots,
            rows.weights,
            np.ascontiguousarray(rows.codes).view(np.uint64),
            part.starts,
            part.begins,
            part.gaps,
            part.codes.view(np.uint64),
            self.table,
        )

    def matches(self, rows: QueryRows, part: Slice, kept: npt.NDArray[np.bool_]) -> Int64s:
        """What each of the query's rows (n,) matches in the kept images of a slice: `scoring.count_matches`."""
        counts: Int64s = count_matches(
            kept,
            rows.slots,
            np.ascontiguousarray(rows.codes).view(np.uint64),
            part.starts,
            part.begins,
            part.gaps,
            part.codes.view(np.uint64),
            self.table,
            self.burst,
        )
        return counts

    def final(self, scores: Float64s, own: float, others: Float64s) -> Float64s:
        """With gamma, if that is wanted."""
        return _normalised(scores, own, others) if self.normalise else scores


@dataclass(frozen=True)
class ConsistentKernel(BinaryKernel):
    """The same, but only matches that agree on a turn and a change of scale count (weak geometric consistency)."""

    def votes(self, asked: Sequence[tuple[QueryRows, Slice, Int32s]], num_images: int) -> Float64s:
        """S' (N,) of all images of a partition: for each slice the query's rows in it, and the numbers of its images in
        the partition. In place of `score`."""
        calls = [
            (
                Asked(rows.slots, rows.weights, np.ascontiguousarray(rows.codes).view(np.uint64), rows.geometry),
                Stored(numbers, part.starts, part.begins, part.gaps, part.codes.view(np.uint64), part.geometry),
                np.zeros((len(rows.slots), 3), np.int64),
            )
            for rows, part, numbers in asked
        ]
        scores = [np.zeros(0)]
        for window in windows(num_images):
            for query, stored, cursors in calls:
                vote(window, query, stored, cursors, self.table, self.burst)
            scores.append(peaks(window))
        return np.concatenate(scores)


@dataclass(frozen=True)
class FloatKernel:
    """Vectors in float32; sigma(u) = sign(u) |u|^alpha of the inner product u, 0 where u < tau."""

    dtype: ClassVar[type[np.generic]] = np.float32
    weighted: ClassVar[bool] = True

    dim: int
    alpha: float
    tau: float
    unit: bool = True
    """Whether vectors are brought to unit length; an aggregated one then adds exactly 1 to S'(X, X)."""
    normalise: bool = True

    @property
    def width(self) -> int:
        """D."""
        return self.dim

    def code(self, vectors: Floats) -> Array:
        """(n, D) float32."""
        return unit_rows(vectors) if self.unit else vectors

    def masses(self, starts: Int64s, codes: Array) -> Float64s:
        """sigma of every pair; that of a vector of unit length with itself is 1."""
        masses: Float64s = float_masses(starts, codes, self.alpha, self.tau, self.unit)
        return masses

    def score(self, rows: QueryRows, part: Slice, images: Images) -> None:
        """By inner products."""
        score_float(
            images.scores,
            images.numbers,
            rows.slots,
            rows.weights,
            np.ascontiguousarray(rows.codes),
            part.starts,
            part.begins,
            part.gaps,
            part.codes,
            self.alpha,
            self.tau,
        )

    def final(self, scores: Float64s, own: float, others: Float64s) -> Float64s:
        """With gamma, if that is wanted."""
        return _normalised(scores, own, others) if self.normalise else scores


@dataclass(frozen=True)
class CountKernel:
    """Counts n of a word in an image, damped to sqrt(n) if wanted; sigma is their product."""

    dtype: ClassVar[type[np.generic]] = np.uint16
    weighted: ClassVar[bool] = True

    root: bool = False

    @property
    def width(self) -> int:
        """One number."""
        return 1

    def code(self, vectors: Floats) -> Array:
        """(n, 1) uint16; larger counts become 65,535."""
        return np.minimum(vectors, 65535).astype(np.uint16)

    def masses(self, starts: Int64s, codes: Array) -> Float64s:  # noqa: ARG002 - a group is one posting
        """The square of the damped count."""
        counts = codes[:, 0].astype(np.float64)
        return counts if self.root else counts * counts

    def score(self, rows: QueryRows, part: Slice, images: Images) -> None:
        """By products of damped counts."""
        counts = rows.codes[:, 0].astype(np.float64)
        weights = rows.weights * (np.sqrt(counts) if self.root else counts)
        score_counts(
            images.scores,
            images.numbers,
            rows.slots,
            weights,
            part.starts,
            part.begins,
            part.gaps,
            part.codes,
            self.root,
        )

    def final(self, scores: Float64s, own: float, others: Float64s) -> Float64s:
        """The cosine of the weighted histograms."""
        return _normalised(scores, own, others)


@dataclass(frozen=True)
class Bm25Kernel:
    """Okapi BM25: counts, damped by how many features the image has beside the mean over all images."""

    dtype: ClassVar[type[np.generic]] = np.uint16
    weighted: ClassVar[bool] = False

    k1: float
    b: float

    @property
    def width(self) -> int:
        """One number."""
        return 1

    def code(self, vectors: Floats) -> Array:
        """(n, 1) uint16; larger counts become 65,535."""
        return np.minimum(vectors, 65535).astype(np.uint16)

    def masses(self, starts: Int64s, codes: Array) -> Float64s:  # noqa: ARG002 - a group is one posting
        """The count: its sum is the length of the image."""
        return codes[:, 0].astype(np.float64)

    def score(self, rows: QueryRows, part: Slice, images: Images) -> None:
        """The query's counts times the images' saturated ones."""
        relative = images.masses / max(part.mean_length, 1e-12)
        dampings = self.k1 * (1.0 - self.b + self.b * relative)
        score_bm25(
            images.scores,
            images.numbers,
            rows.slots,
            rows.weights * rows.codes[:, 0],
            part.starts,
            part.begins,
            part.gaps,
            part.codes,
            dampings,
            self.k1,
        )

    def final(self, scores: Float64s, own: float, others: Float64s) -> Float64s:  # noqa: ARG002 - lengths are inside
        """As it is."""
        return scores
