"""`cbir extract`: features without an index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from cbir.config import Config
from cbir.storage import open_store
from cbir.types import FeatureBatch, image_id
from cbir.versions import Versions
from pipelines.cli import app
from pipelines.feature_files import write_features
from pipelines.indexing import extract, index


@pytest.fixture
def written(config: Callable[..., Config], tmp_path: Path) -> tuple[Config, Path]:
    """A configuration, and the files of its features."""
    settings = config()
    counts = write_features(settings, extract(settings), str(tmp_path / "out"), npy=True)
    assert (counts["local"]["indexed"], counts["local"]["quarantined"]) == (40, 2)
    return settings, tmp_path / "out" / "local"


def test_every_image_is_in_one_file_and_all_rows_are_in_the_matrix(
    written: tuple[Config, Path], pictures: dict[str, bytes]
) -> None:
    files = sorted(path for path in written[1].glob("files-*.parquet") if "quarantine" not in path.name)
    tables = [pq.read_table(path) for path in files]
    assert len(files) > 1
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    assert sorted(keys) == sorted(key for key in pictures if key.startswith("object"))
    matrix, images = np.load(written[1] / "features.npy", mmap_mode="r"), pq.read_table(written[1] / "images.parquet")
    assert images.column("key").to_pylist() == keys
    assert images.column("image_id").to_pylist() == [image_id(key) for key in keys]
    batches = [FeatureBatch.from_arrow(table) for table in tables]
    assert np.array_equal(matrix, np.concatenate([batch.descriptors for batch in batches]))
    assert images.column("num_rows").to_pylist() == [count for batch in batches for count in batch.counts.tolist()]
    first = images.column("first_row").to_numpy()
    assert np.array_equal(first, np.cumsum(images.column("num_rows").to_numpy()) - images.column("num_rows").to_numpy())


def test_quarantined_images_are_named(written: tuple[Config, Path]) -> None:
    ledgers = [pq.read_table(path).to_pylist() for path in written[1].glob("*.quarantine.parquet")]
    assert {row["key"] for rows in ledgers for row in rows} == {"broken/text.jpg", "broken/cut.jpg"}


def test_nothing_is_published_and_an_index_takes_the_features_up(written: tuple[Config, Path]) -> None:
    store = Path(written[0].store)
    assert Versions(open_store(str(store))).current() is None
    before = {path: path.stat().st_mtime_ns for path in (store / "stages" / "extract").rglob("*")}
    index(written[0])
    assert {path: path.stat().st_mtime_ns for path in (store / "stages" / "extract").rglob("*")} == before


def test_the_one_liner_of_the_readme_reads_descriptors(
    config: Callable[..., Config], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    network = {"name": "deep", "backbone": "mobilenetv2_035", "weights": "none", "size": 32}
    channels = {"global": {"extractor": network, "index": {"name": "flat"}}}
    (tmp_path / "deep.yaml").write_text(
        yaml.safe_dump(settings(store=str(tmp_path / "store"), channels=channels, search={}))
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["extract", str(tmp_path / "deep.yaml"), str(out), "--npy"])
    assert result.exit_code == 0, result.output
    assert "global: 40 features of 40 images, 2 quarantined" in result.output
    assert "/out/global/" in result.output
    files = sorted(path for path in out.glob("global/files-*.parquet") if "quarantine" not in path.name)
    columns = [pq.read_table(path)["descriptors"] for path in files]
    rows = [np.frombuffer(b"".join(column.to_pylist()), "float32").reshape(len(column), -1) for column in columns]
    assert np.array_equal(np.concatenate(rows), np.load(out / "global" / "features.npy"))
