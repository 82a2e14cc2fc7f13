"""The inverted file whose lists each have a rotation of their own before the product quantiser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import faiss
import numpy as np
from pydantic import Field, PositiveInt

from cbir.encoding.kmeans import sampled_rows
from cbir.encoding.product import fixed_point
from cbir.errors import ArtifactError, DataError
from cbir.index.coarse import Coarse
from cbir.index.codes import Codes, Quantisers
from cbir.index.dense import FAISS_METRIC, float_rows
from cbir.index.ivf import InvertedFile, InvertedFileIndex, InvertedFilePartition, set_clustering
from cbir.index.ivfpq import ProductCode
from cbir.index.quantisers import codebooks_of, product_codes
from cbir.types import FeatureBatch, Float64s, Floats, Int64s, State

__all__ = ["LocalCode", "Lopq", "LopqIndex", "LopqPartition"]

_MARK = b"cbirLOPQ"
"""The end of a partition, after the rotations."""

_ALIGNMENT = 64
_BLOCK_VALUES = 1 << 22
_GRID_BITS = 24
"""Rotations are multiples of 2^-24, which float32 holds exactly, so that their products are exact in float64: see
`cbir.encoding.product`."""


class Lopq(InvertedFile):
    """Locally optimised product quantisation (Kalantidis and Avrithis 2014): what is left of a vector after its list's
    centroid is rotated by the axes of this list, which are dealt to the parts so that their variances have equal
    products (the parametric OPQ of Ge et al. 2013), and coded by product quantisation.

    The lists share their codebooks, which the paper calls LOR+PQ: a list has too few sample vectors for words of its
    own [with 1,280 SIFT vectors each, their own erred 7 % more and found 0.4 % more neighbours]. For the same reason
    the covariance of a list counts together with that of all lists, as if D more of its vectors were spread like these;
    a list without sample vectors has the rotation of all.

    A partition is a faiss `IndexIVFPQ` of rotated residuals, followed by the rotations (lists, D, D) as float32, of
    which a search reads those of the lists that it looks into. Plain faiss opens the codes, but cannot search them.
    Entries: `image_id`, `list` and `code`, packed as faiss packs it.
    """

    name: Literal["lopq"] = "lopq"
    paper: ClassVar[str] = "Kalantidis and Avrithis, Locally optimized product quantization for ANN search, CVPR 2014"

    bytes: PositiveInt = Field(default=16, description="parts of a vector, each coded with `bits` bits; must divide D")
    bits: int = Field(default=8, ge=4, le=8, description="a part has 2^bits centroids; fewer suit small collections")

    def check_dim(self, dim: int) -> None:
        """DataError if the parts do not divide D."""
        if not dim or dim % self.bytes:
            divisor = next(number for number in range(max(1, min(self.bytes, dim)), 0, -1) if dim % number == 0)
            raise DataError(
                f"bytes: {self.bytes} parts do not divide vectors of D = {dim}; "
                f"set a divisor of D, for example bytes: {divisor}, or change D by the encoder pca"
            )
        super().check_dim(dim)

    def check_size(self, found: int, lists: int) -> None:
        """DataError if so many sample vectors are too few for words or lists."""
        self.check_words(found, self.bits)
        super().check_size(found, lists)

    def finished_file(self, codebook: State, sample: FeatureBatch, seed: int) -> "LopqIndex":
        """The rotations of the lists, and the codebooks of what they make of the sample's residuals."""
        rows = float_rows(sample)
        self._fitting_lists(rows)
        coarse = self._coarse_of(codebook)
        lists = coarse.nearest(rows)
        residuals = rows - coarse.centroids_of(lists)
        rotations = local_rotations(residuals, lists, coarse.num_lists, self.bytes)
        some = sampled_rows(np.arange(len(rows)), 2**self.bits, seed)
        ivf = self.untrained(coarse.faiss_index(), coarse.num_lists, seed)
        ivf.pq.train(rotated(residuals[some], lists[some], rotations))
        return LopqIndex(self, Quantisers(None, coarse, LocalCode(rotations, codebooks_of(ivf.pq))))

    def untrained(self, quantiser: faiss.Index, lists: int, seed: int) -> Any:
        """An IndexIVFPQ."""
        index: Any = faiss.IndexIVFPQ(quantiser, quantiser.d, lists, self.bytes, self.bits, FAISS_METRIC[self.metric])
        set_clustering(index.pq.cp, self.iterations, seed)
        return index

    def restored_file(self, state: State) -> "LopqIndex":
        """The inverted file that had these quantisers, without content."""
        return LopqIndex(self, Quantisers.restore(state, self.metric, self.restored_code(state)))

    def restored_code(self, state: State) -> "LocalCode":
        """The rotations and codebooks."""
        return LocalCode(state["rotations"], state["codebooks"])

    def code_of(self, ivf: Any) -> ProductCode:
        """The codebooks, which is all that faiss knows."""
        return ProductCode(codebooks_of(ivf.pq))

    def opened(self, index: faiss.Index, path: Path) -> "LopqPartition":
        """With the rotations at the end of the file, mapped."""
        ivf: Any = super().opened(index, path).ivf
        code = LocalCode(_mapped_rotations(path, ivf.nlist, ivf.d), self.code_of(ivf).codebooks)
        return LopqPartition(index, lambda _: code, self.probes)

    @property
    def holds(self) -> type[faiss.Index]:
        """IndexIVFPQ."""
        return faiss.IndexIVFPQ

    def code_bytes(self, dim: int) -> int:  # noqa: ARG002 - a code does not grow with D
        """`bits` for each part."""
        return (self.bytes * self.bits + 7) // 8


class LocalCode(ProductCode):
    """Residuals, rotated by the matrix (D, D) of their list, in words of codebooks (parts, 2^bits, D / parts)."""

    description = "product quantiser of residuals in the axes of their list, packed from the lowest bit as by faiss"

    def __init__(self, rotations: Floats, codebooks: Floats) -> None:
        super().__init__(codebooks)
        self.rotations = rotations

    def encode(self, rows: Floats, lists: Int64s, coarse: Coarse) -> Codes:
        """The nearest words of the rotated residuals."""
        return product_codes(rotated(rows - coarse.centroids_of(lists), lists, self.rotations), self.codebooks)

    def empty_index(self, coarse: Coarse) -> Any:
        """An IndexIVFPQ that is asked with what `LopqPartition` makes of queries."""
        index = super().empty_index(coarse)
        index.by_residual = False
        return index

    def state(self) -> State:
        """Codebooks, and rotations (lists, D, D)."""
        return {**super().state(), "rotations": self.rotations}


class LopqIndex(InvertedFileIndex):
    """A trained inverted file without content."""

    def __init__(self, spec: Lopq, quantisers: Quantisers) -> None:
        super().__init__(spec, quantisers)
        self.empty = LopqPartition(self.empty.faiss, lambda _: quantisers.code, spec.probes)


class LopqPartition(InvertedFilePartition):
    """Lists of codes of one partition.

    To faiss a query is as many queries as it looks into lists, each in the axes of its list: with metric l2 the rotated
    residual, whose distances to words add up to that of the vector; with ip the rotated query, to whose inner products
    with words that with the centroid is added.
    """

    plain = False

    def save(self, path: Path) -> None:
        """Write the faiss file and the rotations; equal entries give equal bytes."""
        super().save(path)
        rotations = np.ascontiguousarray(self._code.rotations, "<f4")
        try:
            with path.open("ab") as file:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                file.write(rotations.data)
                file.write(_MARK)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot write the index: {error.strerror}; free some space there") from None

    @property
    def _code(self) -> LocalCode:
        code = self.quantisers.code
        assert isinstance(code, LocalCode)
        return code

    def _scan(self, rows: Floats, num: int, *, places: bool = False) -> tuple[Int64s, Floats]:
        step = max(1, _BLOCK_VALUES // (self.probes * max(num, self.dim)))
        parts = [self._scan_block(rows[start : start + step], num, places) for start in range(0, len(rows), step)]
        ids, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, scores

    def _scan_block(self, rows: Floats, num: int, places: bool) -> tuple[Int64s, Floats]:
        coarse, is_ip = self.quantisers.coarse, self.quantisers.coarse.metric == "ip"
        lists, to_lists = (np.ravel(array) for array in coarse.nearest_lists(rows, self.probes))
        known = np.maximum(lists, 0)  # -1 pads, and faiss passes over it
        asked = np.repeat(rows, self.probes, axis=0)
        if not is_ip:
            asked -= coarse.centroids_of(known)
        asked = rotated(asked, known, self._code.rotations)
        shape = len(rows), self.probes * num
        distances, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
        x, probed, offsets, out, labels = map(faiss.swig_ptr, (asked, lists, to_lists, distances, ids))
        one_list = faiss.SearchParametersIVF(nprobe=1)  # type: ignore[call-arg]
        self.ivf.search_preassigned_c(len(lists), x, num, probed, offsets, out, labels, places, one_list)
        scores = distances + np.repeat(to_lists.reshape(len(rows), -1), num, 1) if is_ip else 0 - distances
        order = np.lexsort((ids, np.where(ids < 0, np.inf, -scores)))[:, :num]
        return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def rotated(rows: Floats, lists: Int64s, rotations: Floats) -> Floats:
    """Rows (K, D) of these lists (K,), each times its list's matrix of (lists, D, D); to the same bits in whatever
    batch."""
    products = np.empty(rows.shape)
    fixed, exponents = fixed_point(rows)
    for number, some in _groups(lists):
        products[some] = fixed[some] @ rotations[number].T.astype(np.float64)
    return np.asarray(products * np.ldexp(1.0, exponents)[:, None], np.float32)


def local_rotations(residuals: Floats, lists: Int64s, num_lists: int, num_parts: int) -> Floats:
    """Rotations (lists, D, D) of residuals (n, D) in these lists (n,)."""
    dim = residuals.shape[1]
    common = np.zeros((dim, dim))
    for _, some in _groups(lists):
        common += _scatter(residuals[some]) / len(residuals)
    rotations = np.tile(parametric_rotation(common, num_parts), (num_lists, 1, 1))
    for number, some in _groups(lists):
        rotations[number] = parametric_rotation(_scatter(residuals[some]) + dim * common, num_parts)
    return rotations


def parametric_rotation(covariance: Float64s, num_parts: int) -> Floats:
    """The principal axes (D, D), dealt to parts of equal size: the next largest variance goes to the part whose
    variances have the smallest product so far. Of an axis and its opposite, that with a positive largest value."""
    variances, axes = np.linalg.eigh(covariance)
    logarithms = np.log(np.maximum(variances[::-1], max(variances[-1] * 1e-12, np.finfo(np.float64).tiny)))
    axes = axes.T[::-1][_dealt(logarithms - logarithms[-1], num_parts)]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return np.asarray(np.ldexp(np.rint(np.ldexp(axes * np.sign(largest), _GRID_BITS)), -_GRID_BITS), np.float32)


def _dealt(sizes: Float64s, num_parts: int) -> list[int]:
    """The places of descending sizes (D,), part after part."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = np.zeros(num_parts)
    for place, size in enumerate(sizes.tolist()):
        part = int(np.argmin(sums))
        parts[part].append(place)
        sums[part] = np.inf if len(parts[part]) == len(sizes) // num_parts else sums[part] + size
    return [place for part in parts for place in part]


def _scatter(rows: Floats) -> Float64s:
    wide = rows.astype(np.float64)
    return wide.T @ wide


def _groups(lists: Int64s) -> Iterator[tuple[int, Int64s]]:
    """Every list that occurs among (K,), and where."""
    order = np.argsort(lists, kind="stable")
    numbers, starts = np.unique(lists[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, starts)[1:], strict=True)


def _mapped_rotations(path: Path, num_lists: int, dim: int) -> Floats:
    """The rotations (lists, D, D) at the end of a partition."""
    shape = num_lists, dim, dim
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_MARK)))
        whole = file.read() == _MARK
    start = path.stat().st_size - len(_MARK) - 4 * num_lists * dim * dim
    if not whole or start < 0:
        raise ArtifactError(f"{path}: not a whole partition of lopq: its rotations are missing")
    return np.asarray(np.memmap(path, "<f4", "r", start, shape))
