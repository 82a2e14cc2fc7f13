"""The inverted file with product codes against its formula, plain faiss, and real SIFT vectors."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from cbir.errors import ArtifactError, DataError
from cbir.index.coarse import FlatCoarse
from cbir.index.codes import inverted_file
from cbir.index.dense import code_column, exact_search, merge_partitions, write_index
from cbir.index.flat import Flat
from cbir.index.ivf import choose_lists
from cbir.index.ivfpq import IvfPq
from cbir.types import FeatureBatch, Hits
from tests.index.vectors import scores_by_image

DIM, LISTS = 32, 12


def clustered(num: int, seed: int, dim: int = DIM) -> FeatureBatch:
    centres = np.random.default_rng(5).normal(size=(LISTS, dim))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, LISTS, num)] + 0.6 * rng.normal(size=(num, dim)) * np.linspace(2, 0.1, dim)
    return FeatureBatch.of_global(np.arange(num, dtype=np.int64) * 7 + 10**15, rows.astype(np.float32))


def small(**fields: Any) -> IvfPq:
    return IvfPq(**{"lists": LISTS, "bytes": 8, "bits": 5, "iterations": 8, **fields})


MULTI_INDEX = {"coarse": "imi", "metric": "l2", "lists": 16}
FORMS = {
    "ip": {},
    "l2": {"metric": "l2"},
    "8 bits": {"bits": 8},
    "opq": {"opq": True, "metric": "l2"},
    "opq to 16": {"opq": True, "opq_dim": 16, "bits": 4},
    "hnsw": {"coarse": "hnsw"},
    "multi-index": MULTI_INDEX,
}


@pytest.fixture(scope="module", params=list(FORMS))
def spec(request):
    return small(**FORMS[request.param])


@pytest.fixture(scope="module")
def index(spec):
    return spec.train(clustered(1500, 1), 3)


@pytest.fixture(scope="module")
def batch():
    return clustered(700, 2)


@pytest.fixture(scope="module")
def queries():
    return clustered(25, 3)


def with_probes(spec: IvfPq, index, probes: int):
    return spec.model_copy(update={"probes": probes}).restore(index.state())


def test_all_lists_probed_is_the_distance_to_what_the_code_says(spec, index, batch, queries):
    """Jégou et al. 2011: the score of x is that of c(x) + decode(code of x - c(x)), for the exact query."""
    state, entries = index.state(), index.entries(batch)
    lists = entries["list"].to_numpy()
    packed = np.frombuffer(b"".join(entries["code"].to_pylist()), np.uint8).reshape(len(lists), -1)
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(lists), -1, spec.bits)[:, :8]
    words = np.packbits(bits, axis=2, bitorder="little")[:, :, 0]
    decoded = np.concatenate([book[words[:, part]] for part, book in enumerate(state["codebooks"])], axis=1)
    stored = index.quantisers.coarse.centroids_of(lists) + decoded
    rotated = queries.descriptors @ state.get("rotation", np.eye(DIM, dtype=np.float32)).T
    distances = ((rotated[:, None] - stored) ** 2).sum(2)
    scores = rotated @ stored.T if spec.metric == "ip" else -distances
    hits = with_probes(spec, index, 16).build(entries).search(queries, 700)
    np.testing.assert_allclose(scores_by_image(hits), scores[:, np.argsort(batch.image_ids)], rtol=1e-4, atol=1e-4)


def test_shards_together_are_a_plain_faiss_index(spec, index, batch, queries, tmp_path):
    write_index(index.build(index.entries(batch.take(np.empty(0, np.int64)))).faiss, tmp_path / "trained")
    plain = faiss.read_index(str(tmp_path / "trained"))
    plain.add_with_ids(batch.descriptors, batch.image_ids)
    for probes in range(1, LISTS + 1):
        probing = with_probes(spec, index, probes)
        whole = probing.build(probing.entries(batch)).search(queries, 20)
        shards = [batch.take(np.arange(number, 700, 5)) for number in range(5)]
        parts = [probing.build(probing.entries(shard)).search(queries, 20) for shard in shards]
        merged = Hits.merge(parts, 20)
        np.testing.assert_array_equal(merged.image_ids, whole.image_ids)
        np.testing.assert_array_equal(merged.scores, whole.scores)
        inverted_file(plain).nprobe = probes
        distances, ids = plain.search(queries.descriptors, 20)
        expected = Hits.ranked(ids, distances if spec.metric == "ip" else -distances, 20)
        np.testing.assert_allclose(whole.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert (whole.image_ids == expected.image_ids).mean() > 0.99, "rounding may swap near-ties"


def test_codes_and_lists_are_those_of_faiss(index, batch):
    entries = index.entries(batch)
    ivf = inverted_file(index.empty.faiss)
    rows = index.quantisers.rotate(batch.descriptors)
    lists = ivf.quantizer.search(rows, 1)[1][:, 0]
    np.testing.assert_array_equal(entries["list"].to_numpy(), lists)
    codes = ivf.pq.compute_codes(rows - index.quantisers.coarse.centroids_of(lists))
    assert b"".join(entries["code"].to_pylist()) == codes.tobytes()


def test_partitions_merge_to_the_whole_to_the_byte(spec, index, batch, tmp_path):
    index.build(index.entries(batch)).save(tmp_path / "whole")
    for number in range(3):
        index.build(index.entries(batch.take(np.arange(number, 700, 3)))).save(tmp_path / f"{number}")
    parts = [spec.load(tmp_path / f"{number}") for number in range(3)]
    write_index(merge_partitions(parts), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_file_opens_without_cbir(index, batch, queries, tmp_path):
    partition = index.build(index.entries(batch))
    partition.save(tmp_path / "part.faiss")
    queries.descriptors.tofile(tmp_path / "queries")
    code = (
        "import faiss, numpy, sys; index = faiss.read_index(sys.argv[1]); "
        "x = numpy.fromfile(sys.argv[2], numpy.float32).reshape(-1, 32); print(index.search(x, 1)[1].ravel().tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part.faiss"), str(tmp_path / "queries")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(partition.search(queries, 1).image_ids.ravel().tolist())


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_scores_do_not_depend_on_how_many_queries_are_asked(metric):
    """The rotation is a matrix product, whose last bits depend on the batch."""
    base, queries = clustered(800, 1, 96), clustered(1400, 2, 96)
    index = small(metric=metric, opq=True, iterations=2).train(base, 3)
    partition = index.build(index.entries(base))
    together = partition.search(queries, 9)
    for number in range(100):
        alone = partition.search(queries.take(np.array([number])), 9)
        np.testing.assert_array_equal(alone.image_ids[0], together.image_ids[number])
        np.testing.assert_array_equal(alone.scores[0], together.scores[number])


def test_threads_share_a_partition(index, batch, queries):
    partition = index.build(index.entries(batch))
    alone = partition.search(queries, 9)
    with ThreadPoolExecutor(4) as pool:
        for hits in pool.map(lambda _: partition.search(queries, 9), range(24)):
            np.testing.assert_array_equal(hits.image_ids, alone.image_ids)
            np.testing.assert_array_equal(hits.scores, alone.scores)


def test_the_rotation_is_orthogonal_and_pays():
    sample = clustered(1500, 1)
    trained = {opq: small(opq=opq, lists=1, metric="l2").train(sample, 3) for opq in (False, True)}
    rotation = trained[True].state()["rotation"]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(DIM), atol=1e-4)
    own = {opq: index.build(index.entries(sample)).search(sample, 1500) for opq, index in trained.items()}
    at_self = {opq: hits.scores[hits.image_ids == sample.image_ids[:, None]].mean() for opq, hits in own.items()}
    assert at_self[True] > 0.95 * at_self[False], "scores are negative squared errors"


def test_polysemous_training_only_renames_the_codes(queries):
    sample = clustered(600, 1)
    plain, renamed = (small(polysemous=flag, bits=4).train(sample, 3) for flag in (False, True))
    found = [each.build(each.entries(sample)).search(queries, 600) for each in (plain, renamed)]
    assert not np.array_equal(plain.state()["codebooks"], renamed.state()["codebooks"])
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-5, atol=1e-5)


def test_polysemous_training_makes_hamming_distances_imitate_distances():
    """Douze et al. 2016: the correlation of both over all pairs of words of a part rises."""
    sample, correlations = clustered(600, 1), {}
    bits = np.unpackbits(np.arange(16, dtype=np.uint8)[:, None], axis=1)
    hamming = (bits[:, None] != bits).sum(2).ravel()
    for flag in (False, True):
        books = small(polysemous=flag, bits=4).train(sample, 3).state()["codebooks"]
        distances = ((books[:, :, None] - books[:, None]) ** 2).sum(3).reshape(len(books), -1)
        correlations[flag] = np.mean([np.corrcoef(part, hamming)[0, 1] for part in distances])
    assert correlations[True] > correlations[False] + 0.1


def test_another_seed_gives_another_index():
    sample = clustered(600, 1)
    assert not np.array_equal(*(small().train(sample, seed).state()["centroids"] for seed in (1, 2)))
    assert not np.array_equal(*(small(lists=1).train(sample, seed).state()["codebooks"] for seed in (1, 2)))


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_which_lists_are_probed_does_not_depend_on_the_batch(metric):
    """Groups of four centroids closer than float32 can resolve, of which two fall beyond the last probe."""
    rng = np.random.default_rng(0)
    centroids = (np.repeat(rng.normal(size=(20, 96)), 4, axis=0) + 1e-7 * rng.normal(size=(80, 96))).astype(np.float32)
    rows = rng.normal(size=(1400, 96)).astype(np.float32)
    coarse = FlatCoarse(centroids, metric)
    lists, to_lists = coarse.nearest_lists(rows, 6)
    left, right = rows.astype(np.float64), centroids.astype(np.float64)
    distances = left @ right.T if metric == "ip" else ((left[:, None] - right) ** 2).sum(2)
    order = np.argsort(-distances if metric == "ip" else distances, axis=1, kind="stable")[:, :6]
    np.testing.assert_allclose(to_lists, np.take_along_axis(distances, order, 1), rtol=1e-6)
    assert (lists == order).mean() > 0.9999
    for number in range(100):
        np.testing.assert_array_equal(coarse.nearest_lists(rows[number : number + 1], 6)[0][0], lists[number])


@pytest.mark.parametrize(
    ("num", "lists"), [(16, 1), (77, 1), (78, 2), (256, 4), (1000, 16), (10_000, 256), (65_536, 1024), (250_000, 2048)]
)
def test_the_sample_decides_how_many_lists(num, lists):
    assert choose_lists(num) == lists
    index = IvfPq(bytes=1, bits=4, iterations=1).train(clustered(num, 0, 2), 0) if num <= 1000 else None
    assert index is None or len(index.state()["centroids"]) == lists


@pytest.mark.parametrize(
    ("fields", "num", "message"),
    [
        ({"lists": 400}, 300, r"lists: 400 lists.*at least 400.*found 300.*flat"),
        ({"lists": 2, "bits": 8}, 255, r"bits: 8 bits.*at least 256.*found 255.*flat"),
        ({"bits": 4, "lists": None}, 0, r"bits: 4 bits.*found 0"),
        ({"bytes": 12}, 300, r"bytes: 12 .* D = 32.*bytes: 8, or opq: true with opq_dim: 24"),
        ({"bytes": 64}, 300, r"bytes: 64 .* D = 32; set a divisor of D, for example bytes: 32$"),
        ({"opq": True, "opq_dim": 64}, 300, r"opq_dim: 64 .* D = 32"),
        ({**MULTI_INDEX, "lists": 4**9}, 300, r"lists: 262144 lists.*at least 512.*found 300"),
        (
            {"opq": True, "opq_dim": 9, "bytes": 9, "coarse": "imi", "metric": "l2", "lists": 4},
            300,
            r"imi.*D = 9 is odd",
        ),
        (
            {"fast_scan": True, "bits": 4, "bytes": 2},
            300,
            r"parts of 16 dim.*have 15: set a divisor of D from bytes: 4 on",
        ),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_with_a_remedy(fields, num, message):
    with pytest.raises(DataError, match=message):
        small(**fields).train(clustered(num, 0), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opq_dim": 16}, "opq: true"),
        ({"opq": True, "opq_dim": 20}, "multiple of bytes"),
        ({"bits": 9}, "bits"),
        ({"fast_scan": True}, "bits: 5; set bits: 4"),
        ({"coarse": "imi"}, "imi finds lists by Euclidean distance; set metric: l2"),
        ({"coarse": "imi", "metric": "l2"}, "lists: 12 are not all pairs.*for example 16"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        small(**fields)


def test_refuses_the_file_of_another_index(tmp_path):
    batch = clustered(3, 0)
    Flat().train(batch, 0).build(Flat().train(batch, 0).entries(batch)).save(tmp_path / "flat.faiss")
    with pytest.raises(ArtifactError, match=r"flat\.faiss.*IndexIDMap"):
        IvfPq().load(tmp_path / "flat.faiss")


def test_a_mapped_partition_stays_on_the_disk(tmp_path):
    """Anonymous memory after opening and searching 20 MB of codes in 64 lists, and 64 x 16 KiB tables left out."""
    index = IvfPq(lists=64, bytes=16, bits=8, iterations=1).train(clustered(600, 0), 0)
    rng, num = np.random.default_rng(0), 800_000
    codes = code_column(rng.integers(0, 256, (num, 16), np.uint8))
    lists = rng.integers(0, 64, num).astype(np.int32)
    index.build(pa.table({"image_id": np.arange(num), "list": lists, "code": codes})).save(tmp_path / "part")
    code = (
        "import sys, pathlib, numpy; from cbir.index.ivfpq import IvfPq; from cbir.types import FeatureBatch\n"
        "def anonymous():\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
        "query = FeatureBatch.of_global(numpy.array([1]), numpy.ones((1, 32), numpy.float32)); before = anonymous()\n"
        "part = IvfPq(probes=4).load(pathlib.Path(sys.argv[1])); part.search(query, 5); print(anonymous() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part")]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 5_000


@pytest.mark.parametrize("fields", [{}, {"metric": "l2", "opq": True}, {"bytes": 16}], ids=["ip", "opq l2", "16"])
def test_a_fast_scan_finds_what_tables_of_floats_find(fields, batch, queries):
    plain, fast = (small(bits=4, fast_scan=flag, probes=LISTS, **fields) for flag in (False, True))
    index = plain.train(clustered(1500, 1), 3)
    entries = index.entries(batch)
    assert fast.restore(index.state()).entries(batch).equals(entries)
    assert fast.train(clustered(1500, 1), 3).entries(batch).equals(entries)
    by_image = {}
    for spec in (plain, fast):
        hits = spec.restore(index.state()).build(entries).search(queries, 700)
        by_image[spec.fast_scan] = scores_by_image(hits)
    spread = by_image[False].max() - by_image[False].min()
    np.testing.assert_allclose(by_image[True], by_image[False], atol=spread / 50)
    assert not np.array_equal(by_image[True], by_image[False]), "tables have 8 bits"


def test_a_fast_scan_is_a_plain_faiss_file_that_gives_its_codes_back(batch, queries, tmp_path):
    spec = small(bits=4, bytes=16, fast_scan=True)
    index = spec.train(clustered(1500, 1), 3)
    entries = index.entries(batch)
    partition = index.build(entries)
    partition.save(tmp_path / "part.faiss")
    ids = faiss.read_index(str(tmp_path / "part.faiss")).search(queries.descriptors, 1)[1]
    np.testing.assert_array_equal(ids, partition.search(queries, 1).image_ids)
    opened = spec.load(tmp_path / "part.faiss")
    for _ in range(2):
        assert opened.entries().equals(entries.sort_by([("list", "ascending"), ("image_id", "ascending")]))
    with pytest.raises(ArtifactError, match="IndexIVFPQFastScan, expected an IndexIVFPQ"):
        small(bits=4).load(tmp_path / "part.faiss")


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_fast_scan_of_vectors_that_are_all_the_same_finds_them(metric):
    same = FeatureBatch.of_global(np.arange(60), np.ones((60, DIM), np.float32))
    index = small(bits=4, lists=2, fast_scan=True, metric=metric).train(same, 0)
    hits = index.build(index.entries(same)).search(same.take(np.arange(2)), 4)
    np.testing.assert_array_equal(hits.image_ids, [[0, 1, 2, 3]] * 2)
    np.testing.assert_allclose(hits.scores, DIM if metric == "ip" else 0, atol=1e-3)


def test_a_query_of_zeros_finds_all_alike_by_a_fast_scan(batch):
    index = small(bits=4, fast_scan=True, opq=True, probes=LISTS).train(clustered(1500, 1), 3)
    nothing = FeatureBatch.of_global(np.array([1]), np.zeros((1, DIM), np.float32))
    hits = index.build(index.entries(batch)).search(nothing, 4)
    np.testing.assert_array_equal(hits.image_ids, np.sort(batch.image_ids)[None, :4])
    assert (hits.scores == 0).all()


def test_with_one_list_an_inverted_file_is_a_product_quantiser_of_what_the_mean_leaves(batch, queries):
    index = small(lists=1, metric="l2").train(clustered(1500, 1), 3)
    pq = inverted_file(index.empty.faiss).pq
    mean = index.state()["centroids"]
    decoded = pq.decode(pq.compute_codes(batch.descriptors - mean)) + mean
    hits = index.build(index.entries(batch)).search(queries, 5)
    distances = faiss.knn(queries.descriptors, decoded, 5)[0]
    np.testing.assert_allclose(-hits.scores, distances, rtol=1e-4)


def recall(hits: Hits, exact: Hits, depth: int) -> float:
    rows = zip(hits.image_ids[:, :depth], exact.image_ids[:, :depth], strict=True)
    return float(np.mean([len(np.intersect1d(found, true)) / depth for found, true in rows]))


def sift(path: Path) -> FeatureBatch:
    rows = np.fromfile(path, np.uint8).reshape(-1, 132)[:, 4:]
    return FeatureBatch.of_global(np.arange(len(rows)), rows)


def test_recall_on_real_sift_vectors_rises_with_probes(test_data):
    base, query = (sift(test_data / "bigann10k" / f"{name}.bvecs") for name in ("base", "query"))
    spec = IvfPq(lists=64, bytes=16, metric="l2", iterations=8)
    index = spec.train(base, 1)
    entries, exact = index.entries(base), exact_search(query, base, "l2", 100)
    recalls = []
    for probes in (1, 2, 4, 8, 16, 32, 64):
        recalls.append(recall(with_probes(spec, index, probes).build(entries).search(query, 100), exact, 100))
    assert recalls == sorted(recalls)
    assert recalls[0] > 0.3
    assert recalls[-1] > 0.75
