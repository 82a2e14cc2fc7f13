"""Exported versions: one faiss file that answers like the whole index, and Parquet with every vector."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cbir
from cbir.config import Config, parse_config
from cbir.errors import ArtifactError, ConfigError
from cbir.search import Searcher
from cbir.storage import open_store
from cbir.types import FeatureBatch
from cbir.versions import Manifest, Versions
from pipelines import export as exporting
from pipelines.export import Format, export
from pipelines.indexing import index
from pipelines.run import Run

NUM_PARTITIONS = 64
IVFPQ = {
    "extractor": {"name": "sift", "max_features": 60},
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 4}, {"name": "pca", "dim": 8}],
    "index": {"name": "ivfpq", "lists": 2, "bytes": 4, "bits": 4, "probes": 2},
}


@pytest.fixture(scope="module")
def built(
    settings: Callable[..., dict[str, Any]],
    folder: Path,
    pictures: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:
    """Two channels, flat and ivfpq, in more partitions than images, so that some are empty."""
    store = str(tmp_path_factory.mktemp("export") / "store")
    local = settings()["channels"]["local"]
    data = settings(
        store=store,
        channels={"local": local, "codes": IVFPQ},
        search={"fuse": {"name": "late"}},
        evaluate={"probes": 0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: NUM_PARTITIONS)
        config = parse_config(data, "the test")
        index(config)
    return config


def exported(config: Config, folder: Path, channel: str, form: Format) -> list[Path]:
    store = open_store(config.store)
    return export(store, Versions(store).load(), folder, channel, form)


def encoded_queries(searcher: Searcher, channel: str, pictures: dict[str, bytes]) -> FeatureBatch:
    raw = searcher.encoder.extract([pictures["object1/view0.jpg"], pictures["object6/view3.jpg"]], [None, None])
    return searcher.encoder.encode(raw)[channel]


@pytest.mark.parametrize("channel", ["local", "codes"])
def test_one_faiss_index_answers_like_all_partitions(
    built: Config, channel: str, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    index_path, ids_path = exported(built, tmp_path, channel, "faiss")
    searcher = cbir.open(built.store)
    sizes = [part["num_images"] for part in searcher.manifest.layout["partitions"]]
    assert len(sizes) == NUM_PARTITIONS
    assert min(sizes) == 0 < max(sizes), "the partitions hold several numbers of images, none among them"
    whole = faiss.read_index(str(index_path))
    assert whole.ntotal == 40
    queries = encoded_queries(searcher, channel, pictures)
    scores, ids = whole.search(np.ascontiguousarray(queries.descriptors, np.float32), 10)
    expected = searcher.channel_hits({channel: queries}, 10)[channel]
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    for found, best in zip(ids.tolist(), expected.image_ids.tolist(), strict=True):
        assert set(found) == set(best)
    keys = pq.read_table(ids_path)
    assert dict(zip(*(keys.column(name).to_pylist() for name in ("image_id", "key")), strict=True)) == searcher.keys()


def test_vectors_have_ids_keys_and_a_fixed_size(built: Config, tmp_path: Path) -> None:
    (path,) = exported(built, tmp_path, "codes", "parquet")
    table = pq.read_table(path)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert table.schema.names == ["image_id", "key", "vector"]
    assert table.num_rows == 40
    searcher = cbir.open(built.store)
    assert dict(zip(table["image_id"].to_pylist(), table["key"].to_pylist(), strict=True)) == searcher.keys()


def test_vectors_are_those_of_the_pictures(built: Config, pictures: dict[str, bytes], tmp_path: Path) -> None:
    """In the order of the FeatureBatch that their picture gives, encoded from its features."""
    (path,) = exported(built, tmp_path, "local", "parquet")
    rows = {row["key"]: row["vector"] for row in pq.read_table(path).to_pylist()}
    searcher = cbir.open(built.store)
    queries = encoded_queries(searcher, "local", pictures)
    for number, key in enumerate(("object1/view0.jpg", "object6/view3.jpg")):
        assert np.array_equal(np.array(rows[key], np.float32), queries.descriptors[number])


def test_row_groups_do_not_change_rows(built: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = exported(built, tmp_path / "one", "local", "parquet")
    monkeypatch.setattr(exporting, "_GROUP_BYTES", 1)
    (many,) = exported(built, tmp_path / "many", "local", "parquet")
    assert pq.ParquetFile(one).num_row_groups == 1
    assert pq.ParquetFile(many).num_row_groups > 3
    assert pq.read_table(one).equals(pq.read_table(many))


def test_images_with_several_vectors_keep_them_together() -> None:
    batch = FeatureBatch.of_images(
        np.array([5, 6, 7]), [np.ones((2, 3), np.float32), np.empty((0, 3), np.float32), np.full((1, 3), 7, np.float32)]
    )
    keys = pa.table({"image_id": [5, 6, 7], "key": ["five", "six", "seven"]})
    table = exporting._vector_table(keys, batch)
    assert table["key"].to_pylist() == ["five", "five", "seven"]
    assert table["vector"].to_pylist() == [[1, 1, 1], [1, 1, 1], [7, 7, 7]]


@pytest.mark.parametrize("form", ["faiss", "parquet"])
def test_a_channel_is_named_where_there_are_several(built: Config, tmp_path: Path, form: Format) -> None:
    store = open_store(built.store)
    manifest = Versions(store).load()
    with pytest.raises(ConfigError, match="give --channel, one of codes, local"):
        export(store, manifest, tmp_path / "out", None, form)
    with pytest.raises(ConfigError, match="no channel 'cods'; did you mean 'codes'"):
        export(store, manifest, tmp_path / "out", "cods", form)
    assert not (tmp_path / "out").exists()


def test_a_version_without_images_has_no_vectors_to_export(built: Config, tmp_path: Path) -> None:
    store = open_store(built.store)
    manifest = Versions(store).load()
    empty = Manifest(**{**vars(manifest), "work": ()})
    with pytest.raises(ArtifactError, match="holds no image of channel codes"):
        export(store, empty, tmp_path, "codes", "parquet")
