"""VLAD from stored residual sums, with adapted vocabularies."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.product import check_dim
from cbir.encoding.residual_sums import Parts, ResidualSums
from cbir.encoding.vlad import normalised_vlad
from cbir.errors import DataError
from cbir.types import FeatureBatch, Float64s, Floats, Int64s, Regions, State

__all__ = ["SumsEncoder", "SumsSpec", "VladOfSums"]


class SumsSpec(EncoderSpec):
    """Configuration of an encoder of residual sums: a method states which vectors it makes of an image's rows."""

    parts: ClassVar[Parts] = "image"
    """What the rows have to be sums of."""

    words: int = Field(default=64, ge=1, description="size of the codebook, as residual_sums has it")
    adapt: bool = Field(default=False, description="move each word to the mean of the sample's features of this word")
    alpha: float = Field(default=0.5, gt=0, le=1, description="power law of every component; 0.5 is SSR, 1 is none")
    intra: bool = Field(default=True, description="L2 normalisation of every word's block")

    @property
    def trained(self) -> bool:
        """D and the adaptation are."""
        return True

    @property
    def precursor(self) -> EncoderSpec:
        """The residual sums of as many words."""
        return ResidualSums(words=self.words, parts=self.parts)

    def output_dim(self, dim: int) -> int:
        """W times D."""
        return dim - self.words

    def fit(self, sample: FeatureBatch, seed: int) -> "SumsEncoder":  # noqa: ARG002 - nothing is random here
        """The mean residual of every word over all rows of the sample; DataError if they are no residual sums.

        A feature that lies in several regions counts once for each.
        """
        rows = sample.descriptors
        if len(sample) < 2 or not len(rows):
            raise DataError(f"the sample has {len(sample)} images, but at least 2 are needed; take a larger sample")
        if not _are_sums(rows, self.words):
            raise DataError(
                f"words: rows with D = {rows.shape[1]} are no residual sums of {self.words} words; "
                "put residual_sums with the same number of words before this encoder"
            )
        sums, totals = self.parted(rows)
        mean = sums.sum(axis=0) / np.maximum(totals.sum(axis=0), 1.0)[:, None]
        return SumsEncoder(self, mean if self.adapt else np.zeros_like(mean))

    def restore(self, state: State) -> "SumsEncoder":
        """From the shifts of the words."""
        return SumsEncoder(self, state["shifts"])

    def parted(self, rows: Floats) -> tuple[Float64s, Float64s]:
        """Rows (m, W*D + W) as residual sums (m, W, D) and counts (m, W)."""
        wide = rows.astype(np.float64)
        return wide[:, : -self.words].reshape(len(rows), self.words, -1), wide[:, -self.words :]

    def normalised(self, sums: Float64s) -> Float64s:
        """Residual sums (m, W, D) as unit vectors (m, W*D)."""
        return normalised_vlad(sums, self.alpha, self.intra)

    @abstractmethod
    def vectors(self, sums: Float64s) -> Float64s:
        """What becomes of the residual sums (m, W, D) of one image: (m', W*D)."""

    def query_vectors(self, sums: Float64s) -> Float64s:
        """The same for a query."""
        return self.vectors(sums)

    @property
    def located(self) -> bool:
        """Whether its vectors are of parts of the image."""
        return False

    def boxes(self, boxes: Floats) -> Floats:
        """The boxes (m', 4) of vectors that are located, by those of the sums (m, 4)."""
        return boxes


def _are_sums(rows: Floats, words: int) -> bool:
    """Whether rows (n, L) can be residual sums: the last `words` columns are counts, and the one before them is not."""
    if rows.shape[1] <= words or rows.shape[1] % words:
        return False
    whole = (rows == np.rint(np.abs(rows))).all(axis=0)
    return bool(whole[-words:].all() and not (whole[-words - 1] and rows[:, -words - 1].any()))


class SumsEncoder:
    """Vectors of residual sums, with words moved by `shifts` (W, D) from where the codebook has them."""

    def __init__(self, spec: SumsSpec, shifts: Float64s) -> None:
        self.spec, self.shifts = spec, shifts

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(rows, W*D + W) -> (vectors, W*D) float32. DataError if an image has not the rows that are needed."""
        encoded = self._encoded(batch, self.spec.vectors)
        return replace(encoded, regions=self._regions(batch, encoded.offsets))

    def encode_queries(self, batch: FeatureBatch) -> FeatureBatch:
        """Queries for images that `encode` has encoded; only MultiVLAD treats them otherwise."""
        return self._encoded(batch, self.spec.query_vectors)

    def state(self) -> State:
        """`shifts` (W, D) float64, zero without adaptation."""
        return {"shifts": self.shifts}

    def _encoded(self, batch: FeatureBatch, vectors_of: Callable[[Float64s], Float64s]) -> FeatureBatch:
        check_dim(batch.descriptors, self.shifts.size + self.spec.words)
        images = (self._adapted(batch.descriptors[batch.rows(i)]) for i in range(len(batch)))
        vectors = [vectors_of(sums).astype(np.float32) for sums in images]
        offsets = np.zeros(len(batch) + 1, np.int64)
        np.cumsum([len(part) for part in vectors], out=offsets[1:])
        rows = np.concatenate([np.empty((0, self.shifts.size), np.float32), *vectors])
        return FeatureBatch(batch.image_ids, offsets, rows, sizes=batch.sizes)

    def _adapted(self, rows: Floats) -> Float64s:
        sums, counts = self.spec.parted(rows)
        # sum of x - m = sum of x - c - n (m - c): no feature is needed to move a word from c to m.
        return sums - counts[:, :, None] * self.shifts if self.spec.adapt else sums

    def _regions(self, batch: FeatureBatch, offsets: Int64s) -> Regions | None:
        if batch.regions is None or not self.spec.located:
            return None
        boxes = [self.spec.boxes(batch.regions.of(i)) for i in range(len(batch))]
        return Regions(offsets, np.concatenate([np.empty((0, 4), np.float32), *boxes]))


class VladOfSums(SumsSpec):
    """VLAD of stored residual sums, with vocabulary adaptation (Arandjelović and Zisserman 2013).

    Residual sums (W*D + W) of an image or of its cells -> one row (W*D): the same as `vlad`. `adapt` moves every word
    to the mean of the sample's features that were assigned to it, as a vocabulary of other images needs. `each` gives
    one vector per row of sums instead, which for `residual_sums` with regions is regional search.
    """

    name: Literal["vlad_of_sums"] = "vlad_of_sums"
    paper: ClassVar[str] = "Arandjelović and Zisserman, All about VLAD, CVPR 2013"

    each: bool = Field(default=False, description="a vector for every row of sums instead of one per image")

    @property
    def located(self) -> bool:
        """If every row has a vector."""
        return self.each

    def output_rows(self, rows: int) -> int:
        """One, or as many as before."""
        return rows if self.each else 1

    def vectors(self, sums: Float64s) -> Float64s:
        """Of the total, or of each."""
        return self.normalised(sums if self.each else np.add.reduce(sums, axis=0, keepdims=True))
