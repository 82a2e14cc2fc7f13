"""A partition of an inverted file: searched from the mapped files of its ranges of words."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cbir.errors import DataError
from cbir.index.index import SearchIndex
from cbir.index.inverted.consistency import coded_geometry
from cbir.index.inverted.kernels import BinaryKernel, ConsistentKernel, Images, MatchKernel, QueryRows
from cbir.index.inverted.postings import Slice, write_slice
from cbir.types import Array, FeatureBatch, Float64s, Floats, Hits, Int32s, Int64s, Pixels

__all__ = ["InvertedPartition", "group_starts", "rounded"]


_GRAIN = 2.0**-32


def rounded(masses: Float64s) -> Float64s:
    """Multiples of 2^-32, whose sums are exact in any order."""
    result: Float64s = np.round(masses / _GRAIN) * _GRAIN
    return result


def group_starts(numbers: Int64s, words: Int32s) -> Int64s:
    """Where the runs of one image and word start, with the end after the last: (g + 1,)."""
    new = np.ones(len(words), bool)
    new[1:] = (np.diff(numbers) != 0) | (np.diff(words) != 0)
    return np.append(np.flatnonzero(new), len(words)).astype(np.int64)


class InvertedPartition(SearchIndex):
    """The postings of one partition."""

    def __init__(self, kernel: Callable[[int], MatchKernel], slices: Sequence[Slice]) -> None:
        self._slices = list(slices)
        self._kernel = kernel(slices[0].dim)
        self.image_ids: Int64s = np.unique(np.concatenate([part.image_ids for part in slices]))
        self._numbers = [np.searchsorted(self.image_ids, part.image_ids).astype(np.int32) for part in slices]
        self._masses = np.zeros(len(self.image_ids))
        for numbers, part in zip(self._numbers, slices, strict=True):
            self._masses[numbers] += part.masses
        self._deleted = np.zeros(len(self.image_ids), bool)

    def delete(self, image_ids: Int64s) -> None:
        """From now on these images are not found; their postings stay until the next merge."""
        self._deleted |= np.isin(self.image_ids, image_ids)

    def search(self, queries: FeatureBatch, depth: int) -> Hits:
        """The best `depth` images per query that share a word with it; what `Index.queries` returned is asked.

        `queries.weights`, where there are any, say what the query's rows count beside the weights of their words.
        ValueError for a depth below one or queries without words, DataError for codes of another length.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, found {depth}")
        words, codes = self._words(queries), queries.descriptors
        consistent = isinstance(self._kernel, ConsistentKernel)
        geometry = coded_geometry(queries.geometry) if consistent else np.empty((len(words), 0), np.uint8)
        weights = np.ones(len(words)) if queries.weights is None else queries.weights
        owned = [queries.rows(i) for i in range(len(queries))]
        hits = [self._search(words[rows], codes[rows], geometry[rows], weights[rows], depth) for rows in owned]
        ids = [hit.image_ids for hit in hits] or [np.empty((0, depth), np.int64)]
        scores = [hit.scores for hit in hits] or [np.empty((0, depth), np.float32)]
        return Hits(np.concatenate(ids), np.concatenate(scores))

    def matches(self, queries: FeatureBatch) -> Int64s:
        """What each row (K,) of the queries matches in the images of this partition, before weights, in units of 2^-20.

        ValueError for a method that does not compare binary codes.
        """
        if not isinstance(self._kernel, BinaryKernel):
            return super().matches(queries)
        words, counts = self._words(queries), np.zeros(len(queries.descriptors), np.int64)
        for part, numbers in zip(self._slices, self._numbers, strict=True):
            rows = QueryRows(part.slots(words), np.ones(len(words)), queries.descriptors, np.empty((0, 0), np.uint8))
            counts += self._kernel.matches(rows, part, ~self._deleted[numbers])
        return counts

    def _words(self, queries: FeatureBatch) -> Int32s:
        """The words of queries that this partition can be asked."""
        if queries.words is None:
            raise ValueError("queries have no words: an inverted file is asked what its index's `queries` returns")
        if queries.descriptors.shape[1] != self._kernel.width:
            raise DataError(
                f"these queries have codes of {queries.descriptors.shape[1]} numbers, this index of "
                f"{self._kernel.width}; encode them with the index of the same version"
            )
        return queries.words

    def _search(self, words: Int32s, codes: Array, geometry: Pixels, counted: Float64s, depth: int) -> Hits:
        weights = self._slices[0].weights[words]
        rows = [QueryRows(part.slots(words), weights * counted, codes, geometry) for part in self._slices]
        scores = self._scores(rows)
        scores[self._deleted] = 0.0
        starts = group_starts(np.zeros(len(words), np.int64), words)
        own = self._kernel.masses(starts, codes)
        own = own * weights[starts[:-1]] if self._kernel.weighted else own
        return self._best(self._kernel.final(scores, float(rounded(own).sum()), self._masses), depth)

    def _scores(self, rows: Sequence[QueryRows]) -> Float64s:
        """S' of every image (N,), for the rows of one query in every slice."""
        asked = list(zip(rows, self._slices, self._numbers, strict=True))
        if isinstance(self._kernel, ConsistentKernel):
            return self._kernel.votes(asked, len(self.image_ids))
        scores = np.zeros(len(self.image_ids))
        for own, part, numbers in asked:
            self._kernel.score(own, part, Images(scores, self._masses, numbers))
        return scores

    def _best(self, scores: Float64s, depth: int) -> Hits:
        """The images with a score, best first."""
        found = np.flatnonzero(scores)
        values: Floats = scores[found].astype(np.float32)
        if len(found) > depth:
            least = np.partition(values, len(values) - depth)[len(values) - depth]
            found, values = found[values >= least], values[values >= least]
        return Hits.ranked(self.image_ids[found][None], values[None], depth)

    def save(self, path: Path) -> None:
        """Write a partition of one slice."""
        (part,) = self._slices
        write_slice(path, part)
