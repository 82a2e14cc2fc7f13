"""Ranked centroids and product codes, with arithmetic that does not depend on the batch: as in `nearest`, float32 finds
the candidates and float64 decides among those that rounding could have swapped, so that an image has the same code in
whatever batch or shard it is encoded.
"""

import faiss
import numba
import numpy as np
import numpy.typing as npt

from cbir.index.dense import FAISS_METRIC, Metric, exact_scores
from cbir.index.nearest import nearest_centroid
from cbir.types import Floats, Int64s, in_order

__all__ = ["codebooks_of", "nearest_centroids", "product_codes", "ranked_centroids"]

_SPARE_CENTROIDS = 4


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
    words, is_unsure = np.empty((len(rows), num_parts), np.uint8), np.zeros((len(rows), num_parts), np.bool_)
    squares = np.einsum("pwd,pwd->pw", codebooks, codebooks).max(1)
    flat = np.ascontiguousarray(rows, np.float32)
    _nearest_words(flat, np.ascontiguousarray(codebooks.transpose(0, 2, 1)), squares, words, is_unsure)
    for part in np.flatnonzero(is_unsure.any(0)).tolist():
        some = np.flatnonzero(is_unsure[:, part])
        words[some, part] = nearest_centroid(flat[some, part * width : (part + 1) * width], codebooks[part], "l2")
    if num_bits == 8:
        return words
    bits = np.unpackbits(words[:, :, None], axis=2, count=num_bits, bitorder="little")
    return np.packbits(bits.reshape(len(rows), num_parts * num_bits), axis=1, bitorder="little")


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _nearest_words(
    rows: Floats, books: Floats, squares: Floats, words: npt.NDArray[np.uint8], is_unsure: npt.NDArray[np.bool_]
) -> None:
    """Write the nearest of the words (parts, D / parts, W) to each part of rows (K, D), and where another is about as
    near; `squares` (parts,) are the words' largest squared norms."""
    num_parts, width, num_words = books.shape
    squared = np.empty(num_words, np.float32)
    for row in range(len(rows)):
        for part in range(num_parts):
            squared[:] = 0
            norm = np.float32(0)
            for d in range(width):
                value = rows[row, part * width + d]
                norm += value * value
                for word in range(num_words):
                    difference = value - books[part, d, word]
                    squared[word] += difference * difference
            least = squared[0]
            for word in range(num_words):
                least = min(least, squared[word])
            limit = least + (norm + squares[part]) * np.float32(64 * 2.0**-23)
            count = np.int32(0)
            for word in range(num_words):
                count += np.int32(squared[word] <= limit)
            is_unsure[row, part] = count > 1
            word = 0
            while squared[word] > least:
                word += 1
            words[row, part] = word


def codebooks_of(quantiser: faiss.ProductQuantizer) -> Floats:
    """The codebooks (parts, 2^bits, D / parts) of a product quantiser."""
    return faiss.vector_to_array(quantiser.centroids).reshape(quantiser.M, quantiser.ksub, quantiser.dsub)
