import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbir.encoding.product import ReproducibleProduct
from cbir.errors import DataError


@pytest.mark.parametrize(("dim", "outputs"), [(1, 1), (3, 2), (37, 5), (128, 64), (2048, 96)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_is_the_product_as_exact_as_float32_would_be(dim, outputs, scale):
    rng = np.random.default_rng(dim)
    rows = (rng.normal(size=(70, dim)) * scale).astype(np.float32)
    matrix = rng.normal(size=(outputs, dim)).astype(np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)[:, None] * np.linalg.norm(matrix, axis=1)
    exact = rows.astype(np.float64) @ matrix.T.astype(np.float64)
    assert (np.abs(ReproducibleProduct(matrix)(rows) - exact) <= 2.0**-26 * np.sqrt(dim) * norms).all()
    assert (np.abs(ReproducibleProduct(matrix)(rows) - exact) / norms).mean() < 2e-8


def test_whole_numbers_are_multiplied_exactly():
    rng = np.random.default_rng(0)
    rows, matrix = rng.integers(0, 256, (300, 128), np.uint8), rng.integers(-255, 256, (64, 128))
    np.testing.assert_array_equal(ReproducibleProduct(matrix)(rows), rows.astype(np.int64) @ matrix.T)


def test_the_order_of_the_terms_does_not_show():
    rng = np.random.default_rng(1)
    rows, matrix = rng.normal(size=(40, 500)), rng.normal(size=(30, 500))
    order = np.argsort(np.abs(rows).sum(axis=0))
    # A product of float64 does show it, or this test would prove nothing.
    assert ((rows @ matrix.T) != (rows[:, order] @ matrix[:, order].T)).any()
    np.testing.assert_array_equal(
        ReproducibleProduct(matrix)(rows), ReproducibleProduct(matrix[:, order])(rows[:, order])
    )


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 20), st.integers(1, 600), st.data())
def test_a_row_gives_the_same_bits_in_every_batch(seed, dim, outputs, count, data):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(count, dim)) * 10.0 ** rng.integers(-20, 20, (count, 1))).astype(np.float32)
    product = ReproducibleProduct(rng.normal(size=(outputs, dim)))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    assert product(rows[start:stop]).tobytes() == product(rows)[start:stop].tobytes()


def test_zero_rows_and_no_rows():
    product = ReproducibleProduct(np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(product(np.zeros((2, 4), np.float32)), np.zeros((2, 3)))
    assert product(np.empty((0, 4), np.float32)).shape == (0, 3)


def test_another_dimension_is_refused():
    with pytest.raises(DataError, match="D = 5, but the encoder was trained on D = 4"):
        ReproducibleProduct(np.ones((3, 4)))(np.ones((1, 5)))


DIGEST = """
import hashlib, numpy as np
from cbir.encoding.product import ReproducibleProduct
rng = np.random.default_rng(3)
rows, matrix = rng.normal(size=(300, 100)).astype("f4"), rng.normal(size=(37, 100)).astype("f4")
print(hashlib.sha256(ReproducibleProduct(matrix)(rows).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("kernels", ["Haswell", "Prescott"])
def test_other_processors_give_the_same_bits(kernels):
    """OPENBLAS_CORETYPE makes OpenBLAS use the kernels of another processor; another BLAS ignores it."""
    rng = np.random.default_rng(3)
    rows, matrix = rng.normal(size=(300, 100)).astype(np.float32), rng.normal(size=(37, 100)).astype(np.float32)
    here = hashlib.sha256(ReproducibleProduct(matrix)(rows).tobytes()).hexdigest()
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", DIGEST]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert there == here
