"""Fast spatial matching: every match is a hypothesis, so that nothing is left to chance."""

from typing import ClassVar, Literal

import numba
import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cbir.features.keypoints import frames
from cbir.rerank.fits import SCORES, Fits, Flags, Score, Verifier, plausible
from cbir.rerank.matches import Matches, MatchingSpec
from cbir.types import FeatureBatch, Float64s, Floats, Int32s, Int64s

__all__ = ["Fsm", "FsmFit"]

_WIDENINGS = (4.0, 3.0, 2.0, 1.5, 1.0, 1.0)
"""Of the threshold, while a transform is fitted again and again: the first fits are still rough."""

_MIN_SPREAD = 1e-3
"""Narrow over wide variance of points, below which they lie on a line and determine no affine transform."""


class Fsm(MatchingSpec):
    """Fast spatial matching (Philbin et al. 2007): the sizes and angles of two matched features determine a similarity
    alone, their elliptic shapes an affine transform. All of them are tried, and the best are optimised locally by least
    squares, to a full affine transform (LO-RANSAC, Chum et al. 2003).

    A hypothesis counts the matches that it misses by at most `threshold_px` + `slack` times their distance from its own
    match, because errors of size and angle act as a lever; the optimised transform counts those within `threshold_px`.
    `dof` 3 takes all features as upright: translation and scale. The result depends on no random numbers. Verified
    images and scores are as for `ransac`.
    """

    name: Literal["fsm"] = "fsm"
    paper: ClassVar[str] = (
        "Philbin et al., Object retrieval with large vocabularies and fast spatial matching, CVPR 2007"
    )

    dof: Literal[3, 4, 5] = Field(
        default=4, description="of a hypothesis: 3 scale, 4 and rotation, 5 and elliptic shape where features have one"
    )
    model: Literal["similarity", "affine"] = Field(default="affine", description="the optimised transform")
    threshold_px: PositiveFloat = Field(
        default=8.0, description="inliers are at most so far off, in the database image"
    )
    slack: NonNegativeFloat = Field(default=0.15, description="what a hypothesis may miss more, per pixel of distance")
    trials: PositiveInt = Field(default=10, description="how many hypotheses are optimised locally, at most")
    min_inliers: PositiveInt = Field(default=6, description="inliers of a verified image")
    score: Score = Field(default="inliers", description=SCORES)

    def build(self) -> Verifier:
        """The working reranker."""
        return Verifier(self, FsmFit(self), self.min_inliers, self.score)


class FsmFit:
    """Fits all pairs of a query in one compiled loop."""

    def __init__(self, spec: Fsm) -> None:
        self._spec = spec

    def __call__(self, query: FeatureBatch, database: FeatureBatch, matches: Matches) -> Fits:
        """The transforms of all images with at least `min_inliers` matches."""
        spec, points = self._spec, matches.points(query, database)
        left, right = query.geometry[matches.query], database.geometry[matches.database]
        found, inliers = _fit_images(
            points,
            _hypotheses(left, right, spec.dof),
            matches.offsets,
            spec.threshold_px,
            spec.slack,
            spec.trials,
            spec.min_inliers,
            spec.model == "affine",
        )
        transforms = np.tile(np.eye(3), (len(matches), 1, 1))
        transforms[:, :2] = found
        return Fits(transforms, inliers)


def _hypotheses(left: Floats, right: Floats, dof: int) -> Floats:
    """The linear map that takes each feature of the query to its match (M, 4): xx, xy, yx, yy."""
    if dof == 5 and left.shape[1] == right.shape[1] == 6:
        back = np.linalg.inv(_shapes(left))
        return np.ascontiguousarray((_shapes(right) @ back).reshape(-1, 4), np.float32)
    scale = right[:, 2].astype(np.float64) / left[:, 2]
    turn = np.radians(right[:, 3] - left[:, 3]) if dof > 3 else np.zeros(len(left))
    xx, yx = scale * np.cos(turn), scale * np.sin(turn)
    return np.stack([xx, -yx, yx, xx], axis=1).astype(np.float32)


def _shapes(geometry: Floats) -> Float64s:
    """What takes the unit circle to each feature's ellipse (M, 2, 2)."""
    return frames(np.insert(geometry, 4, 0.0, axis=1))


@numba.njit(cache=True, nogil=True)
def _fit_images(
    points: Floats,
    linear: Floats,
    offsets: Int64s,
    threshold: float,
    slack: float,
    trials: int,
    min_inliers: int,
    affine: bool,
) -> tuple[Float64s, Flags]:
    """Affine transforms (N, 2, 3) and inliers (M,) of images whose matches lie between two offsets."""
    transforms = np.zeros((len(offsets) - 1, 2, 3))
    transforms[:, 0, 0] = transforms[:, 1, 1] = 1.0
    inliers = np.zeros(len(points), np.bool_)
    for image in range(len(offsets) - 1):
        begin, end = offsets[image], offsets[image + 1]
        if end - begin < min_inliers:
            continue
        columns = np.ascontiguousarray(points[begin:end].T)
        count, transform, flags = _fit(columns, linear[begin:end], threshold, slack, trials, affine)
        if count >= min_inliers:
            transforms[image], inliers[begin:end] = transform, flags
    return transforms, inliers


@numba.njit(cache=True, nogil=True)
def _fit(
    columns: Floats, linear: Floats, threshold: float, slack: float, trials: int, affine: bool
) -> tuple[int, Float64s, Flags]:
    """The best optimised transform: its number of inliers, the transform (2, 3), the inliers (m,).

    A match that follows a transform found before is no hypothesis of its own any more.
    """
    supports = _supports(columns, linear, threshold, slack)
    best, best_transform, best_flags = 0, np.zeros((2, 3)), np.zeros(len(linear), np.bool_)
    for _ in range(trials):
        chosen = int(supports.argmax())
        if 2 * supports[chosen] <= max(best, 2):
            break
        flags = np.empty(len(linear), np.bool_)
        _follow(flags, columns, linear[chosen], chosen, threshold, slack)
        count, transform, flags = _optimised(columns, flags, threshold, affine)
        supports[chosen] = 0
        supports[flags] = 0
        if count > best:
            best, best_transform, best_flags = count, transform, flags
    return best, best_transform, best_flags


@numba.njit(cache=True, nogil=True)
def _supports(columns: Floats, linear: Floats, threshold: float, slack: float) -> Int32s:
    """How many matches follow each match's own transform; 0 where no camera can cause it."""
    supports, flags = np.zeros(len(linear), np.int32), np.empty(len(linear), np.bool_)
    for i in range(len(linear)):
        if plausible(linear[i, 0], linear[i, 1], linear[i, 2], linear[i, 3]):
            _follow(flags, columns, linear[i], i, threshold, slack)
            supports[i] = flags.sum()
    return supports


@numba.njit(cache=True, nogil=True)
def _follow(flags: Flags, columns: Floats, linear: Floats, i: int, threshold: float, slack: float) -> None:
    """Flag the matches that follow the transform of match number i."""
    x, y, u, v = columns[0], columns[1], columns[2], columns[3]
    xx, xy, yx, yy = linear[0], linear[1], linear[2], linear[3]
    tolerance, lever = np.float32(threshold), np.float32(slack)
    for j in range(len(flags)):
        dx, dy, du, dv = x[j] - x[i], y[j] - y[i], u[j] - u[i], v[j] - v[i]
        off_u, off_v = xx * dx + xy * dy - du, yx * dx + yy * dy - dv
        reach = tolerance + lever * max(abs(du), abs(dv))
        flags[j] = off_u * off_u + off_v * off_v <= reach * reach


@numba.njit(cache=True, nogil=True)
def _optimised(columns: Floats, flags: Flags, threshold: float, affine: bool) -> tuple[int, Float64s, Flags]:
    """Rounds of fits, as long as they gain inliers: what fits a part of a surface grows over all of it."""
    best, best_transform, best_flags = 0, np.zeros((2, 3)), np.zeros_like(flags)
    while True:
        count, transform, flags = _round(columns, flags, threshold, affine)
        if count <= best:
            return best, best_transform, best_flags
        best, best_transform, best_flags = count, transform, flags


@numba.njit(cache=True, nogil=True)
def _round(columns: Floats, flags: Flags, threshold: float, affine: bool) -> tuple[int, Float64s, Flags]:
    """Least squares and new inliers in turn, within ever less; none if no camera can cause the transform."""
    transform = np.zeros((2, 3))
    for widening in _WIDENINGS:
        transform = _least_squares(columns, flags, affine)
        if not plausible(transform[0, 0], transform[0, 1], transform[1, 0], transform[1, 1]):
            return 0, transform, flags
        flags = _within(columns, transform, widening * threshold)
    return flags.sum(), transform, flags


@numba.njit(cache=True, nogil=True)
def _within(columns: Floats, transform: Float64s, threshold: float) -> Flags:
    flags = np.empty(columns.shape[1], np.bool_)
    (xx, xy, x0), (yx, yy, y0) = transform
    for j in range(columns.shape[1]):
        x, y = columns[0, j], columns[1, j]
        off_u, off_v = xx * x + xy * y + x0 - columns[2, j], yx * x + yy * y + y0 - columns[3, j]
        flags[j] = off_u * off_u + off_v * off_v <= threshold * threshold
    return flags


@numba.njit(cache=True, nogil=True)
def _least_squares(columns: Floats, flags: Flags, affine: bool) -> Float64s:
    """The transform (2, 3) with the least squares of errors over the flagged matches; zeros if there is none."""
    mean = np.zeros(4)
    count = 0
    for j in range(len(flags)):
        if flags[j]:
            count += 1
            for k in range(4):
                mean[k] += columns[k, j]
    transform = np.zeros((2, 3))
    if count < 2:
        return transform
    mean /= count
    sxx, sxy, syy, sxu, syu, sxv, syv = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(len(flags)):
        if flags[j]:
            x, y, u, v = (
                columns[0, j] - mean[0],
                columns[1, j] - mean[1],
                columns[2, j] - mean[2],
                columns[3, j] - mean[3],
            )
            sxx += x * x
            sxy += x * y
            syy += y * y
            sxu += x * u
            syu += y * u
            sxv += x * v
            syv += y * v
    spread = sxx + syy
    if spread <= 0.0:
        return transform
    determinant = sxx * syy - sxy * sxy
    if affine and count > 3 and determinant > _MIN_SPREAD * spread * spread:
        transform[0, 0], transform[0, 1] = (sxu * syy - syu * sxy) / determinant, (syu * sxx - sxu * sxy) / determinant
        transform[1, 0], transform[1, 1] = (sxv * syy - syv * sxy) / determinant, (syv * sxx - sxv * sxy) / determinant
    else:
        cosine, sine = (sxu + syv) / spread, (sxv - syu) / spread
        transform[0, 0], transform[0, 1], transform[1, 0], transform[1, 1] = cosine, -sine, sine, cosine
    for row in range(2):
        transform[row, 2] = mean[2 + row] - transform[row, 0] * mean[0] - transform[row, 1] * mean[1]
    return transform
