"""Iterative quantisation: binary codes after a learned rotation."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from cbir.encoding.pca import principal_components
from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError
from cbir.index.hashing import Hasher, HashingSpec, SignHasher
from cbir.types import Float64s, Floats

__all__ = ["Itq"]


class Itq(HashingSpec):
    """Iterative quantisation (Gong et al. 2013): the signs of principal components after the rotation that brings them
    nearest to the corners of a cube, found by turns of rounding and of Procrustes' problem.

    The score is the negative Hamming distance. There are at most D bits. A partition is a faiss `IndexLSH` after a
    linear transform. Entries: `image_id` and `code`.
    """

    name: Literal["itq"] = "itq"
    paper: ClassVar[str] = (
        "Gong et al., Iterative quantization: a Procrustean approach to learning binary codes for large-scale image "
        "retrieval, IEEE TPAMI 2013"
    )

    iterations: PositiveInt = Field(default=50, description="turns of rounding and rotating")
    metric: Literal["l2"] = Field(default="l2", description="the distance that the bits imitate: the Euclidean")

    def fit(self, rows: Floats, seed: int) -> Hasher:
        """Principal components and their rotation, around the mean; DataError if there are fewer than `bits`."""
        most = min(len(rows) - 1, rows.shape[1])
        if self.bits > most:
            raise DataError(
                f"bits: {self.bits} bits need as many principal components, but a sample of {len(rows)} rows with "
                f"D = {rows.shape[1]} has at most {max(0, most)}; set fewer bits (a multiple of 8), take a larger "
                "sample, or use the index lsh"
            )
        mean, components, _ = principal_components(rows, self.bits)
        rotation = _rotation(ReproducibleProduct(components)(rows - mean), self.iterations, seed)
        projection = rotation.T @ components
        return SignHasher(projection.astype(np.float32), -(projection @ mean).astype(np.float32))


def _rotation(values: Float64s, iterations: int, seed: int) -> Float64s:
    """R (bits, bits) for which the sum of |sign(VR) - VR|^2 over the values V (K, bits) is small, from a random start.

    Not faiss's `ITQMatrix`, whose turns do not always lower this sum.
    """
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(values.shape[1],) * 2))[0]
    for _ in range(iterations):
        left, _, right = np.linalg.svd(values.T @ np.where(values @ rotation >= 0, 1.0, -1.0))
        rotation = left @ right
    return rotation
