"""Locally optimised product quantisation against its formula, OPQ, and plain faiss."""

from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from cbir.errors import ArtifactError, ConfigError, DataError
from cbir.index.dense import exact_search, merge_partitions
from cbir.index.index import Index
from cbir.index.ivfpq import IvfPq
from cbir.index.lopq import Lopq, LopqPartition, local_rotations, parametric_rotation, rotated
from cbir.types import FeatureBatch, Floats, Hits
from tests.index.test_pq import assert_ties_by_id
from tests.index.vectors import assert_same, one_each, scores_by_image, words_of

LISTS = 8


def small(**fields: Any) -> Lopq:
    return Lopq(**{"lists": LISTS, "probes": LISTS, "bytes": 8, "bits": 5, "iterations": 5, **fields})


def decoded(index: Index, entries: pa.Table, bits: int) -> Floats:
    """What entries say: the centroid, and the words turned back by the rotation of the list."""
    state, lists = index.state(), entries["list"].to_numpy()
    words = words_of(entries, len(state["codebooks"]), bits)
    residuals = np.concatenate([book[words[:, part]] for part, book in enumerate(state["codebooks"])], axis=1)
    return state["centroids"][lists] + np.einsum("nij,ni->nj", state["rotations"][lists], residuals)


def crossed(num: int, seed: int) -> FeatureBatch:
    """Four clusters in 32 dimensions, each stretched along eight axes of its own."""
    shape = np.random.default_rng(5)
    centres = 8 * shape.normal(size=(4, 32))
    axes = np.linalg.qr(shape.normal(size=(4, 32, 32)))[0] * np.where(np.arange(32) < 8, 2, 0.2)
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, 4, num)
    rows = centres[cluster] + np.einsum("nij,nj->ni", axes[cluster], rng.normal(size=(num, 32)))
    return FeatureBatch.of_global(np.arange(num), rows.astype(np.float32))


@pytest.fixture(scope="module")
def sample():
    return one_each(800, 1)


@pytest.fixture(scope="module")
def base():
    return one_each(300, 2)


@pytest.fixture(scope="module")
def queries():
    return one_each(30, 3)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_score_is_that_of_the_decoded_vector(metric, sample, base, queries):
    index = small(metric=metric).train(sample, 3)
    entries = index.entries(base)
    stored = decoded(index, entries, 5)
    assert ((stored - base.descriptors) ** 2).sum(1).mean() < 0.2 * base.descriptors.var(0).sum()
    rows, stored = queries.descriptors, stored[np.argsort(base.image_ids)]
    expected = rows @ stored.T if metric == "ip" else -((rows[:, None] - stored) ** 2).sum(2)
    np.testing.assert_allclose(
        scores_by_image(index.build(entries).search(queries, 300)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_with_one_list_and_its_rotation_it_is_opq(metric, sample, base, queries):
    opq = IvfPq(lists=1, probes=1, bytes=8, bits=5, iterations=5, opq=True, metric=metric).train(sample, 3)
    state = opq.state()
    back = state["centroids"] @ state["rotation"]
    own = {"centroids": back, "rotations": state["rotation"][None], "codebooks": state["codebooks"]}
    local = small(lists=1, metric=metric).restore(own)
    entries, expected = local.entries(base), opq.entries(base)
    assert entries["code"].equals(expected["code"])
    hits, theirs = (each.build(expected).search(queries, 300) for each in (local, opq))
    np.testing.assert_allclose(scores_by_image(hits), scores_by_image(theirs), rtol=1e-5, atol=1e-5)


def test_with_one_list_it_is_trained_as_parametric_opq(sample):
    state = small(lists=1).train(sample, 3).state()
    residuals = sample.descriptors.astype(np.float64) - state["centroids"]
    expected = parametric_rotation(residuals.T @ residuals, 8)
    np.testing.assert_allclose(state["rotations"][0], expected, atol=1e-5)


def test_few_probes_look_into_the_nearest_lists_only(sample, base, queries):
    index = small(probes=2).train(sample, 3)
    entries = index.entries(base)
    every = scores_by_image(small().restore(index.state()).build(entries).search(queries, 300))
    nearest = np.argsort(-queries.descriptors @ index.state()["centroids"].T, axis=1)[:, :2]
    hits = index.build(entries).search(queries, 300)
    lists, ids = entries["list"].to_numpy(), np.sort(base.image_ids)
    list_of = lists[np.argsort(base.image_ids)]
    for row, near in enumerate(nearest):
        found = hits.image_ids[row][hits.image_ids[row] >= 0]
        np.testing.assert_array_equal(np.sort(found), ids[np.isin(list_of, near)])
        np.testing.assert_array_equal(hits.scores[row, : len(found)], every[row, np.searchsorted(ids, found)])


def test_axes_are_dealt_so_that_the_variances_of_parts_have_equal_products():
    """Ge et al. 2013, section 3.3: 1, 2, ... 2^15 go to four parts of four."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    covariance = axes * 2.0 ** rng.permutation(16) @ axes.T
    rotation = parametric_rotation(covariance, 4).astype(np.float64)
    turned = rotation @ covariance @ rotation.T
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=0.01)
    exponents = np.log2(np.diag(turned)).round().reshape(4, 4)
    assert sorted(exponents.ravel()) == list(range(16))
    assert exponents[:, 0].tolist() == [15, 14, 13, 12]
    assert set(exponents.sum(1)) == {30}


def test_rotations_are_orthogonal_and_their_products_exact(sample):
    rotations = small().train(sample, 3).state()["rotations"]
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(32), (LISTS, 1, 1)), atol=1e-6)
    np.testing.assert_array_equal(rotations * 2.0**24 % 1, 0)
    rows, lists = sample.descriptors, np.arange(800) % LISTS
    order = np.random.default_rng(0).permutation(32)
    permuted = rotated(rows[:, order], lists, rotations[:, :, order])
    np.testing.assert_array_equal(rotated(rows, lists, rotations), permuted)
    expected = np.einsum("nij,nj->ni", rotations[lists].astype(np.float64), rows)
    np.testing.assert_allclose(permuted, expected, atol=1e-7)


def test_lists_with_few_sample_vectors_lean_on_all_others():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(4000, 8)) * [8, 7, 6, 5, 4, 3, 2, 1]).astype(np.float32)
    lists = np.where(np.arange(4000) < 3, 1, 0)
    rotations = local_rotations(rows, lists, 3, 2)
    np.testing.assert_array_equal(rotations[2], parametric_rotation(rows.T.astype(np.float64) @ rows, 2))
    covariances = rotations.astype(np.float64) @ np.cov(rows.T) @ rotations.transpose(0, 2, 1)
    spread = [np.sort(np.diag(covariance)) for covariance in covariances]
    np.testing.assert_allclose(spread[0], spread[2], rtol=1e-3)
    np.testing.assert_allclose(spread[1], spread[2], rtol=0.6)


def test_lists_with_axes_of_their_own_are_coded_better_than_by_one_rotation():
    sample, base, queries = crossed(2000, 1), crossed(3000, 2), crossed(100, 3)
    fields: dict[str, Any] = {"lists": 4, "probes": 4, "bytes": 4, "bits": 6, "iterations": 8, "metric": "l2"}
    exact, found = exact_search(queries, base, "l2", 10), []
    for spec in (IvfPq(**fields), IvfPq(**fields, opq=True), Lopq(**fields)):
        index = spec.train(sample, 3)
        hits = index.build(index.entries(base)).search(queries, 10)
        found.append(np.mean([np.isin(*pair).mean() for pair in zip(hits.image_ids, exact.image_ids, strict=True)]))
    assert found[2] > found[0] + 0.1
    assert found[2] > found[1] + 0.1


@pytest.mark.parametrize("fields", [{"coarse": "hnsw", "lists": 30}, {"coarse": "imi", "lists": 64, "metric": "l2"}])
def test_lists_may_be_found_in_other_ways(fields, sample, base, queries, tmp_path):
    spec = small(**fields, probes=12)
    index = spec.train(sample, 3)
    whole = index.build(index.entries(base))
    parts = [index.build(index.entries(base.take(np.arange(start, 300, 3)))) for start in range(3)]
    assert_same(Hits.merge([part.search(queries, 10) for part in parts], 10), whole.search(queries, 10))
    whole.save(tmp_path / "part")
    assert_same(spec.load(tmp_path / "part").search(queries, 10), whole.search(queries, 10))
    own = whole.search(base, 3).image_ids
    assert np.mean([image in row for image, row in zip(base.image_ids, own, strict=True)]) > 0.9


def test_ties_are_in_the_order_of_ids(sample, base, queries):
    index = small().train(sample, 3)
    repeated = base.take(np.tile(np.arange(16), 30))
    database = FeatureBatch.of_global(np.random.default_rng(0).permutation(480), repeated.descriptors)
    assert_ties_by_id(index.build(index.entries(database)).search(queries, 50))


@pytest.fixture
def saved(sample, base, tmp_path):
    index = small().train(sample, 3)
    path = tmp_path / "part.faiss"
    index.build(index.entries(base)).save(path)
    return index, path


def test_the_file_is_a_faiss_index_and_mapped_rotations(saved, base):
    index, path = saved
    plain = faiss.read_index(str(path))
    assert isinstance(plain, faiss.IndexIVFPQ)
    assert plain.ntotal == 300
    loaded = small().load(path)
    assert isinstance(loaded, LopqPartition)
    mapped = loaded.quantisers.code.state()["rotations"]
    assert isinstance(mapped.base, np.memmap)
    np.testing.assert_array_equal(mapped, index.state()["rotations"])
    order = [(name, "ascending") for name in ("image_id", "list")]
    assert loaded.entries().sort_by(order).equals(index.entries(base).sort_by(order))


def test_it_never_becomes_an_index_that_faiss_would_search_wrongly(saved):
    with pytest.raises(ConfigError, match="lopq cannot"):
        merge_partitions([small().load(saved[1])])


def test_a_partition_without_its_rotations_is_refused(saved, sample, base, tmp_path):
    spec = IvfPq(lists=LISTS, bytes=8, bits=5)
    index = spec.train(sample, 3)
    index.build(index.entries(base)).save(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"other: not a whole partition of lopq: its rotations are missing"):
        small().load(tmp_path / "other")
    (tmp_path / "flat").write_bytes(faiss.serialize_index(faiss.IndexFlatL2(3)).tobytes())
    with pytest.raises(ArtifactError, match=r"flat: holds a faiss IndexFlatL2, expected an IndexIVFPQ"):
        small().load(tmp_path / "flat")


@pytest.mark.parametrize(
    ("fields", "num", "message"),
    [
        ({"bytes": 12}, 300, r"bytes: 12 .* D = 32; set a divisor of D, for example bytes: 8"),
        ({"bits": 8}, 255, r"bits: 8 bits.*at least 256.*found 255.*flat"),
        ({"lists": 64}, 60, r"lists: 64 lists need a sample of at least 64 vectors, found 60"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_with_a_remedy(fields, num, message):
    with pytest.raises(DataError, match=message):
        small(**fields).train(one_each(num, 0), 0)
