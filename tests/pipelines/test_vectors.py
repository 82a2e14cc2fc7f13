"""Vectors that were made elsewhere, from Parquet to an index: read as they are, refused by row, or as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cbir
from cbir.config import parse_config
from cbir.errors import ConfigError, DataError
from cbir.layout import Layout
from cbir.storage import open_store
from cbir.types import FeatureBatch, Floats, image_id
from pipelines.estimates import estimate
from pipelines.indexing import extract, index

DIM = 16
NUM = 300

VECTORS: Floats = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float16).astype(np.float32)
VECTORS.flags.writeable = False
KEYS = [f"product/{number}" for number in range(NUM)]

FORMS = {
    "float16 binary": lambda rows: pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * DIM), len(rows), [None, pa.py_buffer(rows.astype(np.float16))]
    ),
    "variable binary": lambda rows: pa.array([row.tobytes() for row in rows.astype(np.float16)], pa.large_binary()),
    "float16 list": lambda rows: pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float16).ravel()), DIM),
    "float32 list": lambda rows: pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM),
    "float64 list": lambda rows: pa.array(rows.astype(np.float64).tolist()),
}


def write(path: Path, rows: Floats, keys: list[str], form: str = "float16 binary") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": keys, "vector": FORMS[form](rows)}), path, row_group_size=100)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "images": str(folder / "vectors"),
        "store": str(folder / "store"),
        "input": {"format": "vectors"},
        "channels": {
            "given": {"extractor": {"name": "vectors", "dim": DIM}, "index": {"name": "flat", "metric": "l2"}},
        },
        "evaluate": {"probes": 20},
        "workers": 0,
        **changes,
    }


def published(data: dict[str, Any]) -> tuple[cbir.search.Searcher, Any]:
    manifest = index(parse_config(data, "the test"))
    return cbir.open(data["store"]), manifest


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_a_column_gives_the_same_index(form, tmp_path):
    for number in range(3):
        some = slice(100 * number, 100 * number + 100)
        write(tmp_path / "vectors" / f"{number}.parquet", VECTORS[some], KEYS[some], form)
    searcher, manifest = published(settings(tmp_path))
    assert (manifest.counts["indexed"], manifest.counts["quarantined"]) == (NUM, 0)
    ids = np.arange(5, dtype=np.int64)
    asked = VECTORS[40:45] + np.float32(0.01)
    hits = searcher.channel_hits({"given": FeatureBatch.of_global(ids, asked)}, 3)["given"]
    distances = ((VECTORS[None] - asked[:, None]) ** 2).sum(2)
    expected = [[image_id(KEYS[n]) for n in np.argsort(row)[:3]] for row in distances]
    assert hits.image_ids.tolist() == expected
    assert manifest.quality["ann_recall"]["given"]["10"] == 1.0


def test_an_inverted_file_of_other_makers_vectors_keeps_their_keys(tmp_path):
    write(tmp_path / "vectors" / "all.parquet", VECTORS, KEYS)
    ivfpq = {"name": "ivfpq", "lists": 4, "probes": 4, "bytes": 8, "bits": 5}
    data = settings(tmp_path, evaluate={"probes": 40})
    data["channels"]["given"] |= {"encoders": [{"name": "l2"}], "index": ivfpq}
    searcher, manifest = published(data)
    curve = manifest.quality["recall_by_effort"]["given"]
    assert list(curve) == ["1", "2", "4", "8", "16"], "more than the four lists three times find the same"
    assert curve["4"] == curve["16"] < 1
    assert set(searcher.keys().values()) == set(KEYS)
    record = searcher.partitions[0].records(np.array([image_id("product/7")]))[0]
    assert (record["kind"], record["object"], record["start"], record["num_bytes"]) == (
        "vectors",
        "all.parquet",
        7,
        2 * DIM,
    )


def test_a_build_measures_recall_by_probes_without_the_probes_themselves(tmp_path):
    write(tmp_path / "vectors" / "all.parquet", VECTORS, KEYS)
    data = settings(tmp_path, evaluate={"probes": 40})
    data["channels"]["given"]["index"] = {
        "name": "ivfflat",
        "lists": 16,
        "probes": 3,
        "metric": "l2",
        "code": "float32",
    }
    searcher, manifest = published(data)
    curve = manifest.quality["recall_by_effort"]["given"]
    assert list(curve) == ["1", "2", "3", "4", "8", "16"], "more probes than lists find nothing more"
    assert list(curve.values()) == sorted(curve.values())
    assert curve["1"] < 0.9
    assert curve["16"] == 1.0
    assert manifest.quality["ann_recall"]["given"]["10"] == curve["3"]
    distances = ((VECTORS[None] - VECTORS[:, None]) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    ids = np.array([image_id(key) for key in KEYS])
    found = searcher.channel_hits({"given": FeatureBatch.of_global(ids, VECTORS)}, 11)["given"].image_ids
    shares = [len(np.intersect1d(found[n], ids[np.argsort(row)[:10]])) / 10 for n, row in enumerate(distances)]
    assert np.mean(shares) == pytest.approx(curve["3"], abs=0.12), "the probes are a sample of all"


def test_vectors_that_cannot_be_used_are_rows_of_the_ledger(tmp_path):
    rows: list[list[float] | None] = VECTORS[:50].tolist()
    rows[3], rows[10], rows[20], rows[30] = None, [1.0] * (DIM + 1), [float("nan")] * DIM, [1e30] * DIM
    folder = tmp_path / "vectors"
    folder.mkdir()
    pq.write_table(pa.table({"key": list(range(50)), "vector": rows}), folder / "a.parquet")
    _, manifest = published(settings(tmp_path))
    assert (manifest.counts["indexed"], manifest.counts["quarantined"]) == (46, 4)
    ledger = Layout.from_json(manifest.layout).partitions[0].quarantine
    table = pq.read_table(open_store(str(tmp_path / "store")).open(ledger)).to_pylist()
    assert {row["key"]: (row["reason"], row["start"]) for row in table} == {
        "3": ("no_vector", 3),
        "10": ("wrong_length", 10),
        "20": ("not_finite", 20),
        "30": ("not_finite", 30),  # beyond float16
    }


def test_feature_files_of_an_index_are_read_back(tmp_path):
    write(tmp_path / "vectors" / "all.parquet", VECTORS, KEYS)
    first = settings(tmp_path)
    (extracted,) = extract(parse_config(first, "the test"))["given"]
    features = Path(first["store"]) / extracted.done.file("features").key
    columns = {"format": "vectors", "key_column": "key", "vector_column": "descriptors"}
    again, _ = published(settings(tmp_path / "again", images=str(features), input=columns))
    assert again.keys() == published(first)[0].keys()
    ids = np.array([image_id(key) for key in KEYS])
    hits = again.channel_hits({"given": FeatureBatch.of_global(ids, VECTORS)}, 1)["given"]
    np.testing.assert_array_equal(hits.image_ids[:, 0], ids)


def test_pictures_and_vectors_do_not_mix(tmp_path):
    data = settings(tmp_path)
    with pytest.raises(ConfigError, match=r"channels.given.extractor: vectors takes .* set input.format: vectors"):
        parse_config({**data, "input": {}}, "it")
    data["channels"]["given"] |= {"extractor": {"name": "sift"}, "encoders": [{"name": "vlad"}]}
    with pytest.raises(ConfigError, match=r"channels.given.extractor: sift needs pictures"):
        parse_config(data, "it")


def test_a_query_picture_is_refused_with_the_remedy(tmp_path, pictures):
    write(tmp_path / "vectors" / "all.parquet", VECTORS, KEYS)
    searcher, _ = published(settings(tmp_path))
    with pytest.raises(DataError, match="ask with a vector"):
        searcher.search(next(iter(pictures.values())))
    with pytest.raises(DataError, match=r"all.parquet: row 7 is a vector, not a picture"):
        searcher.picture(image_id("product/7"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"key": ["a"], "vectors": [[1.0]]}, r"no column 'vector'; did you mean 'vectors'.*set `input.vector_column`"),
        ({"key": ["a"], "vector": ["text"]}, "must be lists of numbers, or binary"),
        ({"key": [1.5], "vector": [[1.0]]}, "column 'key' must be text or integers"),
        ({"key": ["a", None], "vector": [[1.0] * DIM] * 2}, "row 1 has no key"),
        ({"key": ["a", "a"], "vector": [[1.0] * DIM] * 2}, "'a'"),
    ],
)
def test_files_that_do_not_fit_are_named(column, message, tmp_path):
    (tmp_path / "vectors").mkdir()
    pq.write_table(pa.table(column), tmp_path / "vectors" / "a.parquet")
    with pytest.raises(DataError, match=message):
        index(parse_config(settings(tmp_path), "the test"))


def test_a_check_tells_what_the_index_needs(tmp_path):
    write(tmp_path / "vectors" / "all.parquet", VECTORS, KEYS)
    found = estimate(parse_config(settings(tmp_path), "the test"))
    assert found.num_images == NUM
    assert found.disk_bytes == pytest.approx(NUM * (2 * DIM + 2 * (4 * DIM + 8)))
