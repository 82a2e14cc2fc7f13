"""The published files open with plain libraries: every test reads them in a process that imports nothing of ours."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cbir
from cbir.artifacts import find_done
from cbir.config import parse_config
from cbir.storage import open_store
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.run import Run


@dataclass(frozen=True)
class Built:
    """Where the plain files of a small version lie, by role, and what stands in them according to this library."""

    files: dict[str, list[str]]
    keys: dict[int, str]
    query: np.ndarray[Any, Any]
    answers: list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def built(
    settings: Callable[..., dict[str, Any]], pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    root = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: 3)
        index(parse_config(settings(store=str(root)), "the test"))
    store = open_store(str(root))
    manifest = Versions(store).load()
    files: dict[str, list[str]] = {}
    for part in manifest.layout["partitions"]:
        files.setdefault("index", []).append(str(root / part["indexes"]["local"][0]))
        files.setdefault("features", []).append(str(root / part["features"]["local"]))
        files.setdefault("ids", []).append(str(root / part["ids"]))
        files.setdefault("quarantine", []).append(str(root / part["quarantine"]))
    for prefix in manifest.work:
        done = find_done(store, *prefix.split("/")[1:3])
        assert done is not None
        for file in done.files:
            files.setdefault(f"{done.stage} {file.role}", []).append(str(root / file.key))
    searcher = cbir.open(str(root))
    queries = searcher.encoder.encode(searcher.encoder.extract([pictures["object2/view1.jpg"]], [None]))
    hits = [partition.indexes["local"].search(queries["local"], 5) for partition in searcher.partitions]
    answers = [(hit.image_ids[0].tolist(), hit.scores[0].tolist()) for hit in hits]
    return Built(files, searcher.keys(), queries["local"].descriptors, answers)


def run_plain(script: str, tmp_path: Path, **values: Any) -> Any:
    """What a script of a user prints as JSON; `values` are its variables. It must not have imported any of ours."""
    (tmp_path / "values.json").write_text(json.dumps(values))
    guard = "assert not {name for name in sys.modules if name.split('.')[0] in ('cbir', 'pipelines')}\n"
    whole = f"import json, sys\nglobals().update(json.load(open('values.json')))\n{script}\n{guard}"
    done = subprocess.run(
        [sys.executable, "-c", whole], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_partitions_open_with_faiss_and_find_the_right_ids(built: Built, tmp_path: Path) -> None:
    found = run_plain(
        """
import faiss, numpy as np
answers = []
for path in paths:
    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    scores, ids = index.search(np.array(query, np.float32), 5)
    answers.append((ids[0].tolist(), scores[0].tolist()))
print(json.dumps(answers))
""",
        tmp_path,
        paths=built.files["index"],
        query=built.query.tolist(),
        mapped=True,
    )
    for (ids, scores), (expected_ids, expected_scores) in zip(found, built.answers, strict=True):
        assert ids == expected_ids
        assert np.allclose(scores, expected_scores, atol=1e-5)


def test_id_maps_open_with_pyarrow_pandas_and_duckdb(built: Built, tmp_path: Path) -> None:
    found = run_plain(
        """
import duckdb, pandas, pyarrow as pa
def with_pyarrow(path):
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    return list(zip(table["image_id"].to_pylist(), table["key"].to_pylist()))
def with_pandas(path):
    frame = pandas.read_feather(path)
    return list(zip(frame["image_id"].tolist(), frame["key"].tolist()))
def with_duckdb(path):
    ids = pa.ipc.open_file(path).read_all()
    return duckdb.sql("select image_id, key from ids order by image_id").fetchall()
print(json.dumps([sum((read(path) for path in paths), []) for read in (with_pyarrow, with_pandas, with_duckdb)]))
""",
        tmp_path,
        paths=built.files["ids"],
    )
    for pairs in found:
        assert dict(pairs) == built.keys
        assert len(pairs) == len(built.keys)


def test_features_are_a_numpy_one_liner_away(built: Built, tmp_path: Path) -> None:
    """Of the Parquet of a shard with pyarrow, pandas and DuckDB, and of the Arrow file of a partition."""
    found = run_plain(
        """
import duckdb, numpy as np, pandas, pyarrow as pa, pyarrow.parquet as pq
def of(rows, metadata):
    dtype, dim = metadata[b"dtype"].decode(), int(metadata[b"dim"])
    sums = {}
    for row in rows:
        values = np.frombuffer(row["descriptors"], dtype).reshape(-1, dim)
        places = np.frombuffer(row["geometry"], np.float32).reshape(-1, int(metadata[b"geometry_columns"]))
        assert len(values) == len(places) == row["num_features"]
        sums[str(row["image_id"])] = [len(values), int(values.sum()), round(float(places[:, :2].max()), 2)]
    return sums
ways = [{}, {}, {}, {}]
for path in shards:
    metadata = pq.read_schema(path).metadata
    ways[0].update(of(pq.read_table(path).to_pylist(), metadata))
    ways[1].update(of(pandas.read_parquet(path).to_dict("records"), metadata))
    ways[2].update(of(duckdb.sql(f"from '{path}'").df().to_dict("records"), metadata))
for path in partitions:
    table = pa.ipc.open_file(path).read_all()
    ways[3].update(of(table.to_pylist(), table.schema.metadata))
print(json.dumps(ways))
""",
        tmp_path,
        shards=built.files["extract features"],
        partitions=built.files["features"],
    )
    assert {int(image) for image in found[0]} == set(built.keys)
    assert found[0] == found[1] == found[2] == found[3]
    assert all(0 < count <= 60 and 0 < furthest < 160 for count, _, furthest in found[0].values())


def test_the_ledger_opens_with_pandas_and_duckdb(built: Built, tmp_path: Path) -> None:
    found = run_plain(
        """
import duckdb, pandas
frames = pandas.concat([pandas.read_parquet(path) for path in paths])
asked = duckdb.sql("select key, reason from read_parquet(" + str(paths) + ") order by key").fetchall()
print(json.dumps([sorted(zip(frames["key"], frames["reason"])), asked]))
""",
        tmp_path,
        paths=built.files["quarantine"],
    )
    assert found[0] == found[1]
    assert [key for key, _ in found[0]] == ["broken/cut.jpg", "broken/text.jpg"]
    assert dict(found[0])["broken/text.jpg"] == "not_an_image"


def test_entries_and_states_open_too(built: Built, tmp_path: Path) -> None:
    found = run_plain(
        """
import pandas
from safetensors.numpy import load_file
rows = sum(len(pandas.read_parquet(path)) for path in entries)
print(json.dumps([rows, [sorted(array.shape) for array in load_file(codebook).values()]]))
""",
        tmp_path,
        entries=built.files["build entries"],
        codebook=built.files["train encoder-1"][0],
    )
    assert found[0] == len(built.keys)
    assert [8, 128] in found[1]
