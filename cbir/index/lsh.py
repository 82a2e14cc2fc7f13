"""Locality-sensitive hashing by random hyperplanes."""

from typing import ClassVar, Literal

import faiss
import numpy as np
from pydantic import Field

from cbir.index.hashing import Hasher, HashingSpec, SignHasher
from cbir.types import Floats

__all__ = ["Lsh"]


class Lsh(HashingSpec):
    """Locality-sensitive hashing (Charikar 2002): the signs of a random rotation of a vector.

    Two vectors at an angle θ have a bit in common with probability 1 - θ / π, so the score is cos(π h / bits) of the
    Hamming distance h, an estimate of their cosine. Nothing is learned: centre the vectors before it (`pca`) if they
    all lie on one side of the origin. With more bits than D, the rotation's rows are those of a tight frame. A
    partition is a faiss `IndexLSH` after a linear transform. Entries: `image_id` and `code`.
    """

    name: Literal["lsh"] = "lsh"
    paper: ClassVar[str] = "Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002"

    metric: Literal["ip"] = Field(default="ip", description="angles: the inner products of unit vectors")

    @property
    def trained(self) -> bool:
        """Only D matters."""
        return False

    def fit(self, rows: Floats, seed: int) -> Hasher:
        """A random rotation to `bits` dimensions."""
        rotation = faiss.RandomRotationMatrix(rows.shape[1], self.bits)
        rotation.init(seed % 2**31)
        projection = faiss.vector_to_array(rotation.A).reshape(self.bits, rows.shape[1])
        return SignHasher(projection, np.zeros(self.bits, np.float32))

    def scores(self) -> Floats:
        """The estimate of the cosine."""
        return np.asarray(np.cos(np.arange(self.bits + 1) * (np.pi / self.bits)), np.float32)
