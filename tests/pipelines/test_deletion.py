"""Images that are hidden: gone from every result at once, with the other results as they were."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import cbir
from cbir.config import Config
from cbir.hidden import Hidden
from cbir.storage import open_store
from cbir.types import image_id
from cbir.versions import Versions
from pipelines.cli import app
from pipelines.indexing import index
from pipelines.reindex import reindex
from pipelines.run import Silent

ConfigOf = Callable[..., Config]
QUERY, TWIN, OTHER = "object3/view1.jpg", "object3/view2.jpg", "object3/view3.jpg"


@pytest.fixture
def collection(config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path) -> Config:
    """Indexed in several partitions, without verification, which would change scores."""
    for key, data in pictures.items():
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    settings = config(images=[str(tmp_path / "images")], search={"depth": 50})
    index(settings)
    return settings


def run(*arguments: str, code: int = 0) -> str:
    outcome = CliRunner(env={"COLUMNS": "240"}).invoke(app, ["delete", *arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome.output


def found(settings: Config, picture: bytes, depth: int = 50) -> list[tuple[str, float]]:
    return [(result.key, result.score) for result in cbir.open(settings.store).search(picture, depth=depth)]


def test_deleted_images_are_in_no_result_and_the_others_move_up(
    collection: Config, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    before = found(collection, pictures[QUERY])
    assert "version 2 is current; it hides 2 images" in run(collection.store, QUERY, TWIN)
    left = [result for result in before if result[0] not in (QUERY, TWIN)]
    assert found(collection, pictures[QUERY]) == left
    assert found(collection, pictures[QUERY], depth=5) == left[:5]
    assert QUERY not in cbir.open(collection.store).keys().values()
    (tmp_path / "list.txt").write_text(f"{QUERY}\n\n")
    assert "hides 1 images" in run(collection.store, "--from", str(tmp_path / "list.txt"), "--undo")
    assert found(collection, pictures[QUERY]) == [result for result in before if result[0] != TWIN]


def test_they_stay_out_of_later_versions(collection: Config, pictures: dict[str, bytes], tmp_path: Path) -> None:
    run(collection.store, TWIN)
    (tmp_path / "images" / "more.jpg").write_bytes(pictures[OTHER])
    assert reindex(collection).manifest.version == 3
    keys = {key for key, _ in found(collection, pictures[QUERY])}
    assert "more.jpg" in keys
    assert TWIN not in keys


def test_files_that_are_gone_leave_the_results_before_the_work_begins(
    collection: Config, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "images" / TWIN).unlink()
    keys: list[set[str]] = []

    class Watcher(Silent):
        def stage(self, name: str, num_tasks: int | None) -> None:
            if name == "extract":
                keys.append({key for key, _ in found(collection, pictures[QUERY])})

    manifest = reindex(collection, Watcher()).manifest
    assert TWIN not in keys[0]
    assert QUERY in keys[0]
    assert "hidden" not in manifest.counts, "it is not in the files any more"
    (tmp_path / "images" / TWIN).write_bytes(pictures[TWIN])
    reindex(collection)
    assert TWIN in {key for key, _ in found(collection, pictures[QUERY])}


def test_slips_are_named(collection: Config) -> None:
    assert "no image 'object3/view1.jpeg' is indexed; did you mean 'object3/view1.jpg'?" in run(
        collection.store, "object3/view1.jpeg", code=1
    )
    assert "no keys: name some" in run(collection.store, code=2)
    assert Versions(open_store(collection.store)).numbers() == [1]


def test_who_asks_has_the_last_word(tmp_path: Path) -> None:
    hidden = Hidden.of(asked=["b", "a"], gone=["a", "c"])
    pq.write_table(hidden.table(), tmp_path / "hidden.parquet")
    read = Hidden.read(tmp_path / "hidden.parquet")
    assert (sorted(read.asked), list(read.gone), len(read)) == (["a", "b"], ["c"], 3)
    low = image_id("a")
    assert Hidden.ids(tmp_path / "hidden.parquet", low, low + 1).tolist() == [low]
