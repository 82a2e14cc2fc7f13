"""`cbir compare`: two versions, or two indexes, asked the same queries."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from cbir.config import parse_config
from cbir.search import open_version
from pipelines.cli import app
from pipelines.indexing import index
from pipelines.quality import judge

Settings = Callable[..., dict[str, Any]]


def cbir(*arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def compared(*arguments: object) -> dict[str, Any]:
    done = cbir("compare", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def store(settings: Settings, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 with eight words and verified, version 2 with a single word and not, of fewer pictures."""
    root = tmp_path_factory.mktemp("compare")
    shutil.copytree(folder / "images", root / "images")
    own = {"images": str(root / "images"), "store": str(root / "store"), "evaluate": {"probes": 5}}
    index(parse_config(settings(**own), "the test"))
    shutil.rmtree(root / "images" / "object7")
    local = settings()["channels"]["local"] | {"encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 1}]}
    worse = settings(**own, channels={"local": local}, search={"depth": 50})
    index(parse_config(worse, "the test"))
    return root / "store"


def test_a_version_agrees_with_itself(store: Path) -> None:
    found = compared(store, 2, 2, "--queries", 4)
    assert found["overlap"] == {"1": 1.0, "5": 1.0, "10": 1.0}
    assert (found["queries"], found["images_in_both"], found["settings"]) == (4, 35, {})
    assert all(side["finds_itself"] == 1.0 for side in found["sides"])


def test_two_versions_are_asked_the_same_images(store: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = cbir("compare", store, 1, 2, "--queries", 6, "--html", page)
    assert done.exit_code == 0, done.stderr
    rows = {re.split("  +", line.strip())[0]: line for line in done.stdout.splitlines()}
    assert done.stdout.startswith("6 queries of indexed images: overlap@1 ")
    assert "35 images are in both" in done.stdout
    assert rows["images indexed"].split()[2:] == ["40", "35", "-12.5%"]
    assert rows["channels.local.encoders.1.words"].split()[1:] == ["8", "1"]
    assert "workers" not in done.stdout
    text = page.read_text()
    assert text.count("<article") >= 1
    assert "data:image/jpeg;base64," in text
    assert "no picture" in text, "the pictures of an object were deleted"


def test_overlap_counts_results_without_the_query(store: Path) -> None:
    """Against answers of the searchers, one by one."""
    found = compared(store, 1, 2, "--queries", 5)
    assert found["overlap"]["10"] < 1
    first, second = (open_version(str(store), version) for version in (1, 2))
    for asked in found["asked"]:
        for searcher, keys in zip((first, second), asked["results"], strict=True):
            results = searcher.search(searcher.picture(asked["image"]), depth=11)
            assert [result.key for result in results if result.key != asked["name"]][:10] == keys
        common = set(asked["results"][0]) & set(asked["results"][1])
        assert asked["overlap"] == len(common) / 10


def test_with_ground_truth_the_quality_is_that_of_an_evaluation(store: Path, folder: Path, tmp_path: Path) -> None:
    found = compared(store, 1, 2, "--ground-truth", folder / "truth.csv", "--html", tmp_path / "page.html")
    assert (found["ground_truth"], found["queries"]) == ("truth", 40)
    for side in found["sides"]:
        judged = judge(open_version(str(store), side["version"]), str(folder / "truth.csv"))
        assert side["quality"]["mAP"] == judged.quality.mean_average_precision()
        assert side["quality"]["recall@1"] == judged.quality.recall_at(1)
        assert side["finds_itself"] is None
    better, worse = (side["quality"]["mAP"] for side in found["sides"])
    assert better > worse
    means = np.mean([asked["average_precision"] for asked in found["asked"]], axis=0)
    assert means == pytest.approx([better, worse])
    assert "AP " in (tmp_path / "page.html").read_text()
    for asked in found["asked"]:
        own = asked["name"].partition("/")[0]
        shown = {key for keys in asked["results"] for key in keys}
        assert set(asked["right"]) == {key for key in shown if key.startswith(own)}


def test_a_picture_that_is_gone_is_read_from_the_other_collection_or_left_out(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder / "images" / "object0", tmp_path / name)
        own = {"images": str(tmp_path / name), "store": str(tmp_path / f"{name}-store"), "evaluate": {"probes": 0}}
        index(parse_config(settings(**own), "the test"))
    stores = tmp_path / "one-store", tmp_path / "two-store"
    shutil.rmtree(tmp_path / "one")
    found = compared(*stores)
    assert (found["queries"], found["overlap"]["1"]) == (5, 1.0)
    assert found["sides"][0]["name"] == str(stores[0])
    (tmp_path / "two" / "view0.jpg").unlink()
    found = compared(*stores)
    assert (found["queries"], found["unreadable"]) == (4, 1)
    assert "1 more could not be read from the collection again" in cbir("compare", *stores).stdout
    shutil.rmtree(tmp_path / "two")
    done = cbir("compare", *stores)
    assert done.exit_code == 1
    assert "none of 5 images that both versions hold can be read again" in done.stderr
    assert "--ground-truth" in done.stderr


class TestVectors:
    @pytest.fixture
    def data(self, tmp_path: Path) -> dict[str, Any]:
        """Settings of an index of 200 vectors, which is built: version 1 is exact."""
        rng = np.random.default_rng(0)
        (tmp_path / "vectors").mkdir()
        for number in range(2):
            keys = [f"product/{number}-{n}" for n in range(100)]
            table = pa.table({"key": keys, "vector": list(rng.normal(size=(100, 8)).astype(np.float32))})
            pq.write_table(table, tmp_path / "vectors" / f"{number}.parquet")
        extractor = {"name": "vectors", "dim": 8, "dtype": "float32"}
        settings = {
            "images": str(tmp_path / "vectors"),
            "store": str(tmp_path / "store"),
            "input": {"format": "vectors"},
            "channels": {"given": {"extractor": extractor, "index": {"name": "flat", "metric": "l2"}}},
            "evaluate": {"probes": 5},
            "workers": 0,
        }
        index(parse_config(settings, "the test"))
        return settings

    def coarse(self, data: dict[str, Any]) -> None:
        """Build version 2, with two bits of code for each number."""
        channel = data["channels"]["given"] | {"index": {"name": "pq", "bytes": 2, "bits": 4, "metric": "l2"}}
        index(parse_config(data | {"channels": {"given": channel}}, "the test"))

    def test_are_asked_with_those_that_the_build_kept(self, data: dict[str, Any], tmp_path: Path) -> None:
        self.coarse(data)
        found = compared(data["store"], 1, 2, "--queries", 40, "--html", tmp_path / "page.html")
        assert found["queries"] == 40
        assert found["sides"][0]["finds_itself"] == 1.0
        assert 0.05 < found["overlap"]["10"] < 0.95
        exact = open_version(data["store"], 1)
        vectors = {key: row for path in (tmp_path / "vectors").iterdir() for key, row in _rows(path)}
        for asked in found["asked"][:5]:
            results = exact.search(vectors[asked["name"]], depth=11)
            assert [result.key for result in results][1:] == asked["results"][0]
        assert "no picture" in (tmp_path / "page.html").read_text()

    def test_a_ground_truth_asks_with_indexed_ones(self, data: dict[str, Any], tmp_path: Path) -> None:
        rows = [f"product/0-{n},class{n % 5},both" for n in range(10)]
        (tmp_path / "truth.csv").write_text("\n".join(["image,instance_id,role", *rows]) + "\n")
        found = compared(data["store"], 1, 1, "--ground-truth", tmp_path / "truth.csv")
        assert found["queries"] == 10
        assert 0 < found["sides"][0]["quality"]["mAP"] < 1
        (tmp_path / "other.csv").write_text("\n".join(["image,instance_id,role", *rows, "new.jpg,class1,query"]) + "\n")
        done = cbir("compare", data["store"], 1, 1, "--ground-truth", tmp_path / "other.csv")
        assert done.exit_code == 1
        assert "version 1 was made of vectors, and none of an image 'new.jpg'" in done.stderr

    def test_a_build_without_its_vectors_says_so(self, data: dict[str, Any]) -> None:
        shutil.rmtree(Path(data["store"]) / "stages" / "extract")
        done = cbir("compare", data["store"], 1, 1)
        assert done.exit_code == 1
        assert "version 1 was made of vectors, but the files of its build that hold them are gone" in done.stderr


def _rows(path: Path) -> list[tuple[str, Any]]:
    table = pq.read_table(path)
    vectors = [np.array(row, np.float32) for row in table.column("vector").to_pylist()]
    return list(zip(table.column("key").to_pylist(), vectors, strict=True))


@pytest.mark.parametrize("what", [["store"], ["store", "1"], ["store", "1", "two"], ["store", "1", "2", "3"]])
def test_what_is_compared_must_be_two_things(what: list[str], tmp_path: Path) -> None:
    done = cbir("compare", *what)
    assert done.exit_code == 2
    assert "compare INDEX V1 V2, or compare INDEX INDEX" in done.stderr


def test_queries_are_of_one_kind(store: Path, folder: Path) -> None:
    done = cbir("compare", store, 1, 2, "--queries", 3, "--ground-truth", folder / "truth.csv")
    assert done.exit_code == 2
    assert "give one of the two" in done.stderr


def test_versions_without_a_common_image_have_no_queries(
    store: Path, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    own = {"images": str(folder / "images" / "object0"), "store": str(tmp_path / "store"), "evaluate": {"probes": 0}}
    index(parse_config(settings(**own), "the test"))
    done = cbir("compare", store, tmp_path / "store")
    assert done.exit_code == 1
    assert "have no image in common; give --ground-truth FILE" in done.stderr
