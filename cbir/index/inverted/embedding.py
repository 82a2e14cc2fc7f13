"""What an inverted file stores of local features: residuals to visual words, one by one or summed per image and word.

All sums run in the order of the rows of one image and look at nothing else, so that an image's postings do not depend
on the batch or shard that it came in.
"""

from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np

from cbir.types import Array, FeatureBatch, Floats, Int32s, Int64s, Pixels

__all__ = ["Embedded", "aggregated", "binarised", "counted", "regional", "single", "unit_rows"]

EPSILON = 1e-6
"""Added to norms, as the reference implementation of ASMK does."""


@dataclass(frozen=True)
class Embedded:
    """Postings of a batch: `images` (n,) positions in the batch, rising; `words` (n,) int32, rising within an image;
    `vectors` (n, D) float32 (residuals, unit or not) or (n, 1) (counts); `rows` (n,) the features of the batch that
    they are of, where every feature stands for itself."""

    images: Int64s
    words: Int32s
    vectors: Floats
    rows: Int64s | None = None

    def with_vectors(self, vectors: Floats) -> "Embedded":
        """The same postings with other vectors."""
        return replace(self, vectors=vectors)


def single(batch: FeatureBatch, words: Int32s, centroids: Floats) -> Embedded:
    """Every feature for itself: x - c for each of its words (K, m), as Hamming embedding and SMK hold them."""
    owners, rows, flat = _assignments(batch, words)
    order = np.lexsort((rows, flat, owners))
    residuals = batch.descriptors[rows[order]].astype(np.float32) - centroids[flat[order]]
    return Embedded(owners[order], flat[order], residuals, rows[order])


def aggregated(batch: FeatureBatch, words: Int32s, centroids: Floats) -> Embedded:
    """V_c, the sum of x - c over the features of an image that have the word c among theirs (K, m) (Tolias 2013)."""
    owners, rows, flat = _assignments(batch, words)
    return _sums(owners, rows, flat, batch.descriptors, centroids)


def counted(batch: FeatureBatch, words: Int32s) -> Embedded:
    """How many features of an image have a word, as a vector of length one (Sivic and Zisserman 2003)."""
    owners, _, flat = _assignments(batch, words)
    order = np.lexsort((flat, owners))
    starts, images, kinds = _groups(owners[order], flat[order])
    return Embedded(images, kinds, np.diff(starts).astype(np.float32)[:, None])


def regional(batch: FeatureBatch, words: Int32s, centroids: Floats, *, unit: bool) -> Embedded:
    """V_c^R, the mean over the regions of an image of its regions' residual vectors (Teichmann et al. 2019).

    A region holds the features whose centres lie in its box; an image without regions is one region. `unit` False
    (R-ASMK): every region's whole vector V^(r) is brought to unit length before the mean is taken. `unit` True
    (Naive-R-ASMK): every V_c^(r) is.
    """
    parts = [_of_regions(batch, i, words, centroids, unit) for i in range(len(batch))]
    if not parts:
        return Embedded(np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, centroids.shape[1]), np.float32))
    images = np.repeat(np.arange(len(parts)), [len(part.words) for part in parts])
    return Embedded(
        images, np.concatenate([part.words for part in parts]), np.concatenate([part.vectors for part in parts])
    )


def _of_regions(batch: FeatureBatch, i: int, words: Int32s, centroids: Floats, unit: bool) -> Embedded:
    """The mean over the regions of image number i."""
    own = batch.rows(i)
    inside = batch.members(i)
    regions, rows = np.nonzero(inside)
    num = words.shape[1]
    flat = words[own][rows].reshape(-1)
    each = _sums(np.repeat(regions, num), np.repeat(rows, num), flat, batch.descriptors[own], centroids)
    if unit:
        scaled = unit_rows(each.vectors)
    else:
        squares = np.einsum("kd,kd->k", each.vectors, each.vectors, dtype=np.float64)
        norms = np.sqrt(np.bincount(each.images, squares, len(inside)))
        scaled = (each.vectors / np.maximum(norms, EPSILON)[each.images, None]).astype(np.float32)
    order = np.lexsort((each.images, each.words))
    starts, _, kinds = _groups(np.zeros(len(order), np.int64), each.words[order])
    sums = np.add.reduceat(scaled[order], starts[:-1], axis=0) if len(kinds) else scaled
    return Embedded(np.zeros(len(kinds), np.int64), kinds, (sums / max(1, len(inside))).astype(np.float32))


def _assignments(batch: FeatureBatch, words: Int32s) -> tuple[Int64s, Int64s, Int32s]:
    """Image, row and word of every assignment of a feature to one of its words (K, m), row by row."""
    rows = np.repeat(np.arange(len(words)), words.shape[1])
    owners = np.repeat(np.arange(len(batch)), batch.counts * words.shape[1])
    return owners, rows, words.reshape(-1)


def _groups(owners: Int64s, words: Int32s) -> tuple[Int64s, Int64s, Int32s]:
    """Where the runs of one owner and word start (g + 1,), and owner and word of each run."""
    new = np.ones(len(owners), bool)
    new[1:] = (np.diff(owners) != 0) | (np.diff(words) != 0)
    starts = np.flatnonzero(new)
    return np.append(starts, len(owners)), owners[starts], words[starts]


def _sums(owners: Int64s, rows: Int64s, words: Int32s, descriptors: Array, centroids: Floats) -> Embedded:
    order = np.lexsort((rows, words, owners))
    starts, images, kinds = _groups(owners[order], words[order])
    sums = _residual_sums(np.asarray(descriptors, np.float32), rows[order], starts, kinds, centroids)
    return Embedded(images, kinds, sums)


@numba.njit(cache=True, nogil=True)
def _residual_sums(descriptors: Floats, rows: Int64s, starts: Int64s, words: Int32s, centroids: Floats) -> Floats:
    dim = descriptors.shape[1]
    sums = np.zeros((len(words), dim), np.float32)
    for group in range(len(words)):
        word = words[group]
        for position in range(starts[group], starts[group + 1]):
            row = rows[position]
            for d in range(dim):
                sums[group, d] += descriptors[row, d] - centroids[word, d]
    return sums


def unit_rows(rows: Floats) -> Floats:
    """v / (|v| + 1e-6), row by row."""
    norms = np.sqrt(np.einsum("kd,kd->k", rows, rows, dtype=np.float64)) + EPSILON
    result: Floats = (rows / norms[:, None]).astype(np.float32)
    return result


def binarised(rows: Any) -> Pixels:
    """The signs of the components as packed bits: (n, D) -> (n, 8 * ceil(D / 64)) bytes, bit d set where v_d > 0."""
    bits = np.packbits(np.asarray(rows) > 0, axis=1, bitorder="little")
    missing = -bits.shape[1] % 8
    return np.ascontiguousarray(np.pad(bits, ((0, 0), (0, missing))))
