"""Geometric verification by random samples of matches, with OpenCV's robust estimators."""

from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from cbir.rerank.fits import SCORES, Fits, Score, Verifier, mapped, plausible
from cbir.rerank.matches import Matches, MatchingSpec
from cbir.types import FeatureBatch, Float64s, Floats

__all__ = ["Ransac", "RansacFit"]


class Ransac(MatchingSpec):
    """Spatial verification (Philbin et al. 2007) by robust estimation of a transform from the query to the database
    image (USAC, Raguram et al. 2013; MAGSAC++, Barath et al. 2020).

    An image is verified if at least `min_inliers` matches follow one transform within `threshold_px`, and a camera can
    cause that transform: no mirror, no extreme zoom or slant. Verified images come first, by inliers, then by their
    rank before; the others keep their order. The integer part of a score is the number of inliers, 0 for an image that
    is not verified; its fraction falls with the rank before.
    """

    name: Literal["ransac"] = "ransac"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = (
        "Philbin et al., Object retrieval with large vocabularies and fast spatial matching, CVPR 2007"
    )

    matches: Literal["ratio", "mutual", "word"] = Field(
        default="ratio", description=MatchingSpec.model_fields["matches"].description
    )
    model: Literal["affine", "homography"] = Field(default="affine", description="the transform")
    method: Literal["usac_fast", "magsac"] = Field(default="magsac", description="the robust estimator")
    threshold_px: PositiveFloat = Field(
        default=8.0, description="inliers are at most so far off, in the database image"
    )
    min_inliers: PositiveInt = Field(default=6, description="inliers of a verified image")
    score: Score = Field(default="inliers", description=SCORES)
    max_iterations: PositiveInt = Field(default=5000, description="of the estimator")
    confidence: float = Field(default=0.999, gt=0, lt=1, description="of having found the best transform")
    seed: NonNegativeInt = Field(default=0, description="of the estimator's random samples")

    def build(self) -> Verifier:
        """The working reranker."""
        return Verifier(self, RansacFit(self), self.min_inliers, self.score)


class RansacFit:
    """Fits one pair of images after the other."""

    def __init__(self, spec: Ransac) -> None:
        self._spec = spec
        self._estimator: Any = cv2.estimateAffine2D if spec.model == "affine" else cv2.findHomography
        self._sample_size = 3 if spec.model == "affine" else 4
        self._usac = _usac_params(spec)

    def __call__(self, query: FeatureBatch, database: FeatureBatch, matches: Matches) -> Fits:
        """The transforms of all images with at least `min_inliers` matches."""
        points = matches.points(query, database)
        fits = Fits(np.tile(np.eye(3), (len(matches), 1, 1)), np.zeros(len(points), np.bool_))
        for image, rows in enumerate(matches.per_image()):
            transform = self.estimate(points[rows]) if rows.stop - rows.start >= self._spec.min_inliers else None
            if transform is None:
                continue
            off = mapped(transform, points[rows, :2]) - points[rows, 2:]
            inliers = np.hypot(*off.T) <= self._spec.threshold_px
            if inliers.any() and plausible(*_linear(transform, points[rows][inliers, :2].mean(0)).ravel()):
                fits.transforms[image], fits.inliers[rows] = transform, inliers
        return fits

    def estimate(self, points: Floats) -> Float64s | None:
        """The transform (3, 3) that most matches x, y -> x, y (M, 4) follow, None if there is none."""
        if len(points) < self._sample_size:
            return None
        left, right = (np.ascontiguousarray(side) for side in (points[:, :2], points[:, 2:]))
        transform, _ = self._estimator(left, right, params=self._usac)
        if transform is None:
            return None
        whole: Float64s = np.vstack([transform, np.eye(3)[len(transform) :]])
        return whole


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


def _linear(transform: Float64s, centre: Floats) -> Float64s:
    """The linear map (2, 2) that a transform (3, 3) is at a point."""
    x, y, w = transform @ np.append(centre, 1.0)
    part: Float64s = (transform[:2, :2] - np.outer([x / w, y / w], transform[2, :2])) / w
    return part
