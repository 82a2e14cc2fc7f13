"""Matrix products whose bits do not depend on the batch, on the order of summation or on the machine.

A BLAS product may give one and the same row other bits at another place of the batch, in a batch of another size or on
another processor (OpenBLAS's AVX2 kernels do all three). An encoder built on it would give an image other bytes after
re-sharding, and near-ties would choose another word. Here the operands are first rounded to fixed point, so that every
product and every partial sum is an exact float64 and no order of summation can matter (the idea of the error-free
transformations of Ozaki et al. 2012). The result is about as exact as a float32 product and costs
two to four times as much.
"""

import numpy as np
import numpy.typing as npt

from cbir.errors import DataError
from cbir.types import Array, Float64s

__all__ = ["ReproducibleProduct", "check_dim", "fixed_point"]


BITS = 26
"""By Cauchy and Schwarz no partial sum of two rows of norm <= 2**26 exceeds 2**52, and float64 counts to 2**53."""

BLOCK = 256
"""Rows at a time: bounds the memory and keeps a block in the cache."""


class ReproducibleProduct:
    """Multiplication with a fixed matrix (M, D).

    Rounding to 26 bits under each row's norm errs by at most 2**-26 sqrt(D) of the two norms' product, typically by
    1e-8 of it. DataError if the rows have another D than the matrix.
    """

    def __init__(self, matrix: Array) -> None:
        fixed, exponents = fixed_point(matrix)
        self._transposed, self._scales = fixed.T, np.ldexp(1.0, exponents)

    def __call__(self, rows: Array) -> Float64s:
        """rows (n, D) @ matrix.T -> (n, M)."""
        self.check(rows)
        products = np.empty((len(rows), self._transposed.shape[1]))
        for start in range(0, len(rows), BLOCK):
            block = products[start : start + BLOCK]
            fixed, exponents = fixed_point(rows[start : start + BLOCK])
            np.matmul(fixed, self._transposed, out=block)
            block *= np.ldexp(1.0, exponents)[:, None]
            block *= self._scales
        return products

    def check(self, rows: Array) -> None:
        """DataError if the rows have another D than the matrix."""
        check_dim(rows, len(self._transposed))


def check_dim(rows: Array, dim: int) -> None:
    """DataError if the rows (n, D) have another D than an encoder was trained on."""
    if rows.shape[1] != dim:
        raise DataError(
            f"these features have D = {rows.shape[1]}, but the encoder was trained on D = {dim}; "
            "train it again, or use the extractor and the encoders that it was trained with"
        )


def fixed_point(rows: Array) -> tuple[Float64s, npt.NDArray[np.int32]]:
    """Whole numbers (n, D) of norm up to 2**BITS and exponents (n,), such that rows ~ numbers * 2**exponents."""
    fixed = rows.astype(np.float64)
    norms = np.sqrt(np.add.reduce(fixed * fixed, axis=1))
    exponents = np.frexp(norms)[1] - BITS
    fixed *= np.ldexp(1.0, -exponents)[:, None]
    return np.rint(fixed, out=fixed), exponents
