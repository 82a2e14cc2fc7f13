"""Whitening that is learned from pairs of matching images."""

import csv
import functools
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cbir.encoding.encoder import EncoderSpec
from cbir.encoding.moments import Moments
from cbir.encoding.normalise import BLOCK, l2_normalised
from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError
from cbir.types import Array, FeatureBatch, Float64s, Floats, Int64s, State, image_id

__all__ = ["LearnedWhitening", "LearnedWhiteningEncoder", "read_pairs", "whitening_of_pairs"]

COLUMNS = ("query", "positive")

IMAGES_PER_DIMENSION = 4
"""Images in pairs that are needed per dimension: they give at least 2 D independent differences."""

JITTER = 1e-10
"""The first share of the mean variance that is added to the diagonal of a covariance that cannot be factored."""

Pair = tuple[str, str]


class LearnedWhitening(EncoderSpec):
    """Learned whitening (Mikolajczyk and Matas 2007; Radenovic et al. 2019): x -> L2(U P (x - mean)), `dim` rows kept.

    P whitens the differences of matching images: what changes between two pictures of the same thing counts little. U
    are the principal directions of what is left, over the whole sample; the mean is that of the queries. Pairs of which
    an image is not in the sample are skipped: a sample smaller than the collection loses most of them. Of an image with
    a row per region the first is learned from. A zero row, an image in which nothing was found, stays zero.
    """

    name: Literal["learned_whitening"] = "learned_whitening"
    paper: ClassVar[str] = "Radenovic et al., Fine-tuning CNN image retrieval with no human annotation, TPAMI 2019"

    needs_one_row: ClassVar[bool] = True

    dim: int = Field(ge=1, examples=[128], description="how many components are kept")
    pairs: str = Field(
        min_length=1,
        examples=["pairs.csv"],
        description="a CSV with the keys of matching images in the columns query and positive: a path or s3:// URI",
    )

    @property
    def trained(self) -> bool:
        """Mean and projection are."""
        return True

    @property
    def assets(self) -> Mapping[str, str]:
        """The pairs."""
        return {"pairs": self.pairs}

    def identity(self) -> dict[str, Any]:
        """Without the path of the pairs, which count by their content."""
        return {field: value for field, value in super().identity().items() if field not in self.assets}

    def output_dim(self, dim: int) -> int:  # noqa: ARG002 - that of its settings
        """The number of components."""
        return self.dim

    def fit(self, sample: FeatureBatch, seed: int) -> "LearnedWhiteningEncoder":  # noqa: ARG002 - nothing is random
        """Learn from the pairs, read from a local path; DataError if they are too few or cannot be understood."""
        own = np.flatnonzero(sample.counts)
        rows = sample.descriptors[sample.offsets[own]]
        if self.dim > rows.shape[1]:
            raise DataError(
                f"dim: {self.dim} components of a sample with D = {rows.shape[1]} are asked for; "
                f"set dim to at most {rows.shape[1]}"
            )
        if not np.isfinite(rows).all():
            raise DataError("the sample of descriptors holds NaN or infinite values; see what the extractor returned")
        queries, positives = _found(read_pairs(Path(self.pairs.removeprefix("file://"))), sample.image_ids[own], rows)
        mean, whitening = whitening_of_pairs(queries, positives)
        projection = _principal_rows(rows, mean, whitening)[: self.dim]
        return self.restore({"mean": mean, "projection": np.ascontiguousarray(projection, np.float32)})

    def restore(self, state: State) -> "LearnedWhiteningEncoder":
        """From mean and projection."""
        return LearnedWhiteningEncoder(state)


class LearnedWhiteningEncoder:
    """Learned whitening with a known projection."""

    def __init__(self, state: State) -> None:
        self._state = dict(state)
        self._mean, self._project = state["mean"], ReproducibleProduct(state["projection"])

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """(K, D) -> (K, dim) float32 of unit length; images and geometry stay."""
        self._project.check(batch.descriptors)
        rows: Floats = np.empty((len(batch.descriptors), len(self._state["projection"])), np.float32)
        for start in range(0, len(rows), BLOCK):
            rows[start : start + BLOCK] = self._encode(batch.descriptors[start : start + BLOCK])
        return batch.with_descriptors(rows)

    def _encode(self, rows: Array) -> Float64s:
        projected = self._project(rows - self._mean)
        projected[~rows.any(axis=1)] = 0.0
        return l2_normalised(projected)

    def state(self) -> State:
        """`mean` (D,) float64 and `projection` (dim, D) float32."""
        return self._state


def whitening_of_pairs(queries: Array, positives: Array) -> tuple[Float64s, Float64s]:
    """The mean of the queries (D,), and P (D, D) with P S P^T = I for S, the mean of (q - p)(q - p)^T.

    `queries` and `positives` are (n, D), n > 0, row by row of matching images. P is the inverse Cholesky factor of S;
    where S has none, as with constant components, ever more of its mean variance is added to its diagonal. DataError
    if all pairs are equal.
    """
    blocks = (slice(start, start + BLOCK) for start in range(0, len(queries), BLOCK))
    differences = (queries[some].astype(np.float64) - positives[some] for some in blocks)
    scatter = functools.reduce(operator.add, map(Moments.of, differences)).outer / len(queries)
    variance = np.trace(scatter) / len(scatter)
    if variance == 0:
        raise DataError("pairs: both images of every pair have the same descriptor; name different views of things")
    mean: Float64s = np.add.reduce(queries, axis=0, dtype=np.float64) / len(queries)
    identity = np.eye(len(scatter))
    jitter = 0.0
    while True:
        try:
            whitening: Float64s = np.linalg.inv(np.linalg.cholesky(scatter + jitter * variance * identity))
        except np.linalg.LinAlgError:
            jitter = max(JITTER, 10 * jitter)
        else:
            return mean, whitening


def _principal_rows(rows: Array, mean: Float64s, whitening: Float64s) -> Float64s:
    """U P (D, D): the whitening (D, D), turned to the principal directions of whitened rows (n, D) around the mean.

    The first row has the largest scatter; the entry of largest magnitude of each is positive.
    """
    blocks = (rows[start : start + BLOCK] - mean for start in range(0, len(rows), BLOCK))
    scatter = functools.reduce(operator.add, map(Moments.of, blocks)).outer / len(rows)
    directions = np.linalg.eigh(whitening @ scatter @ whitening.T)[1].T[::-1]
    projection: Float64s = directions @ whitening
    strongest = np.take_along_axis(projection, np.abs(projection).argmax(axis=1)[:, None], 1)
    return projection * np.where(strongest < 0, -1.0, 1.0)


def _found(pairs: list[Pair], image_ids: Int64s, rows: Array) -> tuple[Array, Array]:
    """The rows (n, D) of the queries and of the positives of all pairs that the sample has; DataError if too few."""
    positions = {image: position for position, image in enumerate(image_ids.tolist())}
    ids = [(image_id(query), image_id(positive)) for query, positive in pairs]
    found = [(positions[one], positions[other]) for one, other in ids if one in positions and other in positions]
    chosen = np.array(found, np.int64).reshape(-1, 2)
    num, least = len(np.unique(chosen)), IMAGES_PER_DIMENSION * rows.shape[1]
    if num < least:
        raise DataError(
            f"pairs: of {len(pairs)} pairs, {len(found)} are in the sample of {len(rows)} images, with {num} different "
            f"images; D = {rows.shape[1]} needs {least} of them. Name more pairs, by the keys of the index; take a "
            "larger sample (sample.images); or reduce D by the encoder pca before"
        )
    return rows[chosen[:, 0]], rows[chosen[:, 1]]


def read_pairs(path: Path) -> list[Pair]:
    """The keys of the matching images of a CSV with columns `query` and `positive`; DataError names a bad line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(_pairs_of(csv.reader(file)))
    except OSError as error:
        raise DataError(f"pairs: {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"pairs: {path} is no CSV in UTF-8: {error}") from error


def _pairs_of(lines: Any) -> Iterator[Pair]:
    header = [cell.strip() for cell in next(lines, [])]
    if missing := [column for column in COLUMNS if column not in header]:
        raise DataError(f"pairs: no column {missing[0]!r}; the first line must be {','.join(COLUMNS)}, found {header}")
    for cells in filter(None, lines):
        row = dict(zip(header, cells, strict=False))
        query, positive = (row.get(column, "") for column in COLUMNS)
        if not query or not positive:
            raise DataError(f"pairs, line {lines.line_num}: a pair is two keys, found {cells}")
        if query == positive:
            raise DataError(f"pairs, line {lines.line_num}: {query!r} is paired with itself; name another picture")
        yield query, positive
