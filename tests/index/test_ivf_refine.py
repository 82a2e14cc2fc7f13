"""Re-ranking by finer codes against exact search, plain faiss and real SIFT vectors."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from cbir.errors import ArtifactError
from cbir.index.dense import code_column, exact_search
from cbir.index.ivfpq import IvfPq
from cbir.types import FeatureBatch, Hits
from tests.index.test_ivfpq import recall, sift
from tests.index.vectors import DIM, assert_same, descriptors, one_each

LISTS = 12


def coarse_codes(**fields: Any) -> IvfPq:
    return IvfPq(**{"lists": LISTS, "probes": LISTS, "bytes": 4, "bits": 4, "refine": "float32", **fields})


@pytest.fixture(scope="module")
def sample():
    return one_each(700, 1)


@pytest.fixture(scope="module")
def regions():
    return descriptors([1, 4, 0, 2, 7] * 60, 2)


@pytest.fixture(scope="module")
def queries():
    return one_each(40, 3)


@pytest.mark.parametrize("fields", [{}, {"metric": "l2", "opq": True}, {"fast_scan": True}], ids=str)
def test_a_large_factor_and_floats_are_exact_to_the_bit(fields, sample, regions, queries):
    spec = coarse_codes(refine_factor=50, **fields)
    index = spec.train(sample, 3)
    hits = index.build(index.entries(regions)).search(queries, 6)
    assert_same(hits, exact_search(queries, regions, spec.metric, 6))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("form", ["float16", "sq8"])
def test_scores_are_those_of_the_finer_codes(form, metric, sample, queries):
    base = one_each(300, 2)
    index = coarse_codes(refine=form, metric=metric).train(sample, 3)
    entries = index.entries(base)
    codes = np.frombuffer(b"".join(entries["fine"].to_pylist()), np.uint8).reshape(300, -1)
    if form == "float16":
        vectors = codes.view("<f2").astype(np.float32)
    else:
        least, width = index.state()["refine_ranges"]
        vectors = least + (codes + np.float32(0.5)) / 255 * width
    assert np.abs(vectors - base.descriptors).max() < {"float16": 3e-4, "sq8": 0.3}[form]
    hits = index.build(entries).search(queries, 15)
    exact = exact_search(queries, FeatureBatch.of_global(base.image_ids, vectors), metric, 300)
    for row in range(40):
        expected = dict(zip(exact.image_ids[row].tolist(), exact.scores[row].tolist(), strict=True))
        scores = [expected[image] for image in hits.image_ids[row].tolist()]
        np.testing.assert_allclose(hits.scores[row], scores, rtol=1e-5, atol=1e-6)


def test_the_candidates_are_the_best_images_by_their_codes(sample, regions, queries):
    spec = coarse_codes(refine_factor=3)
    index = spec.train(sample, 3)
    hits = index.build(index.entries(regions)).search(queries, 5)
    plain = spec.model_copy(update={"refine": None}).restore(index.state())
    best = plain.build(plain.entries(regions)).search(queries, 15)
    exact = exact_search(queries, regions, "ip", 300)
    keep = [np.isin(ids, candidates) for ids, candidates in zip(exact.image_ids, best.image_ids, strict=True)]
    ids = np.array([row[kept][:5] for row, kept in zip(exact.image_ids, keep, strict=True)])
    np.testing.assert_array_equal(hits.image_ids, ids)


def test_the_file_opens_without_cbir_and_ranks_alike(sample, queries, tmp_path):
    base = one_each(300, 2)
    index = coarse_codes(refine="float16", refine_factor=8).train(sample, 3)
    partition = index.build(index.entries(base))
    partition.save(tmp_path / "part.faiss")
    plain = faiss.read_index(str(tmp_path / "part.faiss"))
    scores, ids = plain.search(queries.descriptors, 5)
    hits = partition.search(queries, 5)
    assert (ids == hits.image_ids).mean() > 0.95, "faiss cuts ties of codes as it likes"
    np.testing.assert_allclose(scores[ids == hits.image_ids], hits.scores[ids == hits.image_ids], atol=1e-5)


def test_refuses_a_file_without_finer_codes_and_the_other_way(sample, tmp_path):
    refined, plain = coarse_codes(), coarse_codes(refine=None)
    for name, spec in (("refined", refined), ("plain", plain)):
        index = spec.train(sample, 3)
        index.build(index.entries(sample)).save(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"plain: holds a faiss IndexIVFPQ, expected an IndexIDMap over Index"):
        refined.load(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"refined: holds a faiss IndexIDMap, expected an IndexIVFPQ"):
        plain.load(tmp_path / "refined")


def test_a_mapped_partition_stays_on_the_disk_but_for_ids(tmp_path):
    """Anonymous memory after opening and searching 200,000 vectors: 1.6 MB of ids of 11 MB in all."""
    num = 200_000
    spec = IvfPq(lists=64, probes=4, bytes=8, iterations=1, refine="sq8")
    index = spec.train(one_each(600, 0), 0)
    rng = np.random.default_rng(0)
    columns = {"image_id": np.arange(num), "list": rng.integers(0, 64, num).astype(np.int32)}
    for name, width in (("code", 8), ("fine", DIM)):
        columns[name] = code_column(rng.integers(0, 256, (num, width), np.uint8))
    index.build(pa.table(columns)).save(tmp_path / "part")
    code = (
        "import sys, pathlib, numpy; from cbir.index.ivfpq import IvfPq; from cbir.types import FeatureBatch\n"
        "def anonymous():\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
        "query = FeatureBatch.of_global(numpy.array([1]), numpy.ones((1, 32), numpy.float32)); before = anonymous()\n"
        "part = IvfPq(probes=4, refine='sq8').load(pathlib.Path(sys.argv[1])); part.search(query, 5)\n"
        "print(anonymous() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part")]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 6_000


def test_recall_on_real_sift_vectors_rises_with_the_factor(test_data: Path):
    base, query = (sift(test_data / "bigann10k" / f"{name}.bvecs") for name in ("base", "query"))
    spec = IvfPq(lists=16, probes=16, bytes=32, bits=4, fast_scan=True, metric="l2", iterations=8, refine="sq8")
    index, exact = spec.train(base, 1), exact_search(query, base, "l2", 10)
    entries, recalls = index.entries(base), []
    for factor in (1, 2, 4, 16):
        refined = spec.model_copy(update={"refine_factor": factor}).restore(index.state())
        hits: Hits = refined.build(entries).search(query, 10)
        recalls.append(recall(hits, exact, 10))
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.85
    assert recalls[-1] > 0.95
