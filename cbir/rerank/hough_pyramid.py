"""Hough pyramid matching: matches vote for a transform at several resolutions, without a model and without inliers."""

import math
from typing import ClassVar, Literal

import numba
import numpy as np
from pydantic import Field, PositiveInt

from cbir.rerank.fits import Flags
from cbir.rerank.matches import Matches, MatchingSpec
from cbir.rerank.reranker import SearchContext
from cbir.rerank.shortlist import rerank_short_lists
from cbir.types import FeatureBatch, Float64s, Floats, Hits, Int32s, Int64s

__all__ = ["Hpm", "HpmReranker", "strengths"]

_MAX_ZOOM = 10.0
_MAX_SHIFT = 3.0
"""Limits of the space of transforms (of the paper): the scale, and the shift in lengths of the longer side."""


class Hpm(MatchingSpec):
    """Hough pyramid matching (Tolias and Avrithis 2011): every match is a similarity transform, a point (shift x and y,
    log scale, angle) of [0, 1]^4, and matches are grouped by a pyramid of `levels` grids over that space.

    A match gains 2^-l for each other match that joins it at level l, counted where they meet first, so that the score
    of an image is high if many matches agree on transforms that are alike; several surfaces that move differently add
    up. A feature counts once: of the matches in a bin that share a feature, the strongest stays. The cost grows as the
    number of matches. The integer part of a score is the sum of the strengths, 0 for an image that is not verified.
    """

    name: Literal["hpm"] = "hpm"
    paper: ClassVar[str] = "Tolias and Avrithis, Speeded-up, relaxed spatial matching, ICCV 2011"

    one_to_one: bool = Field(default=False, description="before the pyramid, where bins have a filter of their own")
    levels: int = Field(default=5, ge=1, le=8, description="grids; the finest has 2^(levels - 1) cells along each axis")
    min_strength: PositiveInt = Field(default=30, description="the sum of the strengths of a verified image")

    def build(self) -> "HpmReranker":
        """The working reranker."""
        return HpmReranker(self)


class HpmReranker:
    """Votes for all pairs of a query in one compiled loop."""

    def __init__(self, spec: Hpm) -> None:
        self._spec = spec

    def rerank(self, hits: Hits, context: SearchContext) -> Hits:
        """The same images, verified ones first; images below `top` follow in their order."""
        return rerank_short_lists(self._spec, self._judge, hits, context)

    def _judge(self, query: FeatureBatch, database: FeatureBatch, matches: Matches) -> Int64s:
        cells = _cells(query, database, matches, self._spec.levels)
        strong = strengths(cells, matches.query, matches.database, matches.offsets, self._spec.levels)
        before = np.concatenate([np.zeros(1), np.cumsum(strong)])
        sums = np.diff(before[matches.offsets]).astype(np.int64)
        return np.where(sums >= self._spec.min_strength, sums, 0)


def _cells(query: FeatureBatch, database: FeatureBatch, matches: Matches, levels: int) -> Int64s:
    """The cell of the finest grid of each match's transform (M,), -1 outside of the space."""
    left, right = query.geometry[matches.query], database.geometry[matches.database]
    starts, ends = database.offsets[matches.images], database.offsets[matches.images + 1]
    return _cells_of_images(
        query.geometry, left, right, matches.offsets, database.geometry, starts, ends, levels, _MAX_ZOOM, _MAX_SHIFT
    )


@numba.njit(cache=True, nogil=True)
def _cells_of_images(
    query: Floats,
    left: Floats,
    right: Floats,
    offsets: Int64s,
    database: Floats,
    starts: Int64s,
    ends: Int64s,
    levels: int,
    max_zoom: float,
    max_shift: float,
) -> Int64s:
    """Bits of the four coordinates are interleaved, so that a cell's number without its lowest four bits is that of the
    cell above. Shifts are those of the middle of the query's features, which errors of angle and scale move least."""
    cells = np.full(len(left), -1, np.int64)
    middle_x, middle_y, _ = _frame(query)
    place = np.empty(4)
    for image in range(len(starts)):
        centre_x, centre_y, length = _frame(database[starts[image] : ends[image]])
        for match in range(offsets[image], offsets[image + 1]):
            (x, y, size, angle), (u, v, other_size, other_angle) = left[match, :4], right[match, :4]
            scale, turn = other_size / size, math.radians(other_angle - angle)
            cosine, sine, dx, dy = scale * math.cos(turn), scale * math.sin(turn), middle_x - x, middle_y - y
            place[0] = (u + cosine * dx - sine * dy - centre_x) / (2 * max_shift * length) + 0.5
            place[1] = (v + sine * dx + cosine * dy - centre_y) / (2 * max_shift * length) + 0.5
            place[2] = math.log(scale) / (2 * math.log(max_zoom)) + 0.5
            place[3] = turn / (2 * math.pi) % 1.0
            cells[match] = _interleaved(place, levels)
    return cells


@numba.njit(cache=True, nogil=True)
def _frame(geometry: Floats) -> tuple[float, float, float]:
    """Centre and longer side of the bounding box of features, in pixels."""
    if len(geometry) == 0:
        return 0.0, 0.0, 1.0
    left = right = np.float64(geometry[0, 0])
    top = bottom = np.float64(geometry[0, 1])
    for row in range(len(geometry)):
        left, right = min(left, geometry[row, 0]), max(right, geometry[row, 0])
        top, bottom = min(top, geometry[row, 1]), max(bottom, geometry[row, 1])
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top, 1.0)


@numba.njit(cache=True, nogil=True)
def _interleaved(place: Float64s, levels: int) -> int:
    """The number of the cell that holds a point of [0, 1)^4."""
    cell = 0
    for axis in range(4):
        if not 0.0 <= place[axis] < 1.0:
            return -1
        coordinate = int(place[axis] * (1 << (levels - 1)))
        for bit in range(levels - 1):
            cell |= ((coordinate >> bit) & 1) << (4 * bit + axis)
    return cell


@numba.njit(cache=True, nogil=True)
def strengths(cells: Int64s, query: Int32s, database: Int32s, offsets: Int64s, levels: int) -> Float64s:
    """The strength of every match (M,); 0 for one that lost a feature to a stronger match."""
    result = np.zeros(len(cells))
    num_query = query.max() + 1 if len(query) else 0
    for image in range(len(offsets) - 1):
        begin, end = offsets[image], offsets[image + 1]
        if end - begin > 1:
            own = database[begin:end] - database[begin:end].min()
            holders = np.full(num_query, -1, np.int64), np.full(own.max() + 1, -1, np.int64)
            _vote(result[begin:end], cells[begin:end], query[begin:end], own, holders, levels)
    return result


@numba.njit(cache=True, nogil=True)
def _vote(
    result: Float64s, cells: Int64s, query: Int32s, database: Int32s, holders: tuple[Int64s, Int64s], levels: int
) -> None:
    """The strengths of one image's matches, level by level, from the finest grid on."""
    alive = cells >= 0
    order = np.argsort(cells, kind="mergesort")
    for level in range(levels):
        weight = 2.0 ** -min(level + 1, levels - 1)
        at = 0
        while at < len(order):
            stop = at + 1
            while stop < len(order) and cells[order[stop]] >> (4 * level) == cells[order[at]] >> (4 * level):
                stop += 1
            if stop - at > 1:
                _settle(result, alive, order[at:stop], query, database, holders, weight)
            at = stop


@numba.njit(cache=True, nogil=True)
def _settle(
    result: Float64s,
    alive: Flags,
    members: Int64s,
    query: Int32s,
    database: Int32s,
    holders: tuple[Int64s, Int64s],
    weight: float,
) -> None:
    """Keep the matches of one bin that are the strongest of both of their features; each gains by all others."""
    for match in members:
        for holder, feature in ((holders[0], query[match]), (holders[1], database[match])):
            known = holder[feature]
            if alive[match] and (known < 0 or (result[match], -match) > (result[known], -known)):
                holder[feature] = match
    count = 0
    for match in members:
        alive[match] = holders[0][query[match]] == match and holders[1][database[match]] == match
        count += alive[match]
    for match in members:
        holders[0][query[match]] = holders[1][database[match]] = -1
        result[match] = result[match] + weight * (count - 1) if alive[match] else 0.0
