"""The compiled loops of an inverted file: coding of image numbers, and the scoring of queries against postings.

Image numbers of a word rise, and are coded as gaps to the one before, seven bits a byte, least significant first, the
high bit set in all bytes of a gap but its last (LEB128). The sum of an image's score runs over the query's rows in
their order, whatever else is in the partition, so that partitions never show in a score. `numbers` maps the image
numbers of one file to those of the whole partition.
"""

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from cbir.types import Float64s, Floats, Int32s, Int64s, Pixels

__all__ = [
    "MATCH_UNITS",
    "binary_masses",
    "count_matches",
    "encode_gaps",
    "float_masses",
    "next_gap",
    "num_ones",
    "score_binary",
    "score_binary_bursts",
    "score_bm25",
    "score_counts",
    "score_float",
]


MATCH_UNITS = 2.0**20
"""By which `count_matches` multiplies."""


@intrinsic
def _intrinsic_ones(_context: Any, value: Any) -> Any:
    """The number of set bits of a 64-bit word."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return (types.uint64(types.uint64), generate) if value == types.uint64 else None


num_ones: Any = _intrinsic_ones
"""As compiled functions see it: they pass the value alone."""


@numba.njit(cache=True, nogil=True)
def encode_gaps(images: Int64s, starts: Int64s) -> tuple[Pixels, Int64s]:
    """Image numbers of all words, those of word w at starts[w] to starts[w + 1]: bytes, and where each word begins."""
    coded = np.empty(5 * len(images), np.uint8)
    begins = np.zeros(len(starts), np.int64)
    at = 0
    for word in range(len(starts) - 1):
        begins[word] = at
        before = 0
        for position in range(starts[word], starts[word + 1]):
            gap = images[position] - before
            before = images[position]
            while gap >= 128:
                coded[at] = (gap & 127) | 128
                gap >>= 7
                at += 1
            coded[at] = gap
            at += 1
    begins[len(starts) - 1] = at
    return coded[:at].copy(), begins


@numba.njit(cache=True, nogil=True, inline="always")
def next_gap(coded: Pixels, at: Any) -> Any:
    """The gap that begins at a byte, and the byte after it."""
    byte = coded[at]
    at += 1
    gap = np.int64(byte & 127)
    shift = 7
    while byte >= 128:
        byte = coded[at]
        at += 1
        gap |= np.int64(byte & 127) << shift
        shift += 7
    return gap, at


@numba.njit(cache=True, nogil=True)
def score_binary(
    scores: Float64s,
    numbers: Int32s,
    slots: Int64s,
    weights: Float64s,
    codes: npt.NDArray[np.uint64],
    starts: Int64s,
    begins: Int64s,
    coded: Pixels,
    stored: npt.NDArray[np.uint64],
    table: Float64s,
) -> None:
    """Add weights[q] * table[h] for every posting of the word of query row q at Hamming distance h."""
    width = codes.shape[1]
    for row in range(len(slots)):
        slot = slots[row]
        if slot < 0:
            continue
        at, image, weight = begins[slot], np.int64(0), weights[row]
        first, second = codes[row, 0], codes[row, width - 1]
        for position in range(starts[slot], starts[slot + 1]):
            gap, at = next_gap(coded, at)
            image += gap
            distance = num_ones(first ^ stored[position, 0])
            if width == 2:  # the usual 128 bits, without a loop
                distance += num_ones(second ^ stored[position, 1])
            else:
                for part in range(1, width):
                    distance += num_ones(codes[row, part] ^ stored[position, part])
            scores[numbers[image]] += weight * table[distance]


@numba.njit(cache=True, nogil=True)
def score_binary_bursts(
    scores: Float64s,
    numbers: Int32s,
    slots: Int64s,
    weights: Float64s,
    codes: npt.NDArray[np.uint64],
    starts: Int64s,
    begins: Int64s,
    coded: Pixels,
    stored: npt.NDArray[np.uint64],
    table: Float64s,
) -> None:
    """The same, but the matches of a query row with several postings of one image count s * sqrt(s / sum of s) each
    (Jégou et al. 2009, intra-image burstiness)."""
    for row in range(len(slots)):
        slot = slots[row]
        if slot < 0:
            continue
        at, image, weight = begins[slot], np.int64(0), weights[row]
        last, mass, total = np.int64(-1), 0.0, 0.0
        for position in range(starts[slot], starts[slot + 1]):
            gap, at = next_gap(coded, at)
            image += gap
            distance = np.uint64(0)
            for part in range(codes.shape[1]):
                distance += num_ones(codes[row, part] ^ stored[position, part])
            similarity = table[distance]
            if image != last:
                if total > 0.0:
                    scores[numbers[last]] += weight * mass / math.sqrt(total)
                last, mass, total = image, 0.0, 0.0
            mass += similarity * math.sqrt(max(similarity, 0.0))
            total += similarity
        if total > 0.0:
            scores[numbers[last]] += weight * mass / math.sqrt(total)


@numba.njit(cache=True, nogil=True)
def count_matches(
    kept: npt.NDArray[np.bool_],
    slots: Int64s,
    codes: npt.NDArray[np.uint64],
    starts: Int64s,
    begins: Int64s,
    coded: Pixels,
    stored: npt.NDArray[np.uint64],
    table: Float64s,
    burst: bool,
) -> Int64s:
    """What the matches of each query row (q,) with the kept images of a file count together, before weights, in units
    of 2^-20, so that any partition of the images adds up to the same; with `burst` as `score_binary_bursts` does."""
    counts = np.zeros(len(slots), np.int64)
    for row in range(len(slots)):
        slot = slots[row]
        if slot < 0:
            continue
        at, image = begins[slot], np.int64(0)
        last, mass, total = np.int64(-1), 0.0, 0.0
        for position in range(starts[slot], starts[slot + 1]):
            gap, at = next_gap(coded, at)
            image += gap
            if not kept[image]:
                continue
            distance = np.uint64(0)
            for part in range(codes.shape[1]):
                distance += num_ones(codes[row, part] ^ stored[position, part])
            similarity = table[distance]
            if image != last:
                counts[row] += _in_units(mass, total, burst)
                last, mass, total = image, 0.0, 0.0
            mass += similarity * math.sqrt(max(similarity, 0.0))
            total += similarity
        counts[row] += _in_units(mass, total, burst)
    return counts


@numba.njit(cache=True, nogil=True)
def _in_units(mass: float, total: float, burst: bool) -> Any:
    if total <= 0.0:
        return np.int64(0)
    return np.int64(np.round(MATCH_UNITS * (mass / math.sqrt(total) if burst else total)))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _dot(left: Floats, right: Floats) -> Any:
    total = np.float32(0.0)
    for d in range(len(left)):
        total += left[d] * right[d]
    return total


@numba.njit(cache=True, nogil=True)
def score_float(
    scores: Float64s,
    numbers: Int32s,
    slots: Int64s,
    weights: Float64s,
    vectors: Floats,
    starts: Int64s,
    begins: Int64s,
    coded: Pixels,
    stored: Floats,
    alpha: float,
    tau: float,
) -> None:
    """Add weights[q] * sign(u) |u|^alpha for every posting whose u = <query, stored> is at least tau."""
    is_cube = alpha == 3.0
    for row in range(len(slots)):
        slot = slots[row]
        if slot < 0:
            continue
        at, image, weight = begins[slot], np.int64(0), weights[row]
        for position in range(starts[slot], starts[slot + 1]):
            gap, at = next_gap(coded, at)
            image += gap
            u = np.float64(_dot(vectors[row], stored[position]))
            if u < tau:
                continue
            similarity = u * u * u if is_cube else math.copysign(abs(u) ** alpha, u)
            scores[numbers[image]] += weight * similarity


@numba.njit(cache=True, nogil=True)
def score_counts(
    scores: Float64s,
    numbers: Int32s,
    slots: Int64s,
    weights: Float64s,
    starts: Int64s,
    begins: Int64s,
    coded: Pixels,
    stored: npt.NDArray[np.uint16],
    root: bool,
) -> None:
    """Add weights[q] * count, or with `root` weights[q] * sqrt(count), for every posting."""
    for row in range(len(slots)):
        slot = slots[row]
        if slot < 0:
            continue
        at, image = begins[slot], np.int64(0)
        for position in range(starts[slot], starts[slot + 1]):
            gap, at = next_gap(coded, at)
            image += gap
            count = np.float64(stored[position, 0])
            scores[numbers[image]] += weights[row] * (math.sqrt(count) if root else count)


@numba.njit(cache=True, nogil=True)
def score_bm25(
    scores: Float64s,
    numbers: Int32s,
    slots: Int64s,
    weights: Float64s,
    starts: Int64s,
    begins: Int64s,
    coded: Pixels,
    stored: npt.NDArray[np.uint16],
    dampings: Float64s,
    k1: float,
) -> None:
    """Add weights[q] * t (k1 + 1) / (t + damping of the image) for every posting with the count t."""
    for row in range(len(slots)):
        slot = slots[row]
        if slot < 0:
            continue
        at, image = begins[slot], np.int64(0)
        for position in range(starts[slot], starts[slot + 1]):
            gap, at = next_gap(coded, at)
            image += gap
            count = np.float64(stored[position, 0])
            number = numbers[image]
            scores[number] += weights[row] * count * (k1 + 1.0) / (count + dampings[number])


@numba.njit(cache=True, nogil=True)
def binary_masses(starts: Int64s, codes: npt.NDArray[np.uint64], table: Float64s, burst: bool) -> Float64s:
    """The sum of table[h] over all pairs of codes of each group; with `burst` as `score_binary` counts them."""
    masses = np.zeros(len(starts) - 1)
    for group in range(len(masses)):
        for left in range(starts[group], starts[group + 1]):
            plain, damped = 0.0, 0.0
            for right in range(starts[group], starts[group + 1]):
                distance = np.uint64(0)
                for part in range(codes.shape[1]):
                    distance += num_ones(codes[left, part] ^ codes[right, part])
                plain += table[distance]
                if burst and table[distance] > 0.0:
                    damped += table[distance] * math.sqrt(table[distance])
            masses[group] += damped / math.sqrt(plain) if burst and plain > 0.0 else plain
    return masses


@numba.njit(cache=True, nogil=True)
def float_masses(starts: Int64s, vectors: Floats, alpha: float, tau: float, unit: bool) -> Float64s:
    """The sum of sigma over all pairs of vectors of each group; of unit vectors, that of one with itself is 1."""
    masses = np.zeros(len(starts) - 1)
    for group in range(len(masses)):
        for left in range(starts[group], starts[group + 1]):
            for right in range(starts[group], starts[group + 1]):
                u = 0.0
                for d in range(vectors.shape[1]):
                    u += np.float64(vectors[left, d]) * np.float64(vectors[right, d])
                if unit and left == right:
                    u = 1.0
                if u >= tau:
                    masses[group] += math.copysign(abs(u) ** alpha, u)
    return masses
