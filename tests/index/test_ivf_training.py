"""How the lists of inverted files are trained: in rounds over a sample that lies in several places."""

from typing import Any

import faiss
import numpy as np
import pytest

from cbir.errors import DataError
from cbir.index.index import Index
from cbir.index.ivf import InvertedFile
from cbir.index.ivfaq import IvfAq
from cbir.index.ivfflat import IvfFlat
from cbir.index.ivfpq import IvfPq
from cbir.index.ivfrabitq import IvfRabitq
from cbir.types import FeatureBatch, Floats, State

DIM = 16


def sample(num: int, seed: int = 1) -> FeatureBatch:
    rng, centres = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(80, DIM))
    rows = centres[rng.integers(0, 80, num)] + 0.4 * rng.normal(size=(num, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64), rows.astype(np.float32))


def in_shards(spec: InvertedFile, batch: FeatureBatch, shards: int) -> Index:
    """Trained as by several workers, which add up what their parts of the sample say."""
    codebook = spec.train_codebook(batch, 3)
    parts = np.array_split(np.random.default_rng(shards).permutation(len(batch)), shards)
    for number in range(1, spec.codebook_rounds + 1):
        found = [spec.codebook_sums(codebook, batch.take(part)) for part in parts]
        totals = {name: sum((sums[name] for sums in found[1:]), found[0][name]) for name in found[0]}
        codebook = spec.next_codebook(codebook, totals, last=number == spec.codebook_rounds)
    return spec.finish(codebook, batch, 3)


def as_bytes(state: State) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.items()}


FAMILIES: dict[str, InvertedFile] = {
    "ip": IvfFlat(lists=1024, code="float16"),
    "opq": IvfPq(bytes=4, bits=4, opq=True, metric="l2", refine="sq8"),
    "graph": IvfPq(bytes=4, bits=4, coarse="hnsw"),
    "additive": IvfAq(bytes=2, bits=4, iterations=3),
    "rotated": IvfRabitq(),
    "few": IvfFlat(lists=12),
    "pairs": IvfPq(bytes=4, bits=4, coarse="imi", lists=64, metric="l2"),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_how_the_sample_is_divided_never_shows(family: str) -> None:
    spec, batch = FAMILIES[family], sample(2500)
    assert (spec.codebook_rounds > 1) == (family not in {"few", "pairs"})
    whole = spec.train(batch, 3)
    assert as_bytes(in_shards(spec, batch, 5).state()) == as_bytes(whole.state())


def test_many_lists_found_approximately_do_not_depend_on_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbir.index.lists.EXACT_LISTS", 100)
    spec, batch = IvfFlat(lists=1200, metric="l2"), sample(3000)
    assert as_bytes(in_shards(spec, batch, 4).state()) == as_bytes(spec.train(batch, 3).state())


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_round_is_one_of_lloyd(rounds: int) -> None:
    spec, batch = IvfFlat(metric="l2", iterations=rounds), sample(1500)
    codebook = spec.train_codebook(batch, 0)
    before = codebook["centroids"]
    rows = batch.descriptors.astype(np.float64)
    nearest = ((rows[:, None] - before) ** 2).sum(2).argmin(1)
    means = np.stack([rows[nearest == number].mean(0) for number in range(len(before))])
    after = spec.next_codebook(codebook, spec.codebook_sums(codebook, batch), last=True)["centroids"]
    np.testing.assert_allclose(after, means, atol=1e-5)
    assert spec.codebook_rounds == rounds


def test_centroids_for_inner_products_have_unit_length_and_those_for_distances_are_means() -> None:
    """Spherical k-means, as faiss trains for inner products; long vectors count no more than short ones."""
    batch = sample(1500)
    long = batch.with_descriptors(batch.descriptors * np.linspace(1, 900, 1500, dtype=np.float32)[:, None])
    found = [IvfFlat(lists=20).train(each, 0).state()["centroids"] for each in (batch, long)]
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    shorter = IvfFlat(lists=20, metric="l2").train(batch, 0).state()["centroids"]
    assert (np.linalg.norm(shorter, axis=1) < 0.99).all()


def recall(centroids: Floats, batch: FeatureBatch, queries: Floats, metric: int) -> float:
    """Of the ten nearest vectors, how many lie in the two nearest lists."""
    quantiser = faiss.IndexFlat(DIM, metric)
    quantiser.add(centroids)
    lists = quantiser.search(batch.descriptors, 1)[1][:, 0]
    probed = quantiser.search(queries, 2)[1]
    nearest = faiss.knn(queries, batch.descriptors, 10, metric)[1]
    return float(np.mean((lists[nearest][:, :, None] == probed[:, None]).any(2)))


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_lists_are_as_good_as_those_of_faiss(metric: Any) -> None:
    batch, queries = sample(8000), sample(400, 2).descriptors
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    spec = IvfFlat(lists=100, metric=metric, iterations=10)
    kmeans = faiss.Kmeans(DIM, 100, niter=10, seed=1, spherical=metric == "ip")
    kmeans.train(batch.descriptors)
    theirs = recall(np.array(kmeans.centroids), batch, queries, kind)
    assert recall(spec.train(batch, 1).state()["centroids"], batch, queries, kind) > theirs - 0.02
    in_rounds = IvfFlat(metric=metric, iterations=10)  # the sample decides for 128 lists
    assert recall(in_rounds.train(batch, 1).state()["centroids"], batch, queries, kind) > theirs - 0.05


def test_what_does_not_change_the_lists_shares_them() -> None:
    plain = IvfPq(lists=8).codebook_identity()
    assert IvfPq(lists=8, bytes=4, probes=3, refine="sq8", coarse="hnsw").codebook_identity() == plain
    assert IvfFlat(lists=8, code="sq8").codebook_identity() == plain
    others = [
        IvfPq(lists=9),
        IvfPq(lists=8, metric="l2"),
        IvfPq(lists=8, iterations=3),
        IvfPq(lists=8, opq=True),
        IvfPq(lists=8, opq=True, bytes=4),
        IvfRabitq(lists=8),
        IvfPq(lists=16, coarse="imi", metric="l2"),
    ]
    identities = [spec.codebook_identity() for spec in others]
    assert plain not in identities
    assert all(identities.count(each) == 1 for each in identities)


def test_shared_lists_that_do_not_fit_a_code_are_refused() -> None:
    batch = sample(100)
    codebook = IvfFlat(lists=4).train_codebook(batch, 0)
    with pytest.raises(DataError, match=r"bytes: 5 parts do not divide vectors of D = 16"):
        IvfPq(lists=4, bytes=5, bits=4).finish(codebook, batch, 0)
    with pytest.raises(DataError, match=r"bits: 8 bits need a sample of at least 256 vectors, found 100"):
        IvfPq(lists=4, bytes=4).finish(codebook, batch, 0)


def test_a_part_without_vectors_adds_nothing() -> None:
    spec, batch = IvfRabitq(lists=1024), sample(1300)
    codebook = spec.train_codebook(batch, 0)
    sums = spec.codebook_sums(codebook, batch.take(np.empty(0, np.int64)))
    assert not any(array.any() for array in sums.values())
    assert sums["sums"].shape == codebook["centroids"].shape
