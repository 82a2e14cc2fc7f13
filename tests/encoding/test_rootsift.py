import numpy as np

from cbir.encoding.rootsift import RootSift
from cbir.types import FeatureBatch


def encode(descriptors):
    batch = FeatureBatch.of_global(np.arange(len(descriptors)), descriptors)
    return RootSift().fit(batch, 0).encode(batch).descriptors


def histograms(seed, dtype=np.float32):
    return np.random.default_rng(seed).gamma(0.5, 40, (50, 128)).clip(0, 255).astype(dtype)


def test_the_inner_product_is_the_hellinger_kernel():
    a, b = histograms(0), histograms(1)
    p, q = a / a.sum(axis=1, keepdims=True), b / b.sum(axis=1, keepdims=True)
    hellinger = np.sqrt(p * q).sum(axis=1)
    left, right = encode(a), encode(b)
    np.testing.assert_allclose((left * right).sum(axis=1), hellinger, rtol=1e-5)
    np.testing.assert_allclose(((left - right) ** 2).sum(axis=1), 2 - 2 * hellinger, rtol=1e-5)


def test_rows_are_unit_vectors():
    np.testing.assert_allclose(np.linalg.norm(encode(histograms(2)), axis=1), 1, rtol=1e-6)


def test_uint8_is_the_same_as_float32():
    np.testing.assert_array_equal(encode(histograms(3, np.uint8)), encode(histograms(3, np.uint8).astype(np.float32)))


def test_a_patch_without_gradient_stays_zero():
    np.testing.assert_array_equal(encode(np.zeros((1, 128), np.uint8)), np.zeros((1, 128)))


def test_the_scale_of_a_descriptor_does_not_matter():
    np.testing.assert_allclose(encode(histograms(4) * 512), encode(histograms(4)), rtol=1e-6)


def test_negative_components_keep_their_sign():
    np.testing.assert_allclose(encode(np.array([[-1, 3]], np.float32)), [[-0.5, np.sqrt(0.75)]])
