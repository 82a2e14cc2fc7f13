"""Edge Boxes: boxes that hold whole contours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np

from cbir.features.regions.proposer import in_original_pixels, with_whole
from cbir.features.regions.search import SearchProposer, SearchSpec, distinct, shrunk
from cbir.types import Array, Floats, Int32s, Pixels

__all__ = ["EdgeBoxes"]

SIGMA = 1.5
"""Pixels of smoothing before gradients: texture below it is no contour."""

WEAK, STRONG, FULL = 30.0, 90.0, 200.0
"""Lengths of a Sobel gradient of 8-bit values: of an edge beside a stronger one, of one alone, and where strength 1
begins. A straight edge between greys that differ by 47 is STRONG."""


class EdgeBoxes(SearchSpec):
    """Edge Boxes (Zitnick and Dollár 2014): boxes by the strength of the contours that lie wholly inside, best first.

    Contours are edges of the Lab image, smoothed and thinned by Canny's rule. Unlike the structured forests of the
    paper they need no trained model, and follow coarse texture as well as outlines.
    """

    name: Literal["edge_boxes"] = "edge_boxes"
    paper: ClassVar[str] = "Zitnick, Dollár, Edge boxes: locating object proposals from edges, ECCV 2014"

    def build(self, device: str, assets: Mapping[str, Path]) -> "EdgeBoxesProposer":  # noqa: ARG002 - runs on the CPU
        """A proposer on the CPU, whatever the device."""
        return EdgeBoxesProposer(self)


class EdgeBoxesProposer(SearchProposer):
    """OpenCV's Edge Boxes over a map of edges."""

    def __init__(self, spec: EdgeBoxes) -> None:
        self._spec = spec

    def boxes(self, image: Pixels, size: Int32s) -> Floats:
        """By falling score."""
        spec, small = self._spec, shrunk(image, self._spec.size)
        found = distinct(self._found(small), spec.iou, spec.max_boxes)
        return with_whole(in_original_pixels(found, small.shape, size), size, first=spec.whole)

    def _found(self, image: Pixels) -> Array:
        """Left, top, right, bottom (R, 4) by falling score."""
        strength, orientation = _edges(image)
        least = max(1.0, self._spec.min_area * strength.size)
        boxes: Any = cv2.ximgproc.createEdgeBoxes(beta=self._spec.iou, minBoxArea=least)
        found, scores = boxes.getBoundingBoxes(strength, orientation)
        if not len(found):
            return np.empty((0, 4), np.int64)
        left, top, width, height = np.asarray(found, np.int64).T
        order = np.lexsort((top + height, left + width, top, left, -np.asarray(scores).ravel()))
        # OpenCV's refinement of a box may leave less than it began with.
        best = order[(width * height)[order] >= least]
        edges: Array = np.stack([left, top, left + width, top + height], axis=1)
        return np.asarray(edges[best])


def _edges(image: Pixels) -> tuple[Floats, Floats]:
    """Strength from 0 to 1 and direction of the normal from 0 to pi, (H, W) each, of thin edges; 0 elsewhere.

    A place has the strongest gradient of the three channels of Lab.
    """
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    smooth = cv2.GaussianBlur(lab, (0, 0), SIGMA)
    across, down = (np.asarray(cv2.Sobel(smooth, cv2.CV_32F, *order)) for order in ((1, 0), (0, 1)))
    strongest = (across**2 + down**2).argmax(axis=2)[..., None]
    across, down = (np.take_along_axis(gradient, strongest, 2)[..., 0] for gradient in (across, down))
    thin = cv2.Canny(across.astype(np.int16), down.astype(np.int16), WEAK, STRONG, L2gradient=True) > 0
    strength = np.where(thin, np.minimum(np.hypot(across, down) / FULL, 1), 0).astype(np.float32)
    return strength, np.mod(np.arctan2(down, across), np.pi).astype(np.float32)
