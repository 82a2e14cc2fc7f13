"""Random hyperplanes: the probability that two vectors share a bit."""

import numpy as np
import pytest

from cbir.index.lsh import Lsh
from cbir.types import FeatureBatch


def pairs(angle: float, num: int, dim: int) -> FeatureBatch:
    """Pairs of vectors of any length at an angle in radians: rows 2i and 2i + 1."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(num, dim))
    other = rng.normal(size=(num, dim))
    other -= left * ((left * other).sum(1) / (left * left).sum(1))[:, None]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, other)]
    right = np.cos(angle) * unit[0] + np.sin(angle) * unit[1]
    rows = np.stack([unit[0], 3 * right], axis=1).reshape(-1, dim)
    return FeatureBatch.of_global(np.arange(2 * num, dtype=np.int64), rows.astype(np.float32))


@pytest.mark.parametrize("bits", [64, 512])
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, np.pi / 2, 2.5, np.pi])
def test_a_bit_is_shared_with_probability_one_minus_the_angle_over_pi(angle, bits):
    batch, common = pairs(angle, 60, 64), []
    for seed in range(5):
        index = Lsh(bits=bits).train(batch, seed)
        codes = np.frombuffer(b"".join(index.entries(batch)["code"].to_pylist()), np.uint8).reshape(60, 2, -1)
        common.append(1 - np.unpackbits(codes[:, 0] ^ codes[:, 1], axis=1).mean())
    assert np.mean(common) == pytest.approx(1 - angle / np.pi, abs=0.01)


def test_the_score_estimates_the_cosine():
    for angle in (0.3, 1.0, 2.0):
        batch = pairs(angle, 40, 64)
        index = Lsh(bits=1024).train(batch, 0)
        partition = index.build(index.entries(batch.take(np.arange(1, 80, 2))))
        hits = partition.search(batch.take(np.arange(0, 80, 2)), 40)
        partner = hits.image_ids == np.arange(1, 80, 2)[:, None]
        assert hits.scores[partner].mean() == pytest.approx(np.cos(angle), abs=0.02)


def test_near_vectors_collide_more_often_than_far_ones():
    """The definition of a locality-sensitive family: P1 > P2 for angles below and above."""
    chances = [np.exp(np.log1p(-angle / np.pi) * 8) for angle in (0.5, 1.2)]
    found = []
    for angle in (0.5, 1.2):
        batch, same = pairs(angle, 300, 32), []
        for seed in range(6):
            codes = Lsh(bits=8).train(batch, seed).entries(batch)["code"].to_pylist()
            same += [left == right for left, right in zip(codes[::2], codes[1::2], strict=True)]
        found.append(np.mean(same))
    np.testing.assert_allclose(found, chances, atol=0.06)
    assert found[0] > found[1] + 0.1


def test_rows_of_the_projection_are_orthonormal_and_random():
    batch = pairs(1.0, 5, 64)
    first, second = (Lsh(bits=64).train(batch, seed).state()["projection"] for seed in (1, 2))
    np.testing.assert_allclose(first @ first.T, np.eye(64), atol=1e-5)
    assert not np.allclose(first, second)
    assert not Lsh(bits=64).trained
