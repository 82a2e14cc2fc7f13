"""Weak geometric consistency (Jégou et al. 2008): the matches of an image vote for one turn and one change of scale.

Beside its code, a posting keeps two bytes of its feature's geometry:

    angle   in 1/256 of a full turn
    scale   in 1/16 octaves: 16 (log2 size + 2), for sizes of 1/4 to 15,690 pixels; others count as the nearest

Positions are not kept, because no score looks at them. What a match is worth is added to two histograms of its image:
of 64 differences of angle (database - query, cyclic), and of 32 differences of scale, a quarter of an octave each; a
match beyond about four octaves adds to neither. No difference lies in the middle of a bin. The score of an image is the
smaller of the two highest sums over three neighbouring bins, so at most the plain sum.

Images are taken in windows, whose histograms (768 bytes an image) stay in a processor's cache, so that the memory of a
search does not grow with the partition. A table of the touched images only would: random matches touch many of them.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from cbir.errors import DataError
from cbir.index.inverted.scoring import next_gap, num_ones
from cbir.types import Float64s, Floats, Int32s, Int64s, Pixels

__all__ = ["NUM_COLUMNS", "Asked", "Stored", "Votes", "coded_geometry", "peaks", "vote", "windows"]


NUM_COLUMNS = 2
"""Bytes that a posting keeps."""

WINDOW_IMAGES = 4096

_ANGLE_BINS, _SCALE_BINS = 64, 32
_SMALLEST = -2
"""log2 of the size with code 0."""


class Votes(NamedTuple):
    """Histograms of the images from number `first` on, (n, 64) of angles and (n, 32) of scales."""

    first: int
    angles: Float64s
    scales: Float64s


class Asked(NamedTuple):
    """The postings of a query: where their words stand in a slice (-1: not there), the words' weights, codes (q, B / 8)
    and geometry (q, 2)."""

    slots: Int64s
    weights: Float64s
    codes: npt.NDArray[np.uint64]
    geometry: Pixels


class Stored(NamedTuple):
    """The postings of a slice, as in `postings.Slice`; `numbers` are those of its images in the partition."""

    numbers: Int32s
    starts: Int64s
    begins: Int64s
    gaps: Pixels
    codes: npt.NDArray[np.uint64]
    geometry: Pixels


def coded_geometry(geometry: Floats) -> Pixels:
    """The angle and scale of features (K, G) as bytes (K, 2); DataError for G < 4."""
    if not len(geometry):
        return np.empty((0, NUM_COLUMNS), np.uint8)
    if geometry.shape[1] < 4:
        raise DataError(
            f"geometry: true needs size and angle of every feature, but these have {geometry.shape[1]} columns of "
            "geometry; use an extractor that finds them, such as sift, or geometry: false"
        )
    sizes, angles = geometry[:, 2].astype(np.float64), geometry[:, 3].astype(np.float64)
    turns = np.floor(angles * (256 / 360) + 0.5).astype(np.int64) % 256
    octaves = np.log2(np.maximum(sizes, 2.0**_SMALLEST)) - _SMALLEST
    return np.stack([turns, np.clip(np.floor(16 * octaves + 0.5), 0, 255)], axis=1).astype(np.uint8)


def windows(num_images: int) -> Iterator[Votes]:
    """Empty histograms for so many images, some after the other."""
    for first in range(0, num_images, WINDOW_IMAGES):
        num = min(WINDOW_IMAGES, num_images - first)
        yield Votes(first, np.zeros((num, _ANGLE_BINS)), np.zeros((num, _SCALE_BINS)))


@numba.njit(cache=True, nogil=True, inline="always")
def _distance(left: npt.NDArray[np.uint64], row: Any, right: npt.NDArray[np.uint64], position: Any) -> Any:
    distance = np.uint64(0)
    for part in range(left.shape[1]):
        distance += num_ones(left[row, part] ^ right[position, part])
    return distance


@numba.njit(cache=True, nogil=True, inline="always")
def _add(votes: Votes, number: Any, query: Pixels, database: Pixels, worth: Any) -> None:
    """The vote of one match, half a bin added to the differences of its geometry."""
    angle = np.int64(database[0]) - np.int64(query[0]) + 2
    scale = np.int64(database[1]) - np.int64(query[1]) + 2 + 64
    if 0 <= scale < 128:
        votes.angles[number, (angle & 255) >> 2] += worth
        votes.scales[number, scale >> 2] += worth


@numba.njit(cache=True, nogil=True)
def vote(votes: Votes, asked: Asked, stored: Stored, cursors: Int64s, table: Float64s, burst: bool) -> None:
    """Add weights[q] * table[h] to the histograms, for every posting of a window's images at Hamming distance h.

    With `burst`, several postings of one image count as in `score_binary_bursts`. `cursors` (q, 3) say where each
    query row's list goes on: posting, byte of `gaps`, image before; zeros for the first window.
    """
    codes, own_geometry = asked.codes, asked.geometry
    numbers, gaps, stored_codes, geometry = stored.numbers, stored.gaps, stored.codes, stored.geometry
    stop = votes.first + len(votes.angles)
    for row in range(len(asked.slots)):
        slot = asked.slots[row]
        if slot < 0:
            continue
        position, at, image = cursors[row, 0], cursors[row, 1], cursors[row, 2]
        if votes.first == 0:
            position, at = stored.starts[slot], stored.begins[slot]
        end = stored.starts[slot + 1]
        while position < end:
            gap, after = next_gap(gaps, at)
            if numbers[image + gap] >= stop:
                break
            begin, position, at = position, position + 1, after
            image += gap
            total = table[_distance(codes, row, stored_codes, begin)]
            matched = total != 0.0
            while position < end and gaps[at] == 0:  # the same image again
                similarity = table[_distance(codes, row, stored_codes, position)]
                total, matched = total + similarity, matched or similarity != 0.0
                position, at = position + 1, at + 1
            if not matched:  # as most are
                continue
            for match in range(begin, position):
                worth = table[_distance(codes, row, stored_codes, match)]
                if burst:
                    worth = worth * math.sqrt(max(worth, 0.0) / total) if total > 0.0 else 0.0
                _add(
                    votes, numbers[image] - votes.first, own_geometry[row], geometry[match], asked.weights[row] * worth
                )
        cursors[row, 0], cursors[row, 1], cursors[row, 2] = position, at, image


@numba.njit(cache=True, nogil=True)
def peaks(votes: Votes) -> Float64s:
    """Of every image (n,), the smaller of the peaks of both histograms after smoothing over three bins."""
    result = np.zeros(len(votes.angles))
    for number in range(len(result)):
        angles, scales = votes.angles[number], votes.scales[number]
        turn, zoom = 0.0, 0.0
        for place in range(len(angles)):
            after = angles[place + 1 if place + 1 < len(angles) else 0]
            turn = max(turn, angles[place - 1] + angles[place] + after)
        for place in range(len(scales)):
            before = scales[place - 1] if place > 0 else 0.0
            after = scales[place + 1] if place + 1 < len(scales) else 0.0
            zoom = max(zoom, before + scales[place] + after)
        result[number] = min(turn, zoom)
    return result
