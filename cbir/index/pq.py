"""Product quantisation without inverted lists: every code is compared."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from cbir.errors import ArtifactError, DataError
from cbir.index.code_partition import CodePartition, code_entries
from cbir.index.dense import FAISS_METRIC, Metric, array_view, exact_scores, float_rows, open_mapped
from cbir.index.index import Index, IndexSpec
from cbir.index.quantisers import codebooks_of, product_codes
from cbir.types import FeatureBatch, Floats, Int64s, Pixels, State

__all__ = ["Distance", "Pq", "PqIndex", "PqPartition"]

Distance = Literal["adc", "sdc"]

_TABLE_VALUES = 1 << 21


class Pq(IndexSpec):
    """Product quantisation (Jégou et al. 2011): a vector is cut into parts, and of each part only the number of its
    nearest centroid is kept.

    `adc` compares the query itself with the coded vectors, `sdc` the coded query: d(q(x), q(y)) is symmetric, but errs
    more. Time and memory grow with N; `ivfpq` looks at some of the codes only.

    With `polysemous` (Douze et al. 2016), the centroids of a part are put in an order by which the Hamming distances of
    their numbers imitate their distances, and only codes within a Hamming radius of the query's are compared.

    A partition is a faiss `IndexIDMap` over an `IndexPQ`, which by itself searches by ADC. Entries: `image_id` and
    `code`, packed as faiss packs it.
    """

    name: Literal["pq"] = "pq"
    paper: ClassVar[str] = "Jégou et al., Product quantization for nearest neighbor search, IEEE TPAMI 2011"
    suffix: ClassVar[str] = "faiss"

    bytes: PositiveInt = Field(default=16, description="parts of a vector, each coded with `bits` bits; must divide D")
    bits: int = Field(default=8, ge=4, le=8, description="a part has 2^bits centroids; fewer suit small collections")
    metric: Metric = Field(default="ip", description="ip: inner product; l2: Euclidean distance")
    distance: Distance = Field(default="adc", description="adc: queries stay exact; sdc: they are coded as well")
    iterations: PositiveInt = Field(default=25, description="of k-means")
    polysemous: PositiveInt | None = Field(
        default=None,
        description="compare only codes that differ from the query's code in fewer bits than this: faster, at some "
        "loss; 3 to 3.5 bits per byte are a beginning. Needs bits: 8, metric: l2, distance: adc; trains longer",
    )

    @model_validator(mode="after")
    def _polysemous_fits(self) -> Self:
        for field, needed in (("bits", 8), ("metric", "l2"), ("distance", "adc")):
            if self.polysemous is not None and getattr(self, field) != needed:
                raise ValueError(
                    f"polysemous needs {field}: {needed}, found {getattr(self, field)}; set it, or leave out polysemous"
                )
        return self

    def train(self, sample: FeatureBatch, seed: int) -> "PqIndex":
        """The codebook of every part of the sample's rows; DataError if these are too few or their D does not fit."""
        rows = float_rows(sample)
        self._check(*rows.shape)
        quantiser = faiss.ProductQuantizer(rows.shape[1], self.bytes, self.bits)
        quantiser.cp.seed, quantiser.cp.niter = seed % 2**31, self.iterations
        quantiser.cp.min_points_per_centroid = 1  # `_check` has refused what cannot work; faiss would only warn
        quantiser.train(rows)
        if self.polysemous is not None:
            order: Any = faiss.PolysemousTraining()  # type: ignore[attr-defined]
            order.seed = seed % 2**31
            order.optimize_pq_for_hamming(quantiser, len(rows), faiss.swig_ptr(rows))
        return PqIndex(self, codebooks_of(quantiser))

    def _check(self, num: int, dim: int) -> None:
        if not dim or dim % self.bytes:
            divisor = next(number for number in range(max(1, min(self.bytes, dim)), 0, -1) if dim % number == 0)
            raise DataError(
                f"bytes: {self.bytes} parts do not divide vectors of D = {dim}; "
                f"set a divisor of D, for example bytes: {divisor}, or change D by the encoder pca"
            )
        if num < 2**self.bits:
            raise DataError(
                f"bits: {self.bits} bits need a sample of at least {2**self.bits} vectors, found {num}; "
                "set fewer bits (4 need 16 vectors), take a larger sample, or use the index flat"
            )

    def restore(self, state: State) -> "PqIndex":
        """From codebooks."""
        return PqIndex(self, state["codebooks"])

    def load(self, *paths: Path) -> "PqPartition":
        """Open a partition memory-mapped; only the ids, 8 bytes per vector, are read into memory."""
        (path,) = paths
        index = open_mapped(path)
        if not isinstance(index, faiss.IndexIDMap) or not isinstance(faiss.downcast_index(index.index), faiss.IndexPQ):
            raise ArtifactError(f"{path}: holds a faiss {type(index).__name__}, expected an IndexIDMap over IndexPQ")
        return PqPartition(index, self.distance, self.polysemous)

    def entry_bytes(self, dim: int) -> int:  # noqa: ARG002 - a code does not grow with D
        """The code and the id."""
        return (self.bytes * self.bits + 7) // 8 + 8


class PqIndex(Index):
    """Codebooks (parts, 2^bits, D / parts)."""

    def __init__(self, spec: Pq, codebooks: Floats) -> None:
        self._codebooks = codebooks
        self._empty = PqPartition(_mapped(codebooks, spec.metric), spec.distance, spec.polysemous)

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """One row per vector: image_id int64, code fixed_size_binary."""
        codes = product_codes(float_rows(batch, self._empty.dim), self._codebooks)
        return code_entries(np.repeat(batch.image_ids, batch.counts), codes, PqPartition.meaning)

    def build(self, entries: pa.Table, totals: State | None = None) -> "PqPartition":  # noqa: ARG002 - needs none
        """The codes in the order of their images."""
        return self._empty.with_entries(entries)

    def state(self) -> State:
        """Codebooks (parts, 2^bits, D / parts)."""
        return {"codebooks": self._codebooks}


class PqPartition(CodePartition):
    """Codes of one partition."""

    meaning = "product quantiser, packed from the lowest bit as by faiss"

    def __init__(self, index: faiss.IndexIDMap, distance: Distance, polysemous: int | None = None) -> None:
        coded: Any = faiss.downcast_index(index.index)
        num, width = index.ntotal, coded.code_size
        ids, codes = np.empty(0, np.int64), np.empty((0, width), np.uint8)
        if num:
            ids = array_view(index.id_map.data(), num)
            codes = array_view(coded.codes.data(), num * width).reshape(num, width)
        super().__init__(index, ids, codes)
        self._pq, self._distance, self._polysemous = coded, distance, polysemous
        self._metric: Metric = "ip" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        self._codebooks = codebooks_of(coded.pq)
        self._largest = np.einsum("mwd,mwd->mw", self._codebooks, self._codebooks).max(1).sum()

    def of_codes(self, image_ids: Int64s, codes: Pixels) -> Self:
        """A partition of these codes with the same codebooks."""
        index = _mapped(self._codebooks, self._metric)
        index.add_sa_codes(codes, image_ids)
        return type(self)(index, self._distance, self._polysemous)

    def _shortlist(self, rows: Floats, num: int) -> tuple[Int64s, Floats, Floats]:
        """faiss's tables are summed in float32, large batches through BLAS: the best are compared again."""
        if self._distance == "sdc":
            rows = self._pq.pq.decode(product_codes(rows, self._codebooks))
        approximate, positions = self._approximate(rows, num)
        found, places = np.unique(positions, return_inverse=True)
        decoded = self._pq.pq.decode(self._codes[found])
        scores = exact_scores(rows, decoded, places.reshape(positions.shape), self._metric).astype(np.float32)
        ids, missing = np.where(positions < 0, -1, self._ids[positions]), positions < 0
        scores[missing] = -np.inf
        nothing_left_out = missing[:, -1] | (num >= len(self._ids))
        return ids, scores, np.where(nothing_left_out, -np.inf, approximate[:, -1] + self._rounding(rows))

    def _approximate(self, rows: Floats, num: int) -> tuple[Floats, Int64s]:
        """Scores and positions (K, num), which -1 pads, a block of tables (parts x 2^bits values) at a time."""
        step, params = max(1, _TABLE_VALUES // self._codebooks[:, :, 0].size), None
        if self._polysemous is not None:
            step = 1  # faiss codes queries by products of matrices, whose last bits depend on the batch
            params = _within(self._polysemous)
        found = [self._pq.search(rows[start : start + step], num, params=params) for start in range(0, len(rows), step)]
        distances, positions = (np.concatenate(column) for column in zip(*found, strict=True))
        return distances if self._metric == "ip" else -distances, positions

    def _rounding(self, rows: Floats) -> Floats:
        """How far a sum of float32 table entries may be off for any code: a unit in the last place per operation."""
        num_parts, _, width = self._codebooks.shape
        squares = np.einsum("kd,kd->k", rows, rows) + self._largest
        return np.asarray(squares * (2 * (num_parts + width) * np.finfo(np.float32).eps), np.float32)


def _mapped(codebooks: Floats, metric: Metric) -> Any:
    """An empty IndexIDMap over an IndexPQ with these codebooks."""
    num_parts, num_words, width = codebooks.shape
    index = faiss.IndexPQ(num_parts * width, num_parts, num_words.bit_length() - 1, FAISS_METRIC[metric])
    faiss.copy_array_to_vector(np.ascontiguousarray(codebooks).ravel(), index.pq.centroids)
    index.is_trained = True
    return faiss.IndexIDMap(index)


def _within(num_bits: int) -> Any:
    """A search that compares codes with fewer different bits."""
    params: Any = faiss.SearchParametersPQ()  # type: ignore[attr-defined]
    params.search_type = faiss.IndexPQ.ST_polysemous  # type: ignore[attr-defined]
    params.polysemous_ht = num_bits
    return params
