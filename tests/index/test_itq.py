"""Iterative quantisation: what its rotation is for."""

import faiss
import numpy as np
import pytest

from cbir.encoding.pca import principal_components
from cbir.errors import DataError
from cbir.index.dense import exact_search
from cbir.index.itq import Itq
from cbir.index.lsh import Lsh
from cbir.types import FeatureBatch, Floats


def skewed(num: int, seed: int, dim: int = 48) -> FeatureBatch:
    """Falling variances, far from the origin."""
    mixing = np.random.default_rng(5).normal(size=(dim, dim)) * np.linspace(2, 0.1, dim)[:, None]
    rows = np.random.default_rng(seed).normal(size=(num, dim)) @ mixing + 20
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64), rows.astype(np.float32))


def error(values: Floats) -> float:
    """The squared distance to the nearest corner of the cube, per row."""
    return float(((np.where(values >= 0, 1, -1) - values) ** 2).sum(1).mean())


def test_its_rotation_brings_principal_components_nearest_to_the_cube():
    """Gong et al. 2013, equation 2: less error than any of many random rotations, by the projection as stored."""
    sample = skewed(1500, 1)
    index = Itq(bits=16).train(sample, 3)
    projection, offsets = index.state()["projection"], index.state()["offsets"]
    found = error(sample.descriptors @ projection.T + offsets)
    mean, components, _ = principal_components(sample.descriptors, 16)
    centred = (sample.descriptors - mean) @ components.T
    rng = np.random.default_rng(0)
    turned = [error(centred @ np.linalg.qr(rng.normal(size=(16, 16)))[0]) for _ in range(50)]
    assert found < min(turned)
    assert found < error(centred)
    np.testing.assert_allclose(projection @ projection.T, np.eye(16), atol=1e-4)
    np.testing.assert_allclose(projection @ components.T @ components, projection, atol=1e-4)


def test_every_turn_helps():
    sample = skewed(1500, 1)
    errors = []
    for iterations in (1, 2, 3, 4, 6, 9, 14, 20, 50):
        state = Itq(bits=16, iterations=iterations).train(sample, 3).state()
        errors.append(error(sample.descriptors @ state["projection"].T + state["offsets"]))
    assert (np.diff(errors) < 0).all()


def test_it_comes_nearer_to_the_cube_than_faiss():
    """faiss 1.15's `ITQMatrix` leaves the optimum that it is started from."""
    sample = skewed(1500, 1)
    state = Itq(bits=16).train(sample, 3).state()
    mean, components, _ = principal_components(sample.descriptors, 16)
    centred = ((sample.descriptors - mean) @ components.T).astype(np.float32)
    rotation = faiss.ITQMatrix(16)
    rotation.train(centred)
    assert error(sample.descriptors @ state["projection"].T + state["offsets"]) < error(rotation.apply(centred))


def test_half_of_the_sample_has_each_bit():
    sample = skewed(3000, 1)
    codes = Itq(bits=32).train(sample, 3).entries(sample)["code"].to_pylist()
    bits = np.unpackbits(np.frombuffer(b"".join(codes), np.uint8).reshape(3000, -1), axis=1)
    np.testing.assert_allclose(bits.mean(0), 0.5, atol=0.05)


def test_it_finds_more_than_random_hyperplanes():
    base, queries = skewed(3000, 1), skewed(100, 2)
    exact, found = exact_search(queries, base, "l2", 10), {}
    for spec in (Itq(bits=32), Lsh(bits=32)):
        index = spec.train(base, 1)
        hits = index.build(index.entries(base)).search(queries, 50)
        pairs = zip(exact.image_ids, hits.image_ids, strict=True)
        found[spec.name] = np.mean([np.isin(best, some).mean() for best, some in pairs])
    assert found["itq"] > found["lsh"] + 0.1


def test_another_seed_gives_another_rotation():
    sample = skewed(300, 1)
    assert not np.allclose(*(Itq(bits=16).train(sample, seed).state()["projection"] for seed in (1, 2)))


@pytest.mark.parametrize(("num", "most"), [(300, 48), (30, 29), (0, 0)])
def test_more_bits_than_components_are_refused_with_a_remedy(num, most):
    with pytest.raises(DataError, match=rf"bits: 56 .* at most {most}; set fewer bits.*lsh"):
        Itq(bits=56).train(skewed(num, 0), 0)
