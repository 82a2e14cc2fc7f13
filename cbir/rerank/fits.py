"""Verification of matches by one transform: what a fit is, whether a camera can cause it, and what it is worth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numba
import numpy as np
import numpy.typing as npt

from cbir.rerank.matches import Matches, MatchingSpec
from cbir.rerank.reranker import SearchContext
from cbir.rerank.shortlist import rerank_short_lists
from cbir.types import FeatureBatch, Float64s, Floats, Hits, Int64s

__all__ = ["Fit", "Fits", "Flags", "Score", "Verifier", "mapped", "plausible"]

Flags = npt.NDArray[np.bool_]
Score = Literal["inliers", "ratio", "coverage"]

SCORES = (
    "what verified images are ordered by: the number of inliers; their share of the features that lie in both pictures "
    "(G-08); or the share of the query's picture that they cover. Shares are counted in thousandths"
)
"""The description of the field `score` of every verification."""

MAX_ZOOM = 10.0
MAX_SLANT = 4.0
"""Limits on the local scale of a transform and on the ratio of its two scales (a slant of about 75 degrees). SIFT
matches survive neither a tenfold zoom nor such a slant, so that nothing true is lost."""


@dataclass(frozen=True)
class Fits:
    """One transform per image from the query to it, (N, 3, 3), and which of the matches follow it (M,).

    An image that has no transform has no inliers.
    """

    transforms: Float64s
    inliers: Flags


Fit = Callable[[FeatureBatch, FeatureBatch, Matches], Fits]
"""Finds the transforms that the matches of a query follow."""


@numba.njit(cache=True, nogil=True)
def plausible(xx: float, xy: float, yx: float, yy: float) -> bool:
    """Whether a camera can see a surface by the linear map [[xx, xy], [yx, yy]]: no mirror, no collapse, no extreme
    zoom or slant.

    Without it, chance matches around one spot are "verified" by a transform that shrinks the query to that spot.
    """
    determinant = xx * yy - xy * yx
    if not determinant > 0.0:
        return False
    # The sum and the difference of the two singular values.
    both = math.hypot(xx + yy, yx - xy)
    difference = math.hypot(xx - yy, yx + xy)
    largest, smallest = (both + difference) / 2.0, (both - difference) / 2.0
    return largest <= MAX_ZOOM and smallest * MAX_ZOOM >= 1.0 and largest <= MAX_SLANT * smallest


def mapped(transform: Float64s, points: Floats | Float64s) -> Float64s:
    """Points (n, 2) after a transform (3, 3); NaN for those beyond its horizon."""
    wide = points @ transform[:, :2].T + transform[:, 2]
    result: Float64s = wide[:, :2] / np.where(wide[:, 2:] > 0, wide[:, 2:], np.nan)
    return result


class Verifier:
    """Spatial verification (Philbin et al. 2007): an image is verified if enough matches follow one transform."""

    def __init__(self, spec: MatchingSpec, fit: Fit, min_inliers: int, score: Score) -> None:
        self._spec, self._fit, self._matcher = spec, fit, spec.matcher()
        self._min_inliers, self._value = min_inliers, _VALUES[score]

    def rerank(self, hits: Hits, context: SearchContext) -> Hits:
        """The same images, verified ones first; images below `top` follow in their order."""
        return rerank_short_lists(self._spec, self._judge, hits, context)

    def matches(self, query: FeatureBatch, database: FeatureBatch) -> Floats:
        """The verified matches of two images (one per batch) as x, y in the query and x, y in the database image
        (M, 4); none if the pair is not verified. The batches hold features or signatures, as the spec says."""
        matches = self._matcher(query, database, np.zeros(1, np.int64))
        fits = self._fit(query, database, matches)
        points = matches.points(query, database)[fits.inliers]
        return points if len(points) >= self._min_inliers else points[:0]

    def _judge(self, query: FeatureBatch, database: FeatureBatch, matches: Matches) -> Int64s:
        fits = self._fit(query, database, matches)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(fits.inliers)])
        counts = np.diff(before[matches.offsets])
        points, values = matches.points(query, database), np.zeros(len(matches), np.int64)
        for image, rows in enumerate(matches.per_image()):
            if counts[image] >= self._min_inliers:
                stored = database.geometry[database.rows(int(matches.images[image])), :2]
                inside = points[rows][fits.inliers[rows]]
                values[image] = self._value(fits.transforms[image], inside, query.geometry[:, :2], stored)
        return values


def _count(transform: Float64s, inliers: Floats, query: Floats, stored: Floats) -> int:  # noqa: ARG001 - one form
    return len(inliers)


def _ratio(transform: Float64s, inliers: Floats, query: Floats, stored: Floats) -> int:
    """Inliers over the features of either image that the other image shows as well, their geometric mean."""
    there = _num_inside(mapped(transform, np.unique(query, axis=0)), stored)
    here = _num_inside(mapped(np.asarray(np.linalg.inv(transform), np.float64), np.unique(stored, axis=0)), query)
    return _thousandths(len(np.unique(inliers, axis=0)) / math.sqrt(max(there, 1) * max(here, 1)))


def _num_inside(points: Float64s, frame: Floats) -> int:
    """How many points lie in the bounding box of others."""
    return int(((points >= frame.min(0)) & (points <= frame.max(0))).all(1).sum())


def _coverage(transform: Float64s, inliers: Floats, query: Floats, stored: Floats) -> int:  # noqa: ARG001 - one form
    """The convex hull of the inliers over the bounding box of all features of the query."""
    hull = cv2.contourArea(cv2.convexHull(np.ascontiguousarray(inliers[:, :2])))
    return _thousandths(hull / max(float(np.prod(np.ptp(query, axis=0))), 1.0))


def _thousandths(share: float) -> int:
    """Whole thousandths, at least one: a verified image does not lose to one that is not."""
    return max(round(1000 * min(share, 1.0)), 1)


_VALUES: dict[Score, Callable[[Float64s, Floats, Floats, Floats], int]] = {
    "inliers": _count,
    "ratio": _ratio,
    "coverage": _coverage,
}
