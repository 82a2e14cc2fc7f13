"""Blobs with affine shape: the detector of classic retrieval."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cbir.features.detectors.detector import DetectorSpec
from cbir.features.hessian import hessian_blobs
from cbir.features.opencv import grey
from cbir.features.shape import SecondMoments, ShapeEstimator
from cbir.features.weights import Sha256, file_or_none, is_file, local_path, present
from cbir.types import Floats, Pixels

__all__ = ["HessianAffine", "HessianAffineDetector"]

AFFNET = "AffNet.pth of https://github.com/ducha-aiki/affnet"


class HessianAffine(DetectorSpec):
    """Hessian-affine (Mikolajczyk and Schmid 2004): blobs of the Hessian's determinant, with their affine shape.

    With `shape: moments` the shape is iterated until the second moments of the gradients are those of a circle, and
    blobs for which it is not found are left out; `affnet` (Mishkin et al. 2018) predicts it by a network, whose
    `weights` are a file, or `none` for a random one drawn from `seed`; `circle` leaves it out.
    """

    name: Literal["hessian_affine"] = "hessian_affine"
    paper: ClassVar[str] = "Mikolajczyk and Schmid, Scale and affine invariant interest point detectors, IJCV 2004"

    threshold: PositiveFloat = 1e-4
    """The least determinant, normalised by scale, of a picture with values 0 to 1."""
    edge_threshold: Annotated[float, Field(ge=1)] = 10.0
    """How many times one curvature may exceed the other."""
    layers: PositiveInt = 3
    """Levels of an octave."""
    shape: Literal["moments", "affnet", "circle"] = "moments"
    iterations: PositiveInt = 16
    convergence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """The smaller eigenvalue of the moments as a part of the larger one at which the iteration ends."""
    relocate: bool = False
    """Whether the iteration also seeks the place and the scale again."""
    max_axis_ratio: Annotated[float, Field(gt=1)] = 6.0
    """Longer ellipses are left out."""
    weights: str = "none"
    """Of AffNet."""
    weights_sha256: Sha256 | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        file_or_none(self.weights, AFFNET)
        if is_file(self.weights) and self.shape != "affnet":
            raise ValueError(f"weights are those of AffNet: choose shape: affnet, found {self.shape}")
        return self

    @property
    def affine(self) -> bool:
        """Ellipses, unless they are left out."""
        return self.shape != "circle"

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, where they are a file."""
        return {"weights": self.weights} if is_file(self.weights) else {}

    def build(self, device: str, assets: Mapping[str, Path], max_features: int) -> "HessianAffineDetector":
        """The detector on the CPU, AffNet on the device; ConfigError for weights that are missing or altered."""
        return HessianAffineDetector(self, max_features, self._estimator(device, assets))

    def _estimator(self, device: str, assets: Mapping[str, Path]) -> ShapeEstimator | None:
        if self.shape == "circle":
            return None
        if self.shape == "moments":
            return SecondMoments(self.iterations, self.convergence, self.max_axis_ratio, self.relocate)
        from cbir.features.networks.affnet import AffNet

        path = present(local_path("weights", self.weights, assets), "extractor.detector.weights", AFFNET)
        return AffNet(path, self.weights_sha256, self.seed, self.max_axis_ratio, device)


class HessianAffineDetector:
    """Blobs by falling response, given a shape until there are enough of them."""

    def __init__(self, spec: HessianAffine, max_features: int, estimator: ShapeEstimator | None) -> None:
        self._spec, self._max_features, self._estimator = spec, max_features, estimator

    def detect(self, image: Pixels) -> Floats:
        """Keypoints (K, 7), or (K, 5) for circles."""
        picture, spec = grey(image), self._spec
        blobs = hessian_blobs(picture, spec.threshold, spec.edge_threshold, spec.layers)
        if self._estimator is None:
            return blobs
        found = [np.empty((0, 7), np.float32)]
        for start in range(0, len(blobs), self._max_features):
            found.append(self._estimator.ellipses(picture, blobs[start : start + self._max_features]))
            if sum(map(len, found)) >= self._max_features:
                break
        return np.concatenate(found)
