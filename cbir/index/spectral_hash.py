"""Spectral hashing: bits from waves along the principal directions."""

from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
from pydantic import Field

from cbir.encoding.pca import principal_components
from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError
from cbir.index.dense import array_view
from cbir.index.hashing import Bits, Hasher, HashingSpec
from cbir.types import Float64s, Floats, Int64s, Pixels

__all__ = ["SpectralHash", "WaveHasher"]


class WaveHasher(Hasher):
    """A bit says in which half of a wave a vector lies: whether Wx + b rounds down to an odd number."""

    form = "IndexIVFSpectralHash with one list"

    def bits(self, values: Float64s) -> Bits:
        """Values that round down to an odd number."""
        return np.asarray(np.floor(values) % 2 == 1)

    def index(self, image_ids: Int64s, codes: Pixels) -> Any:
        """An IndexIVFSpectralHash of period 2, whose only list holds all codes."""
        quantiser: Any = faiss.IndexFlatL2(self.dim)
        quantiser.add(np.zeros((1, self.dim), np.float32))
        index: Any = faiss.IndexIVFSpectralHash(quantiser, self.dim, 1, self.num_bits, 2)
        index.replace_vt(self.transform())
        ids, codes = np.ascontiguousarray(image_ids, np.int64), np.ascontiguousarray(codes)
        index.invlists.add_entries(0, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        index.ntotal = len(ids)
        return index

    @classmethod
    def read(cls, index: Any) -> tuple[Self, Int64s, Pixels] | None:
        """From such an index."""
        if not isinstance(index, faiss.IndexIVFSpectralHash) or index.nlist != 1:
            return None
        lists: Any = index.invlists
        num, width = index.ntotal, index.code_size
        ids, codes = np.empty(0, np.int64), np.empty((0, width), np.uint8)
        if num:
            ids = array_view(lists.get_ids(0), num)
            codes = array_view(lists.get_codes(0), num * width).reshape(num, width)
        return cls.of_transform(index.vt), ids, codes


class SpectralHash(HashingSpec):
    """Spectral hashing (Weiss et al. 2009): along each principal direction, on which the sample reaches from a to b,
    lie waves cos(j π (y - a) / (b - a)), j = 1, 2, ...; the bits are the signs of the `bits` longest waves of all.

    They are the eigenfunctions of the graph Laplacian of vectors that are spread evenly over a box, where every bit is
    balanced. The score is the negative Hamming distance. A partition is a faiss `IndexIVFSpectralHash` with one list.
    Entries: `image_id` and `code`.
    """

    name: Literal["spectral_hash"] = "spectral_hash"
    paper: ClassVar[str] = "Weiss et al., Spectral hashing, NeurIPS 2009"
    hasher: ClassVar[type[Hasher]] = WaveHasher

    metric: Literal["l2"] = Field(default="l2", description="the distance that the bits imitate: the Euclidean")

    def fit(self, rows: Floats, seed: int) -> Hasher:  # noqa: ARG002 - nothing is random here
        """Directions and waves; DataError if all rows are equal."""
        if len(rows) < 2:
            raise DataError(f"spectral_hash needs a sample of at least 2 vectors, found {len(rows)}")
        num_directions = min(self.bits, rows.shape[1], len(rows) - 1)
        mean, components, _ = principal_components(rows, num_directions)
        places = ReproducibleProduct(components)(rows - mean)
        low, width = places.min(0), np.ptp(places, axis=0)
        if not width.any():
            raise DataError("all rows of the sample are equal, so there is nothing to tell apart; take another sample")
        direction, frequency = _longest_waves(width, self.bits)
        projection = components[direction] * frequency[:, None]
        offsets = 0.5 - frequency * low[direction] - projection @ mean
        return WaveHasher(projection.astype(np.float32), offsets.astype(np.float32))


def _longest_waves(width: Float64s, num: int) -> tuple[Int64s, Float64s]:
    """The directions (num,) and the frequencies j / (b - a) (num,) of the waves with the smallest eigenvalues."""
    with np.errstate(divide="ignore"):
        frequencies = np.arange(1, num + 1) / width[:, None]
    order = np.argsort(frequencies.ravel(), kind="stable")[:num]
    return order // num, frequencies.ravel()[order]
