"""Geometric verification: matches between two images that agree on one plane-to-plane transform."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cbir.rerank.reranker import RerankerSpec, SearchContext
from cbir.types import Array, FeatureBatch, Floats, Hits, Int64s

__all__ = ["Ransac", "RansacReranker", "tentative_matches"]

_CHUNK_IMAGES = 32

_MAX_ZOOM = 10.0
_MAX_SLANT = 4.0
"""Limits on the local scale of a transform and on the ratio of its two scales (a slant of about 75 degrees). SIFT
matches survive neither a tenfold zoom nor such a slant, so that nothing true is lost."""


class Ransac(RerankerSpec):
    """Spatial verification (Philbin et al. 2007): tentative matches by Lowe's ratio test, at most one per feature, then
    a transform from query to database image by robust estimation (USAC, Raguram et al. 2013; MAGSAC++, Barath et al.
    2020).

    An image is verified if at least `min_inliers` matches follow one transform within `threshold_px`, and a camera can
    cause that transform: no mirror, no extreme zoom or slant. Verified images come first, by inliers, then by their
    rank before; the others keep their order. The integer part of a score is the number of inliers, 0 for an image that
    is not verified; its fraction falls with the rank before.
    """

    name: Literal["ransac"] = "ransac"
    paper: ClassVar[str] = (
        "Philbin et al., Object retrieval with large vocabularies and fast spatial matching, CVPR 2007"
    )

    channel: str = Field(examples=["local"], description="channel with local features; needs keep_features: true there")
    top: NonNegativeInt = Field(default=100, description="how many of the best hits are verified; 0: all of them")
    root: bool = Field(default=True, description="compare square roots of L1-normalised descriptors (RootSIFT)")
    ratio: float = Field(
        default=0.8, gt=0, le=1, description="nearest over second nearest distance of a match, at most"
    )
    one_to_one: bool = Field(default=True, description="a database feature keeps only its nearest query feature")
    model: Literal["affine", "homography"] = Field(default="affine", description="the transform")
    method: Literal["usac_fast", "magsac"] = Field(default="magsac", description="the robust estimator")
    threshold_px: PositiveFloat = Field(
        default=8.0, description="inliers are at most so far off, in the database image"
    )
    min_inliers: PositiveInt = Field(default=6, description="inliers of a verified image")
    max_iterations: PositiveInt = Field(default=5000, description="of the estimator")
    confidence: float = Field(default=0.999, gt=0, lt=1, description="of having found the best transform")
    seed: NonNegativeInt = Field(default=0, description="of the estimator's random samples")

    def build(self) -> "RansacReranker":
        """The working reranker."""
        return RansacReranker(self)


class RansacReranker:
    """Verifies hits against the query's features."""

    def __init__(self, spec: Ransac) -> None:
        self._spec = spec
        self._estimator: Callable[..., Any] = cv2.estimateAffine2D if spec.model == "affine" else cv2.findHomography
        self._sample_size = 3 if spec.model == "affine" else 4
        self._usac = _usac_params(spec)

    def rerank(self, hits: Hits, context: SearchContext) -> Hits:
        """The same images, verified ones first; images below `top` follow in their order."""
        queries = context.query_features(self._spec.channel)
        ids = hits.image_ids[:, : self._spec.top or None]
        inliers = np.zeros(hits.image_ids.shape, np.int64)
        for query, row in enumerate(ids):
            valid = row[row >= 0]
            inliers[query, : len(valid)] = self._count_inliers(queries.take(np.array([query])), valid, context)
        return _by_inliers(hits, np.where(inliers >= self._spec.min_inliers, inliers, 0))

    def matches(self, query: FeatureBatch, database: FeatureBatch) -> Floats:
        """The verified matches of two images (one per batch) as x, y in the query and x, y in the database image
        (M, 4); none if the pair is not verified."""
        left, right = self._descriptors(query), self._descriptors(database)
        points = self._inliers(left, query.geometry, right, database.geometry)
        return points if len(points) >= self._spec.min_inliers else points[:0]

    def _count_inliers(self, query: FeatureBatch, image_ids: Int64s, context: SearchContext) -> Int64s:
        """Inliers per image (R,), reading the stored features a few images at a time."""
        counts = np.zeros(len(image_ids), np.int64)
        left = self._descriptors(query)
        for start in range(0, len(image_ids) if len(left) else 0, _CHUNK_IMAGES):
            batch = context.features(self._spec.channel, image_ids[start : start + _CHUNK_IMAGES])
            right = self._descriptors(batch)
            for image in range(len(batch)):
                rows = batch.rows(image)
                inliers = self._inliers(left, query.geometry, right[rows], batch.geometry[rows])
                counts[start + image] = len(inliers)
        return counts

    def _descriptors(self, batch: FeatureBatch) -> Floats:
        rows = batch.descriptors.astype(np.float32)
        if self._spec.root:
            rows /= np.maximum(rows.sum(1, keepdims=True), 1e-12)
            np.sqrt(rows, out=rows)
        return rows

    def _inliers(self, left: Floats, left_geometry: Floats, right: Floats, right_geometry: Floats) -> Floats:
        """Matches (M, 4) that follow the best transform."""
        from_, to = tentative_matches(left, right, self._spec.ratio, self._spec.one_to_one)
        points = np.hstack([left_geometry[from_, :2], right_geometry[to, :2]])
        transform = self.estimate(points) if len(points) >= self._spec.min_inliers else None
        if transform is None:
            return points[:0]
        inliers = points[_distances(transform, points) <= self._spec.threshold_px]
        return inliers if len(inliers) and _plausible(transform, inliers[:, :2].mean(0)) else points[:0]

    def estimate(self, points: Floats) -> npt.NDArray[np.float64] | None:
        """The transform (2, 3) or (3, 3) that most matches x, y -> x, y (M, 4) follow, None if there is none."""
        if len(points) < self._sample_size:
            return None
        transform: npt.NDArray[np.float64] | None
        left, right = (np.ascontiguousarray(side) for side in (points[:, :2], points[:, 2:]))
        transform, _ = self._estimator(left, right, params=self._usac)
        return transform


def tentative_matches(left: Floats, right: Floats, ratio: float, one_to_one: bool) -> tuple[Int64s, Int64s]:
    """Lowe's ratio test (2004): features of the left image (K, D) whose nearest in the right one (K', D) is nearer than
    `ratio` times the second nearest; with `one_to_one` only the nearest left feature of each right one.

    Returns their positions in either image, by rising left position.
    """
    if len(left) == 0 or len(right) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # One product gives x.y - |y|^2 / 2, whose largest value in a row is the nearest y.
    near = _with_column(left, 1.0) @ _with_column(right, -np.einsum("kd,kd->k", right, right) / 2).T
    rows, nearest = np.arange(len(left)), near.argmax(1)
    best = near[rows, nearest]
    near[rows, nearest] = -np.inf
    squares = np.einsum("kd,kd->k", left, left)
    first, second = (np.maximum(squares - 2 * score, 0) for score in (best, near.max(1)))
    matched = np.flatnonzero(first < ratio**2 * second)
    if one_to_one:
        by_distance = matched[np.lexsort((matched, first[matched], nearest[matched]))]
        matched = np.sort(by_distance[np.unique(nearest[by_distance], return_index=True)[1]])
    return matched, nearest[matched]


def _with_column(rows: Floats, column: float | Array) -> Floats:
    wider = np.empty((len(rows), rows.shape[1] + 1), np.float32)
    wider[:, :-1], wider[:, -1] = rows, column
    return wider


def _usac_params(spec: Ransac) -> Any:
    params = cv2.UsacParams()
    params.threshold, params.confidence = spec.threshold_px, spec.confidence
    params.maxIterations, params.randomGeneratorState = spec.max_iterations, spec.seed
    params.isParallel = False
    if spec.method == "usac_fast":
        params.score, params.loMethod = cv2.SCORE_METHOD_MSAC, cv2.LOCAL_OPTIM_INNER_AND_ITER_LO
    else:
        params.score, params.loMethod = cv2.SCORE_METHOD_MAGSAC, cv2.LOCAL_OPTIM_SIGMA
    return params


def _plausible(transform: npt.NDArray[np.float64], centre: Floats) -> bool:
    """Whether a camera can see a surface so: no mirror, no collapse, no extreme zoom or slant at the centre (2,).

    Without it, chance matches around one spot are "verified" by a transform that shrinks the query to that spot.
    """
    linear = transform[:2, :2]
    if len(transform) == 3:
        x, y, w = transform @ np.append(centre, 1.0)
        linear = (linear - np.outer([x / w, y / w], transform[2, :2])) / w
    largest, smallest = np.linalg.svd(linear, compute_uv=False)
    if np.linalg.det(linear) <= 0 or largest > _MAX_ZOOM or smallest < 1 / _MAX_ZOOM:
        return False
    return bool(largest <= _MAX_SLANT * smallest)


def _distances(transform: npt.NDArray[np.float64], points: Floats) -> npt.NDArray[np.float64]:
    """How far the transform (2 or 3, 3) misses the second point of every match, in pixels."""
    mapped = points[:, :2] @ transform[:, :2].T + transform[:, 2]
    if len(transform) == 3:
        mapped = mapped[:, :2] / np.where(mapped[:, 2:] > 0, mapped[:, 2:], np.nan)
    distances: npt.NDArray[np.float64] = np.hypot(*(mapped - points[:, 2:]).T)
    return np.nan_to_num(distances, nan=np.inf)


def _by_inliers(hits: Hits, inliers: Int64s) -> Hits:
    """Hits by falling inliers, then by the rank that they had."""
    depth = hits.image_ids.shape[1]
    before = (depth - np.arange(depth)) / (depth + 1)
    return Hits.ranked(hits.image_ids, (inliers + before).astype(np.float32), depth)
