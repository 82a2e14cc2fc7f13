"""The inverted file with whole vectors against exact search and plain faiss."""

import faiss
import numpy as np
import pytest

from cbir.errors import ArtifactError, DataError
from cbir.index.codes import inverted_file
from cbir.index.dense import exact_search, write_index
from cbir.index.ivfflat import IvfFlat
from cbir.types import FeatureBatch, Hits
from tests.index.vectors import assert_same, descriptors, one_each

LISTS = 20


def trained(**fields):
    spec = IvfFlat(**{"lists": LISTS, "probes": LISTS, **fields})
    return spec, spec.train(one_each(900, 1), 3)


@pytest.fixture(scope="module")
def regions():
    return descriptors([1, 4, 0, 2, 7] * 60, 2)


@pytest.fixture(scope="module")
def queries():
    return one_each(48, 3).take(np.arange(8, 48))  # without the zero vector, with which all are tied


def decoded(codes: np.ndarray, form: str, index) -> np.ndarray:
    if form != "sq8":
        return codes.view({"float32": "<f4", "float16": "<f2"}[form]).astype(np.float32)
    least, width = index.state()["ranges"]
    return least + (codes + np.float32(0.5)) / 255 * width


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_all_lists_probed_is_exact_to_the_bit(metric, regions, queries):
    _, index = trained(metric=metric)
    hits = index.build(index.entries(regions)).search(queries, 15)
    assert_same(hits, exact_search(queries, regions, metric, 15))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("form", ["float16", "sq8"])
def test_scores_are_those_of_the_decoded_vectors(form, metric, queries):
    base = one_each(300, 2)
    _, index = trained(metric=metric, code=form)
    entries = index.entries(base)
    codes = np.frombuffer(b"".join(entries["code"].to_pylist()), np.uint8).reshape(300, -1)
    vectors = decoded(codes, form, index)
    if form == "sq8":
        vectors = vectors + index.state()["centroids"][entries["list"].to_numpy()]
    assert np.abs(vectors - base.descriptors).max() < {"float16": 3e-4, "sq8": 0.3}[form]
    assert np.abs(vectors - base.descriptors).mean() < {"float16": 1e-4, "sq8": 2e-3}[form]
    hits = index.build(entries).search(queries, 20)
    exact = exact_search(queries, FeatureBatch.of_global(base.image_ids, vectors), metric, 20)
    np.testing.assert_allclose(hits.scores, exact.scores, rtol=1e-5, atol=1e-6)
    assert (hits.image_ids == exact.image_ids).mean() > 0.99, "rounding may swap near-ties"


@pytest.mark.parametrize("form", ["float32", "float16", "sq8"])
def test_shards_together_are_a_plain_faiss_index(form, queries, tmp_path):
    base = one_each(300, 2)
    spec, index = trained(code=form)
    write_index(index.empty.faiss, tmp_path / "trained")
    plain = faiss.read_index(str(tmp_path / "trained"))
    plain.add_with_ids(base.descriptors, base.image_ids)
    assert inverted_file(plain).code_size == spec.code_bytes(32)
    recalls = []
    exact = exact_search(queries, base, "ip", 10)
    for probes in range(1, LISTS + 1):
        probing = spec.model_copy(update={"probes": probes}).restore(index.state())
        shards = [probing.build(probing.entries(base.take(np.arange(number, 300, 4)))) for number in range(4)]
        merged = Hits.merge([shard.search(queries, 10) for shard in shards], 10)
        plain.nprobe = probes
        scores, ids = plain.search(queries.descriptors, 10)
        expected = Hits.ranked(ids, scores, 10)
        np.testing.assert_allclose(merged.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert (merged.image_ids == expected.image_ids).mean() > 0.99, "rounding may swap near-ties"
        recalls.append(np.mean([np.isin(*pair).mean() for pair in zip(exact.image_ids, merged.image_ids, strict=True)]))
    assert recalls[0] < recalls[4] <= recalls[-1]
    assert recalls[-1] > 0.95


def test_what_float16_cannot_hold_is_refused_with_a_remedy():
    index = IvfFlat(code="float16", lists=1).train(one_each(50, 1), 0)
    far = FeatureBatch.of_global(np.array([7]), np.full((1, 32), -7e4, np.float32))
    with pytest.raises(DataError, match=r"float16 holds values up to 65504, found 70000; set float32, or .* l2"):
        index.entries(far)


def test_refuses_a_file_of_another_format(tmp_path):
    base = one_each(50, 1)
    index = IvfFlat(lists=1).train(base, 0)
    index.build(index.entries(base)).save(tmp_path / "part")
    with pytest.raises(ArtifactError, match="holds a faiss IndexIVFFlat, expected an IndexIVFScalarQuantizer"):
        IvfFlat(code="float16").load(tmp_path / "part")


def test_another_seed_gives_another_index():
    states = [IvfFlat(lists=8).train(one_each(300, 1), seed).state() for seed in (1, 2)]
    assert not np.array_equal(states[0]["centroids"], states[1]["centroids"])
