"""Matches by visual words: features of the same word whose binary codes differ in few bits (Jégou et al. 2008).

The query's rows are sorted by word once. Every row of a database image then looks its word up, so that an image costs
one step per feature and one per pair of the same word.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cbir.types import FeatureBatch, Floats, Int32s, Int64s

__all__ = ["QueryWords", "match_words"]

Codes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class QueryWords:
    """A query's rows by visual word: those of word w are rows[starts[w]] to rows[starts[w + 1]].

    `codes` (K, P) are the packed bits of all rows, `features` (K,) the first row of the same feature.
    """

    starts: Int32s
    rows: Int32s
    codes: Codes
    features: Int32s

    @classmethod
    def of(cls, query: FeatureBatch) -> "QueryWords":
        """From the signatures of one image."""
        starts, rows = _by_word(_words(query))
        everything = np.arange(len(query.descriptors), dtype=np.int32)
        return cls(starts, rows, _packed(query.descriptors), _first_rows(_keys(query.geometry), everything))


def match_words(
    query: QueryWords, database: FeatureBatch, images: Int64s, max_hamming: float, one_to_one: bool, max_matches: int
) -> tuple[Int64s, Int32s, Int32s]:
    """Rows of the query and of the database with one word, whose codes differ in at most the share `max_hamming` of
    their bits: offsets (N + 1,) of the images, and both rows (M,), nearest first; ties by row.

    With `one_to_one`, pairs are taken by rising distance while both of their features are free.
    """
    codes = _packed(database.descriptors)
    if codes.shape[1] != query.codes.shape[1]:
        raise ValueError(f"codes of {8 * query.codes.shape[1]} and of {8 * codes.shape[1]} bytes cannot be compared")
    limit = int(max_hamming * 8 * database.descriptors.shape[1])
    starts, ends = database.offsets[images], database.offsets[images + 1]
    stored = _words(database), codes, _keys(database.geometry), starts, ends
    return _match_images(query.starts, query.rows, query.codes, query.features, *stored, limit, one_to_one, max_matches)


def _words(batch: FeatureBatch) -> Int32s:
    if batch.words is None:
        raise ValueError("matches by words need features with visual words, as an inverted file has them")
    return batch.words


def _packed(codes: npt.NDArray[Any]) -> Codes:
    """Codes (K, B) uint8 as 64-bit words (K, P), filled up with zeros."""
    num_bytes = codes.shape[1]
    if num_bytes % 8:
        codes = np.pad(codes, ((0, 0), (0, -num_bytes % 8)))
    return np.ascontiguousarray(codes).view(np.uint64)


def _keys(geometry: Floats) -> Codes:
    """The bits of x, y, size and angle (K, 2): equal ones belong to one feature."""
    return np.ascontiguousarray(geometry[:, :4]).view(np.uint64)


@numba.njit(cache=True, nogil=True)
def _by_word(words: Int32s) -> tuple[Int32s, Int32s]:
    """Where each word begins, and the rows sorted by word; rows with the word -1 are left out."""
    num_words = words.max() + 1 if len(words) else 0
    starts = np.zeros(num_words + 2, np.int32)
    for word in words:
        if word >= 0:
            starts[word + 2] += 1
    for word in range(2, num_words + 2):
        starts[word] += starts[word - 1]
    rows = np.empty(starts[num_words + 1], np.int32)
    for row in range(len(words)):
        if words[row] >= 0:
            rows[starts[words[row] + 1]] = row
            starts[words[row] + 1] += 1
    return starts[: num_words + 1].copy(), rows


@numba.njit(cache=True, nogil=True)
def _first_rows(keys: Codes, rows: Int32s) -> Int32s:
    """For each of some rows the first of them with the same keys, by a hash table with open addressing."""
    size = 16
    while size < 2 * len(rows):
        size *= 2
    table = np.full(size, -1, np.int32)
    first = np.empty(len(rows), np.int32)
    for n in range(len(rows)):
        row = rows[n]
        mixed = (keys[row, 0] ^ (keys[row, 1] * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
        slot = np.int64(mixed >> np.uint64(32)) & (size - 1)
        while table[slot] >= 0:
            other = table[slot]
            if keys[other, 0] == keys[row, 0] and keys[other, 1] == keys[row, 1]:
                break
            slot = (slot + 1) & (size - 1)
        if table[slot] < 0:
            table[slot] = row
        first[n] = table[slot]
    return first


@numba.njit(cache=True, nogil=True, inline="always")
def _num_ones(bits: np.uint64) -> np.int64:
    """The number of set bits; compilers know this form as one instruction."""
    bits -= (bits >> np.uint64(1)) & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True, nogil=True)
def _grown(array: Int32s) -> Int32s:
    larger = np.empty(2 * len(array), np.int32)
    larger[: len(array)] = array
    return larger


@numba.njit(cache=True, nogil=True)
def _pairs_of_image(
    starts: Int32s, rows: Int32s, codes: Codes, words: Int32s, stored: Codes, begin: int, end: int, limit: int
) -> tuple[Int32s, Int32s, Int32s]:
    """All pairs of one word at a Hamming distance of at most `limit`: rows of either side, and distances."""
    left, right, distances = np.empty(512, np.int32), np.empty(512, np.int32), np.empty(512, np.int32)
    count, num_words, width = 0, len(starts) - 1, codes.shape[1]
    for row in range(begin, end):
        word = words[row]
        if word < 0 or word >= num_words:
            continue
        for position in range(starts[word], starts[word + 1]):
            candidate, distance = rows[position], np.int64(0)
            for part in range(width):
                distance += _num_ones(codes[candidate, part] ^ stored[row, part])
            if distance > limit:
                continue
            if count == len(left):
                left, right, distances = _grown(left), _grown(right), _grown(distances)
            left[count], right[count], distances[count] = candidate, row, distance
            count += 1
    return left[:count], right[:count], distances[:count]


@numba.njit(cache=True, nogil=True)
def _order(distances: Int32s, limit: int) -> Int32s:
    """Positions by rising distance, equal ones in their order."""
    begins = np.zeros(limit + 2, np.int32)
    for distance in distances:
        begins[distance + 1] += 1
    for distance in range(limit + 1):
        begins[distance + 1] += begins[distance]
    order = np.empty(len(distances), np.int32)
    for position in range(len(distances)):
        order[begins[distances[position]]] = position
        begins[distances[position]] += 1
    return order


@numba.njit(cache=True, nogil=True)
def _match_images(
    starts: Int32s,
    rows: Int32s,
    codes: Codes,
    features: Int32s,
    words: Int32s,
    stored: Codes,
    keys: Codes,
    begins: Int64s,
    ends: Int64s,
    limit: int,
    one_to_one: bool,
    max_matches: int,
) -> tuple[Int64s, Int32s, Int32s]:
    offsets = np.zeros(len(begins) + 1, np.int64)
    query, database = np.empty(1024, np.int32), np.empty(1024, np.int32)
    taken_by = np.full(len(features), -1, np.int64)
    count = 0
    for image in range(len(begins)):
        begin, end = begins[image], ends[image]
        left, right, distances = _pairs_of_image(starts, rows, codes, words, stored, begin, end, limit)
        first = _first_rows(keys, right)
        taken = np.zeros(end - begin, np.bool_)
        last = count + max_matches
        for pair in _order(distances, limit):
            mine, its = features[left[pair]], first[pair]
            if one_to_one and (taken_by[mine] == image or taken[its - begin]):
                continue
            if count == last:
                break
            if count == len(query):
                query, database = _grown(query), _grown(database)
            query[count], database[count] = mine, its
            taken_by[mine], taken[its - begin] = image, True
            count += 1
        offsets[image + 1] = count
    return offsets, query[:count].copy(), database[:count].copy()
