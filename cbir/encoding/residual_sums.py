"""Stored statistics of VLAD: raw residual sums and counts, which need no second look at the features."""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cbir.encoding.codebook import Codebook
from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.parts import cell_boxes, cells_of, image_box, positions
from cbir.encoding.residuals import Residuals
from cbir.types import FeatureBatch, Floats, Int64s, Regions, State

__all__ = ["GRID", "Parts", "ResidualSums", "ResidualSumsEncoder"]

GRID = 3
"""Cells per side: the finest level of MultiVLAD."""

Parts = Literal["image", "cells", "regions"]


class ResidualSums(EncoderSpec):
    """Residual sums of All about VLAD (Arandjelović and Zisserman 2013): what VLAD is before its normalisation.

    K rows -> per image one row (W*D + W): V_w = sum of x - c_w, word by word, then the number of features of each word.
    With `cells` the nine cells of a 3 x 3 grid have a row each, with `regions` each of the image's regions (the whole
    image, if it has none); the result's regions are the boxes of its rows. A feature belongs to a box in which its
    centre lies. `vlad_of_sums`, `multivlad` and `rvlad` make vectors of these rows. An image whose size is not known
    is taken to be the bounding box of its features.
    """

    name: Literal["residual_sums"] = "residual_sums"
    paper: ClassVar[str] = "Arandjelović and Zisserman, All about VLAD, CVPR 2013"

    aggregates: ClassVar[bool] = True

    words: int = Field(default=64, ge=1, description="size of the codebook")
    iterations: int = Field(default=25, ge=1, description="rounds of k-means")
    max_distance: float | None = Field(default=None, gt=0, description="features farther from their word are left out")
    parts: Parts = Field(default="image", description="what has a row: the image, each cell of a grid, each region")

    @property
    def trained(self) -> bool:
        """The codebook is."""
        return True

    def output_dim(self, dim: int) -> int:
        """W times D, and W."""
        return self.words * (dim + 1)

    def output_rows(self, rows: int) -> int:  # noqa: ARG002 - that of its settings
        """Nine cells, else one."""
        return GRID * GRID if self.parts == "cells" else 1

    @property
    def rows_are_regions(self) -> bool:
        """If these are its parts."""
        return self.parts == "regions"

    def fit(self, sample: FeatureBatch, seed: int) -> "ResidualSumsEncoder":
        """Train the codebook; DataError if there are too few rows."""
        return self._encoder(Codebook.train(sample.descriptors, self.words, self.iterations, seed))

    def restore(self, state: State) -> "ResidualSumsEncoder":
        """From the centroids."""
        return self._encoder(Codebook(np.ascontiguousarray(state["centroids"], np.float32)))

    def _encoder(self, codebook: Codebook) -> "ResidualSumsEncoder":
        farthest = np.inf if self.max_distance is None else self.max_distance
        return ResidualSumsEncoder(self, Residuals(codebook, max_distance=farthest))


class ResidualSumsEncoder:
    """Residual sums with a trained codebook."""

    def __init__(self, spec: ResidualSums, residuals: Residuals) -> None:
        self.spec, self.residuals = spec, residuals

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (N * parts, W*D + W) float32, with sizes and the boxes of the rows as regions."""
        words = self.residuals.assign(batch.descriptors)
        boxes = [self._boxes(batch, i) for i in range(len(batch))]
        offsets = np.zeros(len(batch) + 1, np.int64)
        np.cumsum([len(part) for part in boxes], out=offsets[1:])
        rows: Floats = np.empty((offsets[-1], self.spec.output_dim(batch.descriptors.shape[1])), np.float32)
        for i in range(len(batch)):
            rows[offsets[i] : offsets[i + 1]] = self._rows(batch, i, words, boxes[i])
        regions = Regions(offsets, np.concatenate([np.empty((0, 4), np.float32), *boxes]))
        return FeatureBatch(batch.image_ids, offsets, rows, sizes=batch.sizes, regions=regions)

    def state(self) -> State:
        """`centroids` (W, D) float32."""
        return {"centroids": self.residuals.codebook.centroids}

    def _boxes(self, batch: FeatureBatch, i: int) -> Floats:
        """The boxes (parts, 4) of image number i."""
        if self.spec.parts == "regions" and batch.regions is not None and len(batch.regions.of(i)):
            return batch.regions.of(i)
        if self.spec.parts != "cells" and batch.geometry.shape[1] < 2:
            return np.zeros((1, 4), np.float32)
        box = image_box(batch, i)
        return cell_boxes(box, GRID) if self.spec.parts == "cells" else box[None]

    def _rows(self, batch: FeatureBatch, i: int, words: Int64s, boxes: Floats) -> Floats:
        """The rows (parts, W*D + W) of image number i."""
        own = batch.rows(i)
        descriptors, nearest = batch.descriptors[own], words[own]
        rows = np.empty((len(boxes), self.spec.output_dim(descriptors.shape[1])), np.float32)
        for row, members in zip(rows, self._members(batch, i), strict=True):
            sums, counts = self.residuals.sums(descriptors[members], nearest[members])
            row[: sums.size], row[sums.size :] = sums.reshape(-1), counts
        return rows

    def _members(self, batch: FeatureBatch, i: int) -> npt.NDArray[np.bool_]:
        """Which features of image number i lie in which of its parts: (parts, n) bool."""
        if self.spec.parts == "regions":
            return batch.members(i)
        if self.spec.parts == "image":
            return np.ones((1, int(batch.counts[i])), np.bool_)
        cells = cells_of(positions(batch)[batch.rows(i)], image_box(batch, i), GRID)
        members: npt.NDArray[np.bool_] = cells == np.arange(GRID * GRID)[:, None]
        return members
