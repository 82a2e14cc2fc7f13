"""The nearest centroid of a vector: exactly, whatever batch or shard the vector is in, and on every processor.

A float32 matrix product may give a row other last bits in another batch, and then a near-tie falls to another centroid.
Here products in low precision find the candidates, and double precision decides among all that rounding could have
swapped. For many centroids the products are those of 8-bit integers, where the processor has instructions for them,
which cost a fifth of those in float32, or those of a GPU, where a process was told to use one.
"""

import functools
from typing import NamedTuple

import faiss
import numba
import numpy as np
import numpy.typing as npt

from cbir.index.dense import FAISS_METRIC, Metric
from cbir.types import Float64s, Floats, Int64s

__all__ = ["compute_on", "nearest_centroid"]

_BLOCK_VALUES = 1 << 20

_MANY_CENTROIDS, _MANY_PRODUCTS = 2048, 1 << 24
"""With fewer it is not worth to load torch for its products of integers [1 s]."""

_INSTRUCTIONS = "avx512_vnni", "avx_vnni", "amx_int8"

_MAGNITUDES = 1e-9, 1e9
"""Of vectors whose products are far from the ends of float32."""

_GROUP, _BLOCK_PRODUCTS = 64, 1 << 19

_DEVICE_PRODUCTS = 1 << 26
"""Products that a device holds at a time, of 4 bytes each."""

_device = "cpu"

Int8s = npt.NDArray[np.int8]
Int32s = npt.NDArray[np.int32]


def compute_on(device: str) -> None:
    """From now on, let a torch device find the candidates among many centroids in this process; the results are the
    same on all of them."""
    global _device
    _device = device


def nearest_centroid(rows: Floats, centroids: Floats, metric: Metric) -> Int64s:
    """The centroid (W, D) nearest to each row (K, D), the first of several equal ones; (K,). -1 for NaN."""
    if len(centroids) == 1 or not len(rows):
        return np.zeros(len(rows), np.int64)
    (least, most), num = _MAGNITUDES, len(centroids)
    is_large = num >= _MANY_CENTROIDS or num * len(rows) >= _MANY_PRODUCTS
    if is_large and least < _largest(centroids) < most and _largest(rows) < most:
        centroids = _writable(centroids)
        if _device != "cpu":
            return _by_device(rows, centroids, metric, _device)
        if _multiplies_int8():
            return _by_int8(rows, centroids, metric)
    return _by_float32(rows, centroids, metric)


def _writable(rows: Floats) -> Floats:
    """A copy of what is read-only, for which numba would compile every loop once more, and of which torch warns."""
    return np.require(rows, np.float32, ["C", "W"])


def _largest(values: Floats) -> float:
    """The largest magnitude, or NaN."""
    return float(max(values.max(), -values.min()))


@functools.cache
def _multiplies_int8() -> bool:
    """Whether this processor has instructions for products of 8-bit integers."""
    import torch

    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # which older ones of torch lack
    return any(found.get(name, False) for name in _INSTRUCTIONS)


def _by_float32(rows: Floats, centroids: Floats, metric: Metric) -> Int64s:
    distances, near = faiss.knn(rows, centroids, 2, FAISS_METRIC[metric])
    largest = np.einsum("wd,wd->w", centroids, centroids).max()
    margins = (np.einsum("kd,kd->k", rows, rows) + largest) * (64 * np.finfo(np.float32).eps)
    nearest, step = near[:, 0].copy(), max(1, _BLOCK_VALUES // len(centroids))
    unsure = np.flatnonzero(np.abs(distances[:, 1] - distances[:, 0]) <= margins)
    for some in np.array_split(unsure, -(-len(unsure) // step) or 1):
        scores = rows[some] @ centroids.T
        if metric == "l2":
            scores -= np.einsum("wd,wd->w", centroids, centroids) / 2
        nearest[some] = _decided(scores, scores.max(1) - margins[some], rows[some], centroids, metric == "l2")
    return nearest


@numba.njit(cache=True, nogil=True)
def _exact_score(row: Floats, centroid: Floats, is_l2: bool) -> float:
    """In four sums, which a processor does at once, in one order everywhere."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    whole = len(row) // 4 * 4
    for at in range(0, whole, 4):
        a += _term(row[at], centroid[at], is_l2)
        b += _term(row[at + 1], centroid[at + 1], is_l2)
        c += _term(row[at + 2], centroid[at + 2], is_l2)
        d += _term(row[at + 3], centroid[at + 3], is_l2)
    for at in range(whole, len(row)):
        a += _term(row[at], centroid[at], is_l2)
    return (a + b) + (c + d)


@numba.njit(cache=True, nogil=True, inline="always")
def _term(value: float, other: float, is_l2: bool) -> float:
    left, right = np.float64(value), np.float64(other)
    return -(left - right) * (left - right) if is_l2 else left * right


@numba.njit(cache=True, nogil=True)
def _decided(scores: Floats, limits: Floats, rows: Floats, centroids: Floats, is_l2: bool) -> Int64s:
    """Of the centroids whose scores (K, W) come up to a row's limit (K,), the nearest."""
    nearest = np.full(len(rows), -1, np.int64)
    for i in range(len(rows)):
        best = -np.inf
        for word in range(len(centroids)):
            if scores[i, word] >= limits[i]:
                score = _exact_score(rows[i], centroids[word], is_l2)
                if score > best:
                    best, nearest[i] = score, word
    return nearest


def _by_device(rows: Floats, centroids: Floats, metric: Metric, device: str) -> Int64s:
    """By float32 without short cuts, for vectors less the mean of the centroids; what comes near the best is decided
    here."""
    import torch

    num, is_l2 = len(centroids), metric == "l2"
    mean = np.asarray(np.add.reduce(centroids, axis=0, dtype=np.float64) / num, np.float32)
    words = torch.from_numpy(centroids - mean).to(device)
    squares = words.square().sum(1)
    biases = squares / 2 if is_l2 else torch.zeros_like(squares)
    nearest, step = np.empty(len(rows), np.int64), max(1, _DEVICE_PRODUCTS // num)
    for start in range(0, len(rows), step):
        some = _writable(rows[start : start + step])
        left = torch.from_numpy(some - mean if is_l2 else some).to(device)
        scores = torch.addmm(-biases, left, words.T)
        margins = (left.square().sum(1) + squares.max()) * float(64 * np.finfo(np.float32).eps) + 1e-30
        owner, word = torch.nonzero(scores >= (scores.amax(1) - margins)[:, None], as_tuple=True)
        nearest[start : start + step] = -1
        _decide_pairs(owner.cpu().numpy(), word.cpu().numpy(), some, centroids, is_l2, nearest[start:])
    return nearest


@numba.njit(cache=True, nogil=True)
def _decide_pairs(owners: Int64s, words: Int64s, rows: Floats, centroids: Floats, is_l2: bool, nearest: Int64s) -> None:
    """Of pairs of row and centroid, which are sorted, the nearest of each row."""
    best = np.full(len(rows), -np.inf)
    for at in range(len(owners)):
        row, word = owners[at], words[at]
        score = _exact_score(rows[row], centroids[word], is_l2)
        if score > best[row]:
            best[row], nearest[row] = score, word


class _Rounded(NamedTuple):
    """Vectors (n, D) less a centre as `scales * numbers`; the norms of these, and of what rounding took."""

    numbers: Int8s
    scales: Floats
    norms: Float64s
    errors: Float64s

    @classmethod
    def of(cls, vectors: Floats, centre: Floats) -> "_Rounded":
        numbers, scales = np.empty(vectors.shape, np.int8), np.empty(len(vectors), np.float32)
        norms, errors = np.empty(len(vectors)), np.empty(len(vectors))
        _round(np.ascontiguousarray(vectors, np.float32), centre, numbers, scales, norms, errors)
        return cls(numbers, scales, norms, errors)


@numba.njit(cache=True, nogil=True)
def _round(vectors: Floats, centre: Floats, numbers: Int8s, scales: Floats, norms: Float64s, errors: Float64s) -> None:
    for i in range(len(vectors)):
        largest = np.float32(0)
        for d in range(len(centre)):
            largest = max(largest, abs(vectors[i, d] - centre[d]))
        scales[i] = max(largest / np.float32(127), np.finfo(np.float32).tiny)
        norm, error = 0.0, 0.0
        for d in range(len(centre)):
            value = vectors[i, d] - centre[d]
            number = np.rint(value / scales[i])
            numbers[i, d] = np.int8(number)
            rounded = np.float64(scales[i]) * number
            norm += rounded * rounded
            error += (value - rounded) * (value - rounded)
        norms[i], errors[i] = np.sqrt(norm), np.sqrt(error)


def _by_int8(rows: Floats, centroids: Floats, metric: Metric) -> Int64s:
    """By x.c - |c|^2 / 2 for vectors less the mean of the centroids, or by x.c, which the mean moves for all alike."""
    import torch

    num, is_l2 = len(centroids), metric == "l2"
    mean = np.asarray(np.add.reduce(centroids, axis=0, dtype=np.float64) / num, np.float32)
    words, centre = _Rounded.of(centroids, mean), mean if is_l2 else np.zeros_like(mean)
    largest, largest_error = (words.norms + words.errors).max(), words.errors.max()
    numbers, scales = np.zeros((_whole_groups(num), len(mean)), np.int8), np.zeros(_whole_groups(num), np.float32)
    biases = np.full(len(scales), np.inf, np.float32)
    numbers[:num], scales[:num] = words.numbers, words.scales
    biases[:num] = np.square(centroids - mean, dtype=np.float64).sum(1) / 2 if is_l2 else 0
    slack = 1e-6 * float(biases[:num].max()) + 1e-30
    right, step = torch.from_numpy(numbers).T, max(32, _BLOCK_PRODUCTS // len(scales))
    nearest, products = np.empty(len(rows), np.int64), torch.empty((step, len(scales)), dtype=torch.int32)
    for start in range(0, len(rows), step):
        some = _writable(rows[start : start + step])
        left = _Rounded.of(some, centre)
        torch._int_mm(torch.from_numpy(left.numbers), right, out=products[: len(some)])
        # Rounding moves a score by at most |x - x'| |c| + |x'| |c - c'|, up for the one and down for the other word;
        # the slack is for float32.
        reach = left.errors * largest + left.norms * (largest_error + 1e-6 * largest) + slack
        found = products[: len(some)].numpy().reshape(len(some), -1, _GROUP)
        margins = (2 * reach).astype(np.float32)
        _decide_products(found, left.scales, scales, biases, margins, some, centroids, is_l2, nearest[start:])
    return nearest


def _whole_groups(num: int) -> int:
    return -(-num // _GROUP) * _GROUP


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _decide_products(
    products: Int32s,
    scales: Floats,
    word_scales: Floats,
    biases: Floats,
    margins: Floats,
    rows: Floats,
    centroids: Floats,
    is_l2: bool,
    nearest: Int64s,
) -> None:
    """From products (K, W / 64, 64); the loops over 64 are what processors do at once."""
    num_groups = products.shape[1]
    scores, tops = np.empty((num_groups, _GROUP), np.float32), np.empty(_GROUP, np.float32)
    word_scales, biases = word_scales.reshape(num_groups, _GROUP), biases.reshape(num_groups, _GROUP)
    for i in range(len(rows)):
        scale = scales[i]
        tops[:] = -np.inf
        for group in range(num_groups):
            for one in range(_GROUP):
                score = np.float32(products[i, group, one]) * (scale * word_scales[group, one]) - biases[group, one]
                scores[group, one] = score
                tops[one] = max(tops[one], score)
        limit, best = tops.max() - margins[i], -np.inf
        for one in range(_GROUP):
            if tops[one] >= limit:
                for group in range(num_groups):
                    if scores[group, one] >= limit:
                        word = group * _GROUP + one
                        score = _exact_score(rows[i], centroids[word], is_l2)
                        if score > best or (score == best and word < nearest[i]):
                            best, nearest[i] = score, word
