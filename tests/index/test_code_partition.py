"""Partitions of short codes: plain entries, and files that stay on the disk."""

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cbir.index  # noqa: F401 - registers the indexes
from cbir.errors import DataError
from cbir.index.code_partition import code_entries
from cbir.spec import methods
from cbir.types import FeatureBatch

FORMS: dict[str, dict[str, Any]] = {"pq": {"bytes": 32}, "lsh": {"bits": 256}, "spectral_hash": {"bits": 256}}
NUM, BYTES, DIM = 400_000, 32, 32


@pytest.fixture(scope="module", params=list(FORMS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def index(name):
    rows = np.random.default_rng(0).normal(size=(300, DIM)).astype(np.float32)
    return methods("index")[name](**FORMS[name]).train(FeatureBatch.of_global(np.arange(300), rows), 0)


def random_codes(num: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, BYTES), np.uint8)


def test_a_mapped_partition_stays_on_the_disk(name, index, tmp_path):
    """Anonymous memory after opening and searching 12 MB of codes: nothing but 3 MB of ids may have been read."""
    index.build(code_entries(np.arange(NUM), random_codes(NUM, 0), "random")).save(tmp_path / "part")
    code = (
        "import sys, pathlib, numpy, cbir.index\n"
        "from cbir.spec import methods; from cbir.types import FeatureBatch\n"
        "def anonymous():\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
        "query = FeatureBatch.of_global(numpy.array([1]), numpy.ones((1, 32), numpy.float32)); before = anonymous()\n"
        f"part = methods('index')['{name}'](**{FORMS[name]}).load(pathlib.Path(sys.argv[1]))\n"
        "part.search(query, 5); print(anonymous() - before)"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", code, str(tmp_path / "part")]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 5_000


def test_entries_of_a_partition_are_those_it_was_built_from_by_image_and_code(index):
    ids, codes = np.array([9, 2, 9, 5]), random_codes(4, 1)
    codes[[0, 2]] = np.sort(codes[[0, 2]], axis=0)[::-1]
    found = index.build(code_entries(ids, codes, "random")).entries()
    assert found["image_id"].to_pylist() == [2, 5, 9, 9]
    assert found["code"].to_pylist() == [codes[number].tobytes() for number in (1, 3, 2, 0)]
    assert found.schema.field("code").type == pa.binary(BYTES)
    assert found.schema.metadata[b"bytes"] == b"32"
    assert found.schema.metadata[b"code"] != b"random"


def test_codes_of_another_size_are_refused(index):
    with pytest.raises(DataError, match=r"fixed_size_binary\[31\].*stores 32 bytes"):
        index.build(code_entries(np.arange(2), random_codes(2, 0)[:, :31], "random"))
