"""From pictures to a published version, in this process and on Ray, and on again after an interruption."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cbir
from cbir.config import Config
from cbir.errors import ArtifactError, DataError
from cbir.storage import open_store
from cbir.types import image_id
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.run import Silent
from pipelines.work import Report, Task

ConfigOf = Callable[..., Config]


def bytes_of(store: Path, folder: str = "stages") -> dict[str, str]:
    """sha256 of every file by its path."""
    files = (path for path in sorted((store / folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Recorder(Silent):
    """Remembers which tasks were done and which were reused."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.reused: list[str] = []

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        (self.reused if reused else self.done).append(task.stage)


def test_every_picture_is_indexed_or_in_the_ledger(config: ConfigOf, pictures: dict[str, bytes]) -> None:
    manifest = index(config())
    assert manifest.version == 1
    counts = manifest.counts
    assert (counts["images"], counts["indexed"], counts["quarantined"]) == (42, 40, 2)
    searcher = cbir.open(config().store)
    assert set(searcher.keys().values()) == {key for key in pictures if key.startswith("object")}


def test_a_picture_finds_itself_and_its_other_views_first(config: ConfigOf, pictures: dict[str, bytes]) -> None:
    index(config())
    searcher = cbir.open(config().store)
    results = searcher.search(pictures["object3/view1.jpg"], depth=5)
    assert results[0].key == "object3/view1.jpg"
    assert {result.key.partition("/")[0] for result in results} == {"object3"}
    assert results == sorted(results, key=lambda result: -result.score)
    assert searcher.picture(results[0].image_id) == pictures["object3/view1.jpg"]


def test_a_box_searches_for_a_part(config: ConfigOf, pictures: dict[str, bytes]) -> None:
    index(config())
    searcher = cbir.open(config().store)
    assert searcher.search(pictures["object5/view2.jpg"], depth=1, box=(20, 20, 120, 120))[0].key.startswith("object5/")
    with pytest.raises(DataError, match="outside the query picture of 160 x 160"):
        searcher.search(pictures["object5/view2.jpg"], box=(400, 0, 10, 10))
    with pytest.raises(DataError, match="cannot be used: not_an_image"):
        searcher.search(b"no picture")


def test_the_gate_measures_and_refuses(config: ConfigOf, folder: Path, tmp_path: Path) -> None:
    evaluate = {"ground_truth": str(folder / "truth.csv"), "probes": 10}
    manifest = index(config(evaluate=evaluate))
    assert manifest.quality["map"] > 0.9
    assert manifest.quality["ann_recall"]["local"]["10"] == 1.0
    too_high = config(evaluate={**evaluate, "floor": {"map": 2.0}})
    with pytest.raises(ArtifactError, match=r"map is \d\.\d+, the floor is 2.*candidates/"):
        index(too_high)
    versions = Versions(open_store(too_high.store))
    assert versions.numbers() == [1]
    assert len(list(versions.store.list("candidates/"))) == 1


def test_ray_and_inline_write_the_same_bytes(config: ConfigOf, tmp_path: Path) -> None:
    one, two = config(store=str(tmp_path / "inline")), config(store=str(tmp_path / "ray"), workers=2)
    index(one)
    index(two)
    inline = bytes_of(tmp_path / "inline")
    assert len(inline) > 30
    assert bytes_of(tmp_path / "ray") == inline


def test_the_same_command_again_does_nothing(config: ConfigOf) -> None:
    index(config())
    again = Recorder()
    assert index(config(), again).version == 1
    assert again.done == []
    assert "extract" in again.reused


def test_only_what_a_changed_setting_affects_is_done_again(config: ConfigOf) -> None:
    first = config()
    index(first)
    changed = first.model_copy(update={"sample": first.sample.model_copy(update={"seed": 1})})
    again = Recorder()
    assert index(changed, again).version == 2
    assert "extract" not in again.done
    assert {"train", "build", "merge"} <= set(again.done)


def test_a_new_picture_costs_its_own_shard(config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path) -> None:
    images = tmp_path / "images"
    for key, data in pictures.items():
        (images / key).parent.mkdir(parents=True, exist_ok=True)
        (images / key).write_bytes(data)
    settings = config(images=[str(images)])
    index(settings)
    (images / "object9").mkdir()
    (images / "object9" / "view0.jpg").write_bytes(pictures["object0/view1.jpg"])
    again = Recorder()
    manifest = index(settings, again)
    assert manifest.counts["indexed"] == 41
    assert 1 <= again.done.count("extract") <= 2
    assert again.reused.count("extract") > again.done.count("extract")


def test_too_many_bad_images_stop_the_run(config: ConfigOf, tmp_path: Path) -> None:
    images = tmp_path / "bad"
    images.mkdir()
    for number in range(60):
        (images / f"{number}.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"60 of 60 images could not be used, more than max_bad = 0.5"):
        index(config(images=[str(images)]))


def test_partitions_answer_like_one(config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path) -> None:
    one = index(config(store=str(tmp_path / "one")))
    many = index(config(store=str(tmp_path / "many"), partition_megabytes=1, sample={"images": 50000}))
    assert one.counts["partitions"] == 1
    assert many.counts["partitions"] >= 1
    for key in ("object1/view0.jpg", "object6/view3.jpg"):
        answers = [
            [(result.key, result.score) for result in cbir.open(str(tmp_path / name)).search(pictures[key], depth=20)]
            for name in ("one", "many")
        ]
        assert answers[0] == answers[1]


def test_ids_depend_on_keys_alone(config: ConfigOf) -> None:
    index(config())
    keys = cbir.open(config().store).keys()
    assert all(image == image_id(key) for image, key in keys.items())
    assert np.all(np.diff(list(keys)) > 0)
