"""Spectral hashing: waves along principal directions."""

import faiss
import numpy as np
import pytest

from cbir.errors import DataError
from cbir.index.spectral_hash import SpectralHash
from cbir.types import FeatureBatch, Floats

SIDES = np.array([8.0, 5.0, 3.1, 1.0])


def box(num: int, seed: int) -> FeatureBatch:
    """Vectors spread evenly over a box that is turned and lies far from the origin."""
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(4, 4)))[0]
    rows = (np.random.default_rng(seed).uniform(size=(num, 4)) - 0.5) * SIDES @ turn + 30
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64), rows.astype(np.float32))


def bits_of(index, batch: FeatureBatch) -> Floats:
    codes = np.frombuffer(b"".join(index.entries(batch)["code"].to_pylist()), np.uint8).reshape(len(batch), -1)
    return np.unpackbits(codes, axis=1, bitorder="little").astype(np.float32)


def test_bits_are_balanced_and_hardly_correlated_on_a_box():
    """Weiss et al. 2009, problem 1: the sum of a bit is 0, and bits do not correlate. (The waves j and 3 j of one
    direction are orthogonal, but their signs have a correlation of 1/3.)"""
    batch = box(6000, 1)
    signs = 2 * bits_of(SpectralHash(bits=8).train(batch, 0), batch) - 1
    np.testing.assert_allclose(signs.mean(0), 0, atol=0.06)
    correlations = np.abs(signs.T @ signs / len(signs)) - np.eye(8)
    np.testing.assert_allclose(correlations[:4, :4], 0, atol=0.08)
    assert correlations.max() < 0.4


def test_bits_are_the_signs_of_the_longest_waves():
    """The analytical eigenfunctions sin(π / 2 + j π (y - a) / (b - a)) with the smallest (j / (b - a))^2."""
    batch = box(4000, 1)
    index = SpectralHash(bits=8).train(batch, 0)
    centred = batch.descriptors - batch.descriptors.mean(0, dtype=np.float64)
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    places = centred @ vectors[:, np.argsort(-variances)]
    low, high = places.min(0), places.max(0)
    waves = sorted((j / (high[i] - low[i]), i, j) for i in range(4) for j in range(1, 9))[:8]
    assert {(0, 1), (1, 1), (0, 2), (2, 1), (0, 3), (1, 2)} <= {(i, j) for _, i, j in waves}
    expected = np.stack(
        [np.sin(np.pi / 2 + j * np.pi * (places[:, i] - low[i]) / (high[i] - low[i])) < 0 for _, i, j in waves], axis=1
    )
    agree = (bits_of(index, batch) == expected).mean(0)
    # Which end of a direction is the low one is a matter of sign; odd waves change with it.
    assert (np.maximum(agree, 1 - agree) > 0.998).all()


def test_near_vectors_have_near_codes():
    batch = box(3000, 1)
    bits = bits_of(SpectralHash(bits=16).train(batch, 0), batch)
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 3000, (2, 4000))
    distances = np.linalg.norm(batch.descriptors[left] - batch.descriptors[right], axis=1)
    differ = np.abs(bits[left] - bits[right]).sum(1)
    near = distances < np.quantile(distances, 0.05)
    assert differ[near].mean() < 0.6 * differ.mean()


def test_directions_without_spread_carry_no_bits():
    rows = np.zeros((500, 6), np.float32)
    rows[:, 2] = np.random.default_rng(0).uniform(size=500)
    batch = FeatureBatch.of_global(np.arange(500), rows)
    index = SpectralHash(bits=8).train(batch, 0)
    projection = np.abs(index.state()["projection"])
    assert np.isfinite(projection).all()
    assert (projection[:, 2] > 0.9).all()
    assert (np.delete(projection, 2, axis=1) < 1e-3).all()
    assert len(np.unique(bits_of(index, batch), axis=0)) >= 8, "a scale of 8 waves tells 9 places apart"


def test_a_partition_is_the_index_of_faiss():
    batch = box(300, 1)
    index = SpectralHash(bits=8).train(batch, 0)
    partition = index.build(index.entries(batch))
    assert isinstance(partition.faiss, faiss.IndexIVFSpectralHash)
    assert partition.faiss.ntotal == 300
    codes = np.zeros((300, 1), np.uint8)
    lists = np.zeros(300, np.int64)
    partition.faiss.encode_vectors(300, *(faiss.swig_ptr(array) for array in (batch.descriptors, lists, codes)))
    own = bits_of(index, batch)
    assert (np.unpackbits(codes, axis=1, bitorder="little") == own).mean() > 0.999


def test_a_sample_that_tells_nothing_is_refused():
    one = box(1, 0)
    with pytest.raises(DataError, match="at least 2 vectors, found 1"):
        SpectralHash(bits=8).train(one, 0)
    with pytest.raises(DataError, match="all rows of the sample are equal"):
        SpectralHash(bits=8).train(one.take(np.zeros(9, np.int64)), 0)
