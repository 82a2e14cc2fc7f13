import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic import ValidationError

from cbir.encoding.normalise import L2, Power, l2_normalised, signed_power
from cbir.types import FeatureBatch

rows = arrays(np.float32, array_shapes(min_dims=2, max_dims=2), elements=st.floats(-(2.0**60), 2.0**60, width=32))


def encode(spec, descriptors):
    batch = FeatureBatch.of_global(np.arange(len(descriptors)), descriptors)
    return spec.fit(batch, 0).encode(batch).descriptors


@given(rows)
def test_l2_gives_unit_vectors_of_the_same_direction(descriptors):
    encoded = encode(L2(), descriptors)
    norms = np.linalg.norm(descriptors.astype(np.float64), axis=1)
    long = norms > 1e-12
    np.testing.assert_allclose(np.linalg.norm(encoded[long], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(encoded[long], descriptors[long] / norms[long, None], rtol=1e-6, atol=1e-37)


def test_l2_keeps_zero_and_survives_the_largest_and_smallest_floats():
    extremes = np.array([[0, 0], [3e38, 3e38], [3e-45, 0]], np.float32)
    encoded = encode(L2(), extremes)
    np.testing.assert_array_equal(encoded[0], [0, 0])
    np.testing.assert_allclose(encoded[1], np.sqrt([0.5, 0.5]), rtol=1e-6)
    assert 0 < encoded[2, 0] < 1e-30


@given(rows, st.sampled_from([0.2, 0.5, 0.75, 1.0]))
def test_power_is_undone_by_its_inverse(descriptors, alpha):
    encoded = encode(Power(alpha=alpha), descriptors).astype(np.float64)
    np.testing.assert_allclose(np.sign(encoded) * np.abs(encoded) ** (1 / alpha), descriptors, rtol=1e-5, atol=1e-37)


def test_power_one_is_the_identity_and_zero_stays_zero():
    descriptors = np.array([[0, -4, 9], [0, 0, 0]], np.float32)
    np.testing.assert_array_equal(encode(Power(alpha=1), descriptors), descriptors)
    np.testing.assert_array_equal(encode(Power(), descriptors), [[0, -2, 3], [0, 0, 0]])


@pytest.mark.parametrize("alpha", [0, -0.5, 1.5, float("nan")])
def test_power_refuses_an_exponent_outside_its_range(alpha):
    with pytest.raises(ValidationError, match="alpha"):
        Power(alpha=alpha)


def test_more_rows_than_one_block():
    descriptors = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)
    np.testing.assert_array_equal(encode(L2(), descriptors), l2_normalised(descriptors).astype(np.float32))


def test_normalisation_works_along_the_last_axis():
    blocks = np.random.default_rng(0).normal(size=(4, 5, 6))
    np.testing.assert_allclose(np.linalg.norm(l2_normalised(blocks), axis=-1), np.ones((4, 5)))
    assert signed_power(blocks, 0.5).shape == (4, 5, 6)
