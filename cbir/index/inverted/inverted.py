"""The inverted file (Sivic and Zisserman 2003): visual word -> images, with one match kernel for all methods.

Entries are postings: `image_id`, `word` and `code`, and where a method looks at geometry `angle` and `scale`. Weights
of words come from the totals over all shards; a partition holds its images' postings of all words, in one file or in
several of a range of words each, which gives the same scores.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cbir.encoding.kmeans import Sums
from cbir.encoding.vocabulary import AssignerName, Begun, Vocabulary, in_rounds
from cbir.errors import ArtifactError
from cbir.index.dense import code_column, codes_of, float_rows, stored_order
from cbir.index.index import Assignment, Index, IndexSpec
from cbir.index.inverted.consistency import NUM_COLUMNS, coded_geometry
from cbir.index.inverted.embedding import Embedded, binarised
from cbir.index.inverted.kernels import ConsistentKernel, MatchKernel
from cbir.index.inverted.partition import InvertedPartition, group_starts, rounded
from cbir.index.inverted.postings import Slice, read_slice
from cbir.index.inverted.scoring import MATCH_UNITS, encode_gaps
from cbir.types import Array, FeatureBatch, Float64s, Floats, Int32s, Int64s, Pixels, State

__all__ = ["InvertedIndex", "InvertedSpec", "Phi"]


_GEOMETRY = ("angle", "scale")

Phi = Callable[[FeatureBatch, Int32s], Embedded]
"""(features, their words (K, m)) -> postings."""


class InvertedSpec(IndexSpec):
    """What all inverted files have: a codebook, and how many words a feature is assigned to."""

    suffix: ClassVar[str] = "arrow"
    local: ClassVar[bool] = True
    has_statistics: ClassVar[bool] = True
    has_codebook: ClassVar[bool] = True
    encodes_queries: ClassVar[bool] = True

    words: PositiveInt = Field(default=65536, description="size of the codebook")
    iterations: PositiveInt = Field(default=5, description="rounds of k-means")
    assigner: AssignerName = Field(
        default="auto", description="how the nearest words are found; auto: exactly below 1,024 words, else by ivf"
    )
    assignments: PositiveInt = Field(default=1, description="nearest words of a feature of an indexed image")
    query_assignments: PositiveInt = Field(default=1, description="nearest words of a feature of a query")
    features: PositiveInt | None = Field(
        default=None, description="store the strongest so many features of an indexed image; queries ask with all"
    )
    max_distance: PositiveFloat | None = Field(
        default=None, description="drop features further than this from their nearest word (Cai et al.)"
    )
    idf: bool = Field(default=False, description="weight a word by ln(N / n)^2, for n of N images that have it")
    word_ranges: PositiveInt = Field(
        default=1, description="files of a partition, each a range of words; they are merged in parallel"
    )

    @model_validator(mode="after")
    def _assignments_fit(self) -> "InvertedSpec":
        for name in ("assignments", "query_assignments"):
            if getattr(self, name) > self.words:
                raise ValueError(f"{name}: {getattr(self, name)} of {self.words} words cannot be the nearest")
        return self

    def kernel(self, dim: int) -> MatchKernel:
        """How postings of vectors with D = `dim` are stored and compared."""
        raise NotImplementedError

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:
        """What an image's postings hold; `own` is what `fit` returned."""
        raise NotImplementedError

    def query_phi(self, vocabulary: Vocabulary, own: State) -> Phi:
        """What a query's postings hold: the same, unless the method is asymmetric."""
        return self.phi(vocabulary, own)

    def code_dim(self, dim: int) -> int:
        """D of what a posting holds, for features of D = `dim`."""
        return dim

    def fit(self, vocabulary: Vocabulary, sample: FeatureBatch, seed: int) -> State:  # noqa: ARG002 - few methods do
        """What the method trains beside the codebook."""
        return {}

    def train(self, sample: FeatureBatch, seed: int) -> "InvertedIndex":
        """Train the codebook on the features of the sample; DataError if there are fewer than words."""
        codebook = self.train_codebook(sample, seed)
        for number in range(1, self.codebook_rounds + 1):
            sums = self.codebook_sums(codebook, sample)
            codebook = self.next_codebook(codebook, sums, last=number == self.codebook_rounds)
        return self.finish(codebook, sample, seed)

    def codebook_identity(self) -> dict[str, Any]:
        """Its size, and how it is trained and searched."""
        return self.model_dump(mode="json", include={"words", "iterations", "assigner"})

    @property
    def codebook_rounds(self) -> int:
        """Those of k-means, if the codebook is large; a small one is trained at once."""
        return self.iterations if in_rounds(self.words, self.assigner) else 0

    def train_codebook(self, sample: FeatureBatch, seed: int) -> State:
        """The state of the vocabulary, or `centroids` and `exponent` where rounds follow."""
        rows = float_rows(sample)
        if not self.codebook_rounds:
            return Vocabulary.train(rows, self.words, self.iterations, seed, self.assigner).state()
        return _begun_state(Begun.of(rows, self.words, seed, self.assigner))

    def codebook_sums(self, codebook: State, batch: FeatureBatch) -> State:
        """Of `kmeans.Sums`, the arrays."""
        sums = self._begun(codebook).sums(float_rows(batch))
        return {"sums": sums.sums, "counts": sums.counts, "errors": sums.errors}

    def next_codebook(self, codebook: State, sums: State, *, last: bool) -> State:
        """With the means of all rows; the vocabulary's state after the last round."""
        begun = self._begun(codebook)
        begun = begun.after(Sums(sums["sums"], sums["counts"], sums["errors"], begun.exponent))
        return begun.vocabulary().state() if last else _begun_state(begun)

    def _begun(self, codebook: State) -> Begun:
        return Begun(codebook["centroids"], int(codebook["exponent"][0]), self.assigner)

    def finish(self, codebook: State, sample: FeatureBatch, seed: int) -> "InvertedIndex":
        """What the method trains beside the vocabulary."""
        vocabulary = Vocabulary.restore(codebook)
        return InvertedIndex(self, vocabulary, self.fit(vocabulary, sample, seed))

    def restore(self, state: State) -> "InvertedIndex":
        """From codebook and the method's own state."""
        own = {name.removeprefix("own."): array for name, array in state.items() if name.startswith("own.")}
        rest = {name: array for name, array in state.items() if not name.startswith("own.")}
        return InvertedIndex(self, Vocabulary.restore(rest), own)

    @property
    def pieces(self) -> int:
        """One file per range of words."""
        return self.word_ranges

    def load(self, *paths: Path) -> "InvertedPartition":
        """Open a partition from the files of its ranges of words, memory-mapped."""
        slices = [read_slice(path) for path in paths]
        for path, part in zip(paths, slices, strict=True):
            if isinstance(self.kernel(part.dim), ConsistentKernel) and part.geometry.shape[1] != NUM_COLUMNS:
                raise ArtifactError(
                    f"{path}: its postings have no angles and scales, so it was made with geometry: false; index "
                    "again, or search it with geometry: false"
                )
        return InvertedPartition(self.kernel, slices)

    def entry_bytes(self, dim: int) -> int:
        """The code and the geometry, and about two bytes to say which image it belongs to."""
        kernel = self.kernel(self.code_dim(dim))
        geometry = NUM_COLUMNS if isinstance(kernel, ConsistentKernel) else 0
        return kernel.width * np.dtype(kernel.dtype).itemsize + geometry + 2

    def word_weights(self, images: int, word_images: Int64s) -> Float64s:
        """w_c (W,): ln(N / n)^2 with `idf`, else 1; 1 for a word that no image has, which nothing can match."""
        if not self.idf:
            return np.ones(len(word_images))
        seen = np.maximum(word_images, 1)
        return np.where(word_images > 0, np.log(max(images, 1) / seen) ** 2, 1.0)


def _begun_state(begun: Begun) -> State:
    return {"centroids": begun.centroids, "exponent": np.array([begun.exponent], np.int64)}


class InvertedIndex(Index):
    """A trained codebook with the match kernel of a method, without content."""

    def __init__(self, spec: InvertedSpec, vocabulary: Vocabulary, own: State) -> None:
        self.spec, self.vocabulary, self.own = spec, vocabulary, own
        self._dim = spec.code_dim(vocabulary.centroids.shape[1])
        self.kernel = spec.kernel(self._dim)
        self._phi, self._query_phi = spec.phi(vocabulary, own), spec.query_phi(vocabulary, own)
        self._last: tuple[Floats, int, tuple[Int32s, Float64s]] | None = None

    def state(self) -> State:
        """The vocabulary's arrays, and those of the method with the prefix `own.`."""
        return {**self.vocabulary.state(), **{f"own.{name}": array for name, array in self.own.items()}}

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per posting: image_id int64, word int32, code fixed_size_binary, and where the kernel looks at them
        angle and scale uint8; by image, then word."""
        batch, words = self._assigned(self._strongest(batch), self.spec.assignments)
        embedded = self._phi(batch, words)
        codes = self.kernel.code(embedded.vectors)
        columns = {
            "image_id": pa.array(batch.image_ids[embedded.images]),
            "word": pa.array(embedded.words),
            "code": code_column(codes),
        }
        if self._consistent:
            geometry = coded_geometry(batch.geometry[embedded.rows])
            columns |= {name: pa.array(column) for name, column in zip(_GEOMETRY, geometry.T, strict=True)}
        fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
        metadata = {"code": np.dtype(self.kernel.dtype).name}
        return pa.table(list(columns.values()), schema=pa.schema(fields, metadata=metadata))

    def _strongest(self, batch: FeatureBatch) -> FeatureBatch:
        """The features that are stored."""
        if self.spec.features is None:
            return batch
        ranks = np.arange(len(batch.descriptors)) - np.repeat(batch.offsets[:-1], batch.counts)
        return batch.take_rows(ranks < self.spec.features)

    def _assigned(self, batch: FeatureBatch, num: int) -> tuple[FeatureBatch, Int32s]:
        """Features, as far as they are near to a word, with their nearest words (K, num)."""
        rows = float_rows(batch, self.vocabulary.centroids.shape[1])
        words, distances = self._nearest(rows, num)
        batch = batch.with_descriptors(rows)
        if self.spec.max_distance is None:
            return batch, words
        near = distances[:, 0] <= self.spec.max_distance
        return batch.take_rows(near), words[near]

    def _nearest(self, rows: Floats, num: int) -> tuple[Int32s, Float64s]:
        """Words and distances; those of the last rows are remembered, because postings and signatures of a batch ask
        for the same ones one after the other."""
        if self._last is None or self._last[0] is not rows or self._last[1] != num:
            self._last = rows, num, self.vocabulary.nearest_with_distances(rows, num)
        return self._last[2]

    def assignment(self, batch: FeatureBatch) -> Assignment:
        """The nearest word of every row, and how far it is."""
        rows = float_rows(batch, self.vocabulary.centroids.shape[1])
        words, squared = self._nearest(rows, 1)
        return Assignment(words[:, 0].astype(np.int64), squared[:, 0], len(self.vocabulary.centroids))

    def queries(self, batch: FeatureBatch) -> FeatureBatch:
        """The postings of the queries: codes as descriptors, their words, and if the kernel looks at it their features'
        geometry."""
        batch, words = self._assigned(batch, self.spec.query_assignments)
        embedded = self._query_phi(batch, words)
        offsets = np.searchsorted(embedded.images, np.arange(len(batch) + 1)).astype(np.int64)
        codes = self.kernel.code(embedded.vectors)
        queries = FeatureBatch(batch.image_ids, offsets, codes, sizes=batch.sizes, words=embedded.words)
        return replace(queries, geometry=batch.geometry[embedded.rows]) if self._consistent else queries

    def damped(self, queries: FeatureBatch, matches: Int64s) -> FeatureBatch:
        """Every row counts 1 / sqrt(matches); one that matches nothing counts 1."""
        if not self.spec.damps_matches:
            return super().damped(queries, matches)
        return replace(queries, weights=1.0 / np.sqrt(np.where(matches > 0, matches / MATCH_UNITS, 1.0)))

    def signatures(self, batch: FeatureBatch) -> FeatureBatch:
        """Every stored feature's nearest word and the signs of its residual to it, packed; rows stay in order.

        They are what geometric verification needs to match features by their words.
        """
        return self._signatures(self._strongest(batch), 1)

    def query_signatures(self, batch: FeatureBatch) -> FeatureBatch:
        """The same of all features of queries and of several words each: of as many as are asked for, and of at least
        three, because with one verification loses true matches."""
        return self._signatures(batch, min(self.spec.words, max(self.spec.query_assignments, 3)))

    def _signatures(self, batch: FeatureBatch, num: int) -> FeatureBatch:
        batch, words = self._assigned(batch, num)
        rows = np.repeat(np.arange(len(words)), num)
        flat = words.reshape(-1)
        residuals = batch.descriptors[rows] - self.vocabulary.centroids[flat]
        return FeatureBatch(
            batch.image_ids,
            batch.offsets * num,
            binarised(residuals),
            np.ascontiguousarray(batch.geometry[rows]),
            batch.sizes,
            words=flat,
        )

    def statistics(self, entries: pa.Table) -> State:
        """`images` (1,), `word_images` (W,): images that have each word; `features` (1,): assignments in all."""
        ids, words = entries.column("image_id").to_numpy(), entries.column("word").to_numpy()
        image_ids, numbers = np.unique(ids, return_inverse=True)
        pairs = np.unique(words.astype(np.int64) * max(1, len(image_ids)) + numbers)
        having = np.bincount(pairs // max(1, len(image_ids)), minlength=self.spec.words)
        counts = codes_of(entries, self.kernel.dtype, self.kernel.width) if self._counts else np.ones((len(ids), 1))
        return {
            "images": np.array([len(image_ids)], np.int64),
            "word_images": having.astype(np.int64),
            "features": np.array([int(counts.sum(dtype=np.int64))], np.int64),
        }

    @property
    def _counts(self) -> bool:
        return self.kernel.dtype is np.uint16

    @property
    def _consistent(self) -> bool:
        return isinstance(self.kernel, ConsistentKernel)

    def piece(self, entries: pa.Table, number: int) -> pa.Table:
        """The postings of the words of range number `number`."""
        edges = [self.spec.words * n // self.spec.word_ranges for n in (number, number + 1)]
        words = entries.column("word").to_numpy()
        return entries.take(np.flatnonzero((words >= edges[0]) & (words < edges[1])))

    def build(self, entries: pa.Table, totals: State | None = None) -> "InvertedPartition":
        """A partition of one slice."""
        return InvertedPartition(self.spec.kernel, [self._slice(entries, totals or self.statistics(entries))])

    def _slice(self, entries: pa.Table, totals: State) -> Slice:
        ids, words = entries.column("image_id").to_numpy(), entries.column("word").to_numpy()
        codes = codes_of(entries, self.kernel.dtype, self.kernel.width)
        geometry = self._geometry(entries)
        order = stored_order(words, ids, np.hstack([codes, geometry]) if self._consistent else codes)
        words, codes, geometry = words[order], np.ascontiguousarray(codes[order]), geometry[order]
        image_ids, numbers = np.unique(ids, return_inverse=True)
        numbers = numbers[order].astype(np.int64)
        images = int(totals["images"][0])
        weights = self.spec.word_weights(images, totals["word_images"])
        masses = self._masses(numbers, words, codes, weights, len(image_ids))
        mean_length = float(totals["features"][0]) / max(images, 1)
        kinds, firsts = np.unique(words, return_index=True)
        starts = np.append(firsts, len(words)).astype(np.int64)
        gaps, begins = encode_gaps(numbers, starts)
        columns = image_ids, masses, kinds.astype(np.int32), starts, begins, gaps, codes, geometry, weights
        return Slice(*columns, mean_length, self._dim)

    def _geometry(self, entries: pa.Table) -> Pixels:
        """Angle and scale of the entries (n, 2), or (n, 0)."""
        if not self._consistent:
            return np.empty((entries.num_rows, 0), np.uint8)
        return np.stack([entries.column(name).to_numpy() for name in _GEOMETRY], axis=1)

    def _masses(self, numbers: Int64s, words: Int32s, codes: Array, weights: Float64s, num_images: int) -> Float64s:
        """What the groups of postings of one image and word add to the mass of each image."""
        starts = group_starts(numbers, words)
        each = self.kernel.masses(starts, codes)
        firsts = starts[:-1]
        if self.kernel.weighted:
            each = each * weights[words[firsts]]
        return np.bincount(numbers[firsts], rounded(each), num_images).astype(np.float64, copy=False)
