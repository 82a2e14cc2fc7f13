"""What all methods of hashing share: codes, Hamming search with and without hash tables, plain faiss files."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cbir.errors import ArtifactError, DataError
from cbir.index.dense import merge_partitions, write_index
from cbir.index.flat import Flat
from cbir.index.hashing import HashingSpec
from cbir.index.itq import Itq
from cbir.index.lsh import Lsh
from cbir.index.spectral_hash import SpectralHash
from cbir.types import FeatureBatch, Hits

BITS, NUM = 32, 900


def clustered(num: int, seed: int) -> FeatureBatch:
    centres = np.random.default_rng(5).normal(size=(30, 40))
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(0, 30, num)] + 0.4 * rng.normal(size=(num, 40))
    ids = np.random.default_rng(seed).permutation(num).astype(np.int64) * 3 + 10**15
    return FeatureBatch.of_global(ids, rows.astype(np.float32))


@pytest.fixture(scope="module", params=[Lsh, Itq, SpectralHash])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def spec(method):
    return method(bits=BITS)


@pytest.fixture(scope="module")
def index(spec):
    return spec.train(clustered(1000, 1), 3)


@pytest.fixture(scope="module")
def batch():
    return clustered(NUM, 2)


@pytest.fixture(scope="module")
def queries():
    return clustered(40, 3)


def codes_of(index: Any, batch: FeatureBatch) -> np.ndarray:
    return np.frombuffer(b"".join(index.entries(batch)["code"].to_pylist()), np.uint8).reshape(len(batch), -1)


def hamming(index: Any, queries: FeatureBatch, batch: FeatureBatch) -> np.ndarray:
    differ = codes_of(index, queries)[:, None] ^ codes_of(index, batch)
    return np.unpackbits(differ, axis=2).sum(2)


def with_tables(spec: HashingSpec, index: Any, tables: int, flips: int) -> Any:
    return spec.model_copy(update={"tables": tables, "flips": flips}).restore(index.state())


def test_the_search_is_brute_force_by_hamming_distance_and_id(spec, index, batch, queries):
    """Distances are small whole numbers, so that most places of a ranking are ties."""
    distances = hamming(index, queries, batch)
    expected = Hits.ranked(np.broadcast_to(batch.image_ids, distances.shape), spec.scores()[distances], NUM)
    partition = index.build(index.entries(batch))
    for depth in (1, 10, 300, NUM):
        hits = partition.search(queries, depth)
        np.testing.assert_array_equal(hits.image_ids, expected.image_ids[:, :depth])
        np.testing.assert_array_equal(hits.scores, expected.scores[:, :depth])


def test_scores_fall_with_the_distance(method):
    for bits in (8, 64, 4096):
        scores = method(bits=bits).scores()
        assert scores.shape == (bits + 1,)
        assert scores.dtype == np.float32
        assert (np.diff(scores) < 0).all()


def test_partitions_never_show_among_ties(index, batch, queries):
    whole = index.build(index.entries(batch)).search(queries, 25)
    parts = [index.build(index.entries(batch.take(np.arange(start, NUM, 6)))) for start in range(6)]
    merged = Hits.merge([part.search(queries, 25) for part in parts], 25)
    np.testing.assert_array_equal(merged.image_ids, whole.image_ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)


@pytest.mark.parametrize(("tables", "flips"), [(4, 0), (4, 1), (2, 2), (8, 1)])
def test_hash_tables_find_every_code_within_their_reach(spec, index, batch, queries, tables, flips):
    """Norouzi et al. 2012: of codes that differ in fewer bits than tables (flips + 1), a part differs in at most
    `flips`; nothing that is found is ranked otherwise than by the exhaustive search."""
    hashed = with_tables(spec, index, tables, flips)
    hits = hashed.build(hashed.entries(batch)).search(queries, NUM)
    whole = index.build(index.entries(batch)).search(queries, NUM)
    distances = hamming(index, queries, batch)
    for number, row in enumerate(hits.image_ids):
        found = row[row >= 0]
        reach = batch.image_ids[distances[number] < tables * (flips + 1)]
        assert np.isin(reach, found).all()
        kept = np.isin(whole.image_ids[number], found)
        np.testing.assert_array_equal(found, whole.image_ids[number][kept])
        np.testing.assert_array_equal(hits.scores[number][row >= 0], whole.scores[number][kept])
    assert (hits.image_ids < 0).any(), "this must not be an exhaustive search"


def test_hash_tables_with_all_flips_are_the_exhaustive_search(spec, index, batch, queries):
    hashed = with_tables(spec, index, 4, 99)
    for depth in (5, NUM):
        hits = hashed.build(hashed.entries(batch)).search(queries, depth)
        whole = index.build(index.entries(batch)).search(queries, depth)
        np.testing.assert_array_equal(hits.image_ids, whole.image_ids)
        np.testing.assert_array_equal(hits.scores, whole.scores)


def test_hash_tables_answer_alike_in_partitions_and_threads(spec, index, batch, queries):
    hashed = with_tables(spec, index, 4, 1)
    partition = hashed.build(hashed.entries(batch))
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: partition.search(queries, 10), range(8))
    parts = [hashed.build(hashed.entries(batch.take(np.arange(start, NUM, 5)))) for start in range(5)]
    for hits in (*others, Hits.merge([part.search(queries, 10) for part in parts], 10)):
        np.testing.assert_array_equal(hits.image_ids, first.image_ids)
        np.testing.assert_array_equal(hits.scores, first.scores)


def test_the_file_does_not_depend_on_the_tables(spec, index, batch, tmp_path):
    hashed = with_tables(spec, index, 4, 1)
    for each, name in ((index, "plain"), (hashed, "tables")):
        partition = each.build(each.entries(batch))
        partition.search(batch.take(np.arange(3)), 3)
        partition.save(tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "tables").read_bytes()


def test_the_file_opens_without_cbir(index, batch, queries, tmp_path):
    """faiss makes the same bits of the queries and finds the same distances."""
    partition = index.build(index.entries(batch))
    partition.save(tmp_path / "part.faiss")
    queries.descriptors.tofile(tmp_path / "queries")
    code = (
        "import faiss, numpy, sys; index = faiss.read_index(sys.argv[1]); "
        "x = numpy.fromfile(sys.argv[2], numpy.float32).reshape(-1, 40); print(index.search(x, 9)[0].tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part.faiss"), str(tmp_path / "queries")]
    found = np.array(eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    expected = np.sort(hamming(index, queries, batch), axis=1)[:, :9]
    assert (found == expected).mean() > 0.99, "float32 may take a value near a threshold for another bit"


def test_merged_partitions_are_the_whole_to_the_byte(spec, index, batch, tmp_path):
    index.build(index.entries(batch)).save(tmp_path / "whole")
    for number in range(3):
        index.build(index.entries(batch.take(np.arange(number, NUM, 3)))).save(tmp_path / f"{number}")
    write_index(merge_partitions([spec.load(tmp_path / f"{number}") for number in range(3)]), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_large_batch_has_the_codes_of_single_images(index):
    """So many that BLAS would multiply in blocks."""
    many = clustered(5000, 8)
    codes = codes_of(index, many)
    for number in (0, 1, 4095, 4096, 4999):
        np.testing.assert_array_equal(codes_of(index, many.take(np.array([number])))[0], codes[number])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 12}, "multiple of 8"),
        ({"bits": 8192}, "4096"),
        ({"tables": 5}, "tables: 5 parts do not divide 32 bits"),
        ({"bits": 256, "tables": 4}, "tables: 4 parts of 64 bits are too long.*at least 8"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(method, fields, message):
    with pytest.raises(ValidationError, match=message):
        method(**{"bits": BITS, **fields})


def test_refuses_the_file_of_another_index_and_a_sample_without_dimensions(spec, tmp_path):
    batch = clustered(3, 0)
    Flat().train(batch, 0).build(Flat().train(batch, 0).entries(batch)).save(tmp_path / "flat.faiss")
    with pytest.raises(ArtifactError, match=r"flat\.faiss: holds a faiss IndexIDMap, expected an Index"):
        spec.load(tmp_path / "flat.faiss")
    with pytest.raises(DataError, match="D > 0"):
        spec.train(FeatureBatch.of_global(np.empty(0, np.int64), np.empty((0, 0), np.float32)), 0)
