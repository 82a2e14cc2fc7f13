"""The trained parts of an inverted file with product codes, with arithmetic that does not depend on the batch.

A float32 matrix product may give a row other last bits in another batch, and then a near-tie falls to another centroid.
Here float32 finds the candidates and float64 decides among those that rounding could have swapped, so that an image has
the same list and the same code in whatever batch or shard it is encoded, at little more than the cost of float32.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from cbir.encoding.product import ReproducibleProduct
from cbir.index.dense import FAISS_METRIC, Metric, array_view, exact_scores
from cbir.types import Floats, Int64s

__all__ = ["Quantisers", "codebooks_of", "inverted_file", "nearest_centroid"]

_SPARE_LISTS = 4
_BLOCK_VALUES = 1 << 20


class Quantisers:
    """An optional rotation (D', D), centroids of lists (lists, D') and codebooks (parts, 2^bits, D' / parts)."""

    def __init__(self, rotation: Floats | None, centroids: Floats, codebooks: Floats, metric: Metric) -> None:
        self.rotation, self.centroids, self.codebooks, self.metric = rotation, centroids, codebooks, metric
        self._rotated = None if rotation is None else ReproducibleProduct(rotation)

    @classmethod
    def of_index(cls, index: faiss.Index) -> "Quantisers":
        """Those of a faiss index; the centroids are a view into it."""
        ivf, rotation = inverted_file(index), None
        if isinstance(index, faiss.IndexPreTransform):
            transform: Any = faiss.downcast_VectorTransform(index.chain.at(0))  # type: ignore[attr-defined]
            rotation = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        flat: Any = faiss.downcast_index(ivf.quantizer)
        centroids = array_view(flat.get_xb(), ivf.nlist * ivf.d).reshape(-1, ivf.d)
        metric: Metric = "ip" if ivf.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"
        return cls(rotation, centroids, codebooks_of(ivf.pq), metric)

    @property
    def dim(self) -> int:
        """D of the vectors before the rotation."""
        return int((self.centroids if self.rotation is None else self.rotation).shape[1])

    def rotate(self, rows: Floats) -> Floats:
        """(K, D) -> (K, D')."""
        return rows if self._rotated is None else self._rotated(rows).astype(np.float32)

    def encode(self, rows: Floats) -> tuple[Int64s, npt.NDArray[np.uint8]]:
        """Rotated rows (K, D') -> their lists (K,) and the codes of their residuals, packed (K, B) as faiss does it."""
        lists = nearest_centroid(rows, self.centroids, self.metric)
        residuals = rows - self.centroids[lists]
        num_parts, num_words, width = self.codebooks.shape
        num_bits = num_words.bit_length() - 1
        words = np.empty((len(rows), num_parts), np.uint8)
        for part, book in enumerate(self.codebooks):
            words[:, part] = nearest_centroid(residuals[:, part * width : (part + 1) * width], book, "l2")
        bits = np.unpackbits(words[:, :, None], axis=2, count=num_bits, bitorder="little")
        return lists, np.packbits(bits.reshape(len(rows), num_parts * num_bits), axis=1, bitorder="little")

    def nearest_lists(self, rows: Floats, num: int) -> tuple[Int64s, Floats]:
        """The best `num` lists (K, num) of rotated rows and faiss's distances to their centroids."""
        most = min(num + _SPARE_LISTS, len(self.centroids))
        _, near = faiss.knn(rows, self.centroids, most, FAISS_METRIC[self.metric])
        scores = exact_scores(rows, self.centroids, near, self.metric)
        order = np.lexsort((near, -scores))[:, :num]
        best = np.take_along_axis(scores, order, 1).astype(np.float32)
        return np.take_along_axis(near, order, 1), best if self.metric == "ip" else -best

    def empty_index(self, probes: int) -> Any:
        """A faiss index with these quantisers and no vectors."""
        (num_lists, dim), (num_parts, num_words, _) = self.centroids.shape, self.codebooks.shape
        metric = FAISS_METRIC[self.metric]
        flat: Any = faiss.IndexFlat(dim, metric)
        flat.add(self.centroids)
        ivf: Any = faiss.IndexIVFPQ(flat, dim, num_lists, num_parts, num_words.bit_length() - 1, metric)
        faiss.copy_array_to_vector(self.codebooks.ravel(), ivf.pq.centroids)
        ivf.is_trained, ivf.nprobe = True, min(probes, num_lists)
        ivf.use_precomputed_table = -1
        if self.rotation is None:
            return ivf
        rotation: Any = faiss.LinearTransform(self.rotation.shape[1], dim, False)
        faiss.copy_array_to_vector(self.rotation.ravel(), rotation.A)
        rotation.is_trained = True
        rotation.set_is_orthonormal()
        return faiss.IndexPreTransform(rotation, ivf)


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


def inverted_file(index: Any) -> Any:
    """The IndexIVFPQ inside a faiss index."""
    return faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index)


def codebooks_of(quantiser: faiss.ProductQuantizer) -> Floats:
    """The codebooks (parts, 2^bits, D' / parts) of a product quantiser."""
    return faiss.vector_to_array(quantiser.centroids).reshape(quantiser.M, quantiser.ksub, quantiser.dsub)
