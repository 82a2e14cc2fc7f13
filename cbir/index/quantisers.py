"""Nearest centroids and product codes, with arithmetic that does not depend on the batch.

A float32 matrix product may give a row other last bits in another batch, and then a near-tie falls to another centroid.
Here float32 finds the candidates and float64 decides among those that rounding could have swapped, so that an image has
the same list and the same code in whatever batch or shard it is encoded, at little more than the cost of float32.
"""

import faiss
import numpy as np
import numpy.typing as npt

from cbir.index.dense import FAISS_METRIC, Metric, exact_scores
from cbir.types import Floats, Int64s, in_order

__all__ = ["codebooks_of", "nearest_centroid", "nearest_centroids", "product_codes", "ranked_centroids"]

_SPARE_CENTROIDS = 4
_BLOCK_VALUES = 1 << 20


def nearest_centroid(rows: Floats, centroids: Floats, metric: Metric) -> Int64s:
    """The centroid (W, D) nearest to each row (K, D), the first of several equal ones; (K,)."""
    nearest = np.empty(len(rows), np.int64)
    squares = np.einsum("wd,wd->w", centroids, centroids)
    offsets = squares / 2 if metric == "l2" else np.zeros_like(squares)
    step = max(1, _BLOCK_VALUES // len(centroids))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        scores = block @ centroids.T - offsets
        best = scores.argmax(1)
        margin = (np.einsum("kd,kd->k", block, block) + squares.max()) * (32 * np.finfo(np.float32).eps)
        close = scores >= (scores[np.arange(len(block)), best] - margin)[:, None]
        unsure = np.flatnonzero(np.count_nonzero(close, axis=1) > 1)
        best[unsure] = _decide(block[unsure], centroids, close[unsure], metric)
        nearest[start : start + step] = best
    return nearest


def _decide(rows: Floats, centroids: Floats, candidates: npt.NDArray[np.bool_], metric: Metric) -> Int64s:
    """The nearest of the candidate centroids (K, W) in double precision."""
    owner, word = np.nonzero(candidates)
    scores = exact_scores(rows[owner], centroids, word[:, None], metric)[:, 0]
    order = np.lexsort((word, -scores, owner))
    return word[order][np.searchsorted(owner[order], np.arange(len(rows)))]


def nearest_centroids(rows: Floats, num: int, centroids: Floats, metric: Metric) -> tuple[Int64s, Floats]:
    """The `num` centroids (W, D) nearest to each row (K, D), best first, and faiss's distances to them; (K, num)."""
    most = min(num + _SPARE_CENTROIDS, len(centroids))
    _, near = faiss.knn(rows, centroids, most, FAISS_METRIC[metric])
    return ranked_centroids(rows, near, num, centroids, metric)


def ranked_centroids(rows: Floats, near: Int64s, num: int, centroids: Floats, metric: Metric) -> tuple[Int64s, Floats]:
    """The best `num` of the centroids `near` (K, R), which -1 pads, by distances found in double precision."""
    scores = exact_scores(rows, centroids, near, metric)
    order = np.lexsort((near, -scores))[:, :num]
    best = in_order(scores, order).astype(np.float32)
    return in_order(near, order), best if metric == "ip" else -best


def product_codes(rows: Floats, codebooks: Floats) -> npt.NDArray[np.uint8]:
    """Rows (K, D) -> the nearest words of codebooks (parts, 2^bits, D / parts), packed (K, B) as faiss does it."""
    num_parts, num_words, width = codebooks.shape
    num_bits = num_words.bit_length() - 1
    words = np.empty((len(rows), num_parts), np.uint8)
    for part, book in enumerate(codebooks):
        words[:, part] = nearest_centroid(rows[:, part * width : (part + 1) * width], book, "l2")
    bits = np.unpackbits(words[:, :, None], axis=2, count=num_bits, bitorder="little")
    return np.packbits(bits.reshape(len(rows), num_parts * num_bits), axis=1, bitorder="little")


def codebooks_of(quantiser: faiss.ProductQuantizer) -> Floats:
    """The codebooks (parts, 2^bits, D / parts) of a product quantiser."""
    return faiss.vector_to_array(quantiser.centroids).reshape(quantiser.M, quantiser.ksub, quantiser.dsub)
