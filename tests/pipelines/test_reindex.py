"""A re-index against a build from the beginning with the same codebooks, and what it costs."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import cbir
from cbir.config import Config, parse_config
from cbir.layout import Layout
from cbir.types import image_id
from cbir.versions import Manifest
from pipelines.before import Before
from pipelines.cli import app
from pipelines.indexing import index
from pipelines.reindex import Reindexed, preview, reindex
from pipelines.run import Silent
from pipelines.work import Report, Task
from tests.collection_forms import write_tar
from tests.two_channels import CHANNELS

ConfigOf = Callable[..., Config]


class Tally(Silent):
    """Counts tasks that were done, by stage, and images by how they got their features."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.images: Counter[str] = Counter()

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        self.done[task.stage] += not reused
        self.images.update({(task.stage, what): number for what, number in report.tally.items()})


@pytest.fixture
def tars(pictures: Mapping[str, bytes], tmp_path: Path) -> Path:
    """The pictures in six tars."""
    return in_tars(tmp_path / "images", pictures, 6)


def in_tars(folder: Path, pictures: Mapping[str, bytes], num: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(num):
        write_tar(folder / f"{number}.tar", {key: pictures[key] for key in pictures if image_id(key) % num == number})
    return folder


@pytest.fixture
def collection(config: ConfigOf, tars: Path) -> Config:
    return config(images=[str(tars)], channels=CHANNELS, search={"fuse": {"name": "late"}})


def changed(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """One picture other, one new, one gone."""
    now = dict(pictures)
    now["object1/view1.jpg"], now["new.jpg"] = pictures["object2/view0.jpg"], pictures["object3/view3.jpg"]
    del now["object4/view4.jpg"]
    return now


def files_of(manifest: Manifest) -> set[str]:
    """sha256 of the files of all partitions."""
    digests = {file.key: file.sha256 for file in manifest.files}
    return {digests[key] for part in Layout.from_json(manifest.layout).partitions for key in part.keys}


def built_anew(collection: Config, store: Path, trained: str) -> Manifest:
    """All of the collection from the beginning, in another store, with the codebooks of a version 1."""
    data = collection.model_dump(mode="json") | {"store": str(store)}
    for channel in data["channels"].values():
        channel["codebooks"] = {"store": trained, "version": 1}
    return index(parse_config(data, "the test"))


def test_only_new_and_changed_images_are_described_and_all_is_as_if_built_anew(
    collection: Config, pictures: dict[str, bytes], tars: Path, tmp_path: Path
) -> None:
    index(collection)
    in_tars(tars, changed(pictures), 6)
    tally = Tally()
    done = reindex(collection, tally)
    assert tally.images["extract", "described"] == 2 * len(CHANNELS)
    assert done.manifest.version == 2
    assert done.images == {"added": 1, "changed": 1, "deleted": 1, "moved": 0, "same": 38}
    assert {decision.choice for decision in done.decisions.values()} == {"append"}
    assert files_of(done.manifest) == files_of(built_anew(collection, tmp_path / "anew", collection.store))
    searcher = cbir.open(collection.store)
    found = {result.key for key in pictures if "view" in key for result in searcher.search(pictures[key], depth=50)}
    assert found == {key for key in changed(pictures) if "broken" not in key}


def test_what_is_taken_over_is_what_would_be_made(
    collection: Config, pictures: dict[str, bytes], tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries and exact neighbours of the probes, with the same trained state."""
    index(collection)
    shutil.copytree(collection.store, tmp_path / "other")
    in_tars(tars, changed(pictures), 6)
    done = reindex(collection).manifest
    monkeypatch.setattr(Before, "knowledge", lambda *_: None)
    tally = Tally()
    other = reindex(collection.model_copy(update={"store": str(tmp_path / "other")}), tally).manifest
    assert tally.images["extract", "described"] > 10
    assert files_of(done) == files_of(other)
    for name in ("ann_recall", "recall_by_effort"):
        assert done.quality[name] == other.quality[name]


def test_a_night_without_a_change_starts_no_workers(collection: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index(collection)
    monkeypatch.setattr("pipelines.executor.InlineExecutor.start", lambda _: pytest.fail("there is nothing to do"))
    done = reindex(collection)
    assert done.manifest.version == first.version
    assert done.images == {"added": 0, "changed": 0, "deleted": 0, "moved": 0, "same": 40}


def test_a_collection_in_other_shards_costs_no_work_on_pixels(
    collection: Config, pictures: dict[str, bytes], tars: Path
) -> None:
    first = index(collection)
    for path in tars.iterdir():
        path.unlink()
    in_tars(tars, pictures, 4)
    tally = Tally()
    done = reindex(collection, tally)
    assert tally.images["extract", "described"] == 0
    assert tally.images["extract", "recalled"] == 40 * len(CHANNELS)
    assert tally.done["merge"] == 0
    assert done.images["moved"] + done.images["same"] == 40
    (old,), (new,) = (Layout.from_json(manifest.layout).partitions for manifest in (first, done.manifest))
    assert (old.indexes, old.signatures, old.features) == (new.indexes, new.signatures, new.features)
    assert old.ids != new.ids, "the places are others"


def test_nothing_new_publishes_nothing(collection: Config) -> None:
    assert reindex(collection).manifest.version == 1
    tally = Tally()
    done = reindex(collection, tally)
    assert done.manifest.version == 1
    assert not sum(number for stage, number in tally.done.items() if stage not in ("drift", "changes"))


def test_another_channel_is_built_anew_and_says_why(collection: Config) -> None:
    index(collection)
    data = collection.model_dump(mode="json")
    data["channels"]["words"]["extractor"]["max_features"] = 50
    done = reindex(parse_config(data, "the test"))
    assert done.decisions["whole"].choice == "append"
    assert done.decisions["words"].choice == "rebuild"
    assert "extractor.max_features is 50 here, 60 there" in done.decisions["words"].reason
    assert done.manifest.version == 2


def test_the_preview_tells_what_changed_and_writes_nothing(
    collection: Config, pictures: dict[str, bytes], tars: Path, tmp_path: Path
) -> None:
    assert "no version yet: all 6 shards" in "\n".join(preview(collection))
    assert not Path(collection.store).exists() or not list(Path(collection.store).rglob("*.json"))
    index(collection)
    keep = sorted(path.relative_to(collection.store) for path in Path(collection.store).rglob("*"))
    write_tar(tars / "0.tar", {"new.jpg": pictures["object3/view3.jpg"]})
    (tars / "1.tar").unlink()
    text = "\n".join(preview(collection))
    assert "tars and Parquet files: 0 added, 1 changed, 1 deleted, 4 as they were" in text
    assert "1 of 5 shards to read" in text
    assert keep == sorted(path.relative_to(collection.store) for path in Path(collection.store).rglob("*"))


def test_bytes_that_changed_behind_the_listing_are_found_and_stay_found(
    collection: Config, pictures: dict[str, bytes], tars: Path
) -> None:
    index(collection)
    path, other = tars / "0.tar", dict(pictures)
    key = next(key for key in pictures if image_id(key) % 6 == 0 and "view" in key)
    before = path.stat()
    other[key] = pictures[key][:-3] + bytes(1) + pictures[key][-2:]
    in_tars(tars, other, 6)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert reindex(collection).images["changed"] == 0
    tally = Tally()
    found = reindex(collection, tally, verify_bytes=True)
    assert (found.images["changed"], tally.done["verify bytes"]) == (1, 6)
    assert tally.images["extract", "described"] == len(CHANNELS)
    assert reindex(collection).manifest.version == found.manifest.version, "the next listing knows it still"


def test_words_of_encoders_are_measured_as_those_of_indexes_are(
    collection: Config, pictures: dict[str, bytes], tars: Path
) -> None:
    """VLAD before IVF-PQ, and ASMK; whose 60 features of 40 images are 16 and 8 times as many as words."""
    index(collection)
    in_tars(tars, changed(pictures), 6)
    measured = collection.reindex.model_copy(update={"images": 1})
    for name, decision in reindex(collection.model_copy(update={"reindex": measured})).decisions.items():
        assert decision.base is not None
        assert decision.base["rows"] > 1000, name
        assert 0.5 < decision.figures["quantisation_error"] < 2
        assert 0.5 < decision.figures["list_imbalance"] < 2


def test_files_that_come_and_go_leave_their_neighbours_alone(
    config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    for key, data in pictures.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    collection = config(images=[str(folder)], channels={"words": CHANNELS["words"]}, search={})
    index(collection)
    (folder / "object0" / "view0.jpg").unlink()
    (folder / "object7" / "other.jpg").write_bytes(pictures["object7/view0.jpg"])
    assert "image files: 1 added, 0 changed, 1 deleted, 41 as they were" in "\n".join(preview(collection))
    tally = Tally()
    done = reindex(collection, tally)
    assert tally.images["extract", "described"] == 1
    assert (done.images["added"], done.images["deleted"]) == (1, 1)
    assert "object0/view0.jpg" not in cbir.open(collection.store).keys().values()


def test_the_command_says_what_it_found_and_did(
    collection: Config, pictures: dict[str, bytes], tars: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(collection.model_dump(mode="json")))

    def run(*more: str) -> str:
        outcome = CliRunner(env={"COLUMNS": "240"}).invoke(app, ["reindex", str(path), *more])
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    assert "no version yet" in run("--dry-run")
    assert "version 1 of" in run()
    in_tars(tars, changed(pictures), 6)
    assert "6 of 6 shards to read" in run("--dry-run")
    text = run("--report", str(tmp_path / "report"))
    assert "images: 1 added, 1 changed, 1 deleted, 0 moved, 38 same" in text
    assert "channel words: append, because 2 new images are too few to tell by themselves, the least is 200; " in text
    assert "version 2 of" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Since version 1" in page
    assert "quantisation errors of words" in page
    assert "append" in CliRunner(env={"COLUMNS": "240"}).invoke(app, ["runs", collection.store]).stdout


NUM, DIM = 2000, 16


def write_vectors(path: Path, first: int, rows: np.ndarray) -> None:
    keys = [f"v{first + number}" for number in range(len(rows))]
    pq.write_table(pa.table({"key": keys, "vector": list(rows.astype(np.float32))}), path)


def clusters(seed: int, num: int, centres: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return centres[rng.integers(0, len(centres), num)] + 0.1 * rng.standard_normal((num, DIM))


@pytest.fixture
def vectors(config: ConfigOf, tmp_path: Path) -> Config:
    folder = tmp_path / "vectors"
    folder.mkdir()
    write_vectors(folder / "0.parquet", 0, clusters(0, NUM, np.random.default_rng(9).standard_normal((16, DIM))))
    channel = {
        "extractor": {"name": "vectors", "dim": DIM},
        "index": {"name": "ivfpq", "lists": 32, "bytes": 16, "bits": 4, "metric": "l2", "probes": 2},
    }
    settings: dict[str, Any] = {"input": {"format": "vectors"}, "channels": {"given": channel}, "search": {}}
    return config(images=[str(folder)], **settings)


def with_more(collection: Config, seed: int, num: int, centres: np.ndarray, **limits: object) -> Reindexed:
    """Re-indexed after another file came."""
    folder = Path(collection.images[0])
    write_vectors(folder / f"{seed}.parquet", 1000 * seed, clusters(seed, num, centres))
    return reindex(collection.model_copy(update={"reindex": collection.reindex.model_copy(update=limits)}))


def test_images_like_those_before_are_appended_others_train_anew(vectors: Config) -> None:
    same, others = (np.random.default_rng(seed).standard_normal((16, DIM)) for seed in (9, 10))
    index(vectors)
    alike = with_more(vectors, 3, 500, same).decisions["given"]
    assert alike.choice == "append", alike.reason
    assert alike.new_images == 500
    assert alike.base is not None
    few = with_more(vectors, 4, 100, same).decisions["given"]
    assert (few.choice, few.base) == ("append", alike.base), "what it was trained on is measured once"
    assert "100 new images are too few to tell by themselves, the least is 200" in few.reason
    assert "quantisation_error" not in few.figures
    other = with_more(vectors, 5, 500, others)
    assert other.decisions["given"].choice == "retrain"
    assert "(limit 1.25, beyond it)" in other.decisions["given"].reason
    assert other.manifest.quality["reindex"]["channels"]["given"]["choice"] == "retrain"
    after = with_more(vectors, 6, 500, others).decisions["given"]
    assert after.new is not None
    assert after.new["error"] < other.decisions["given"].new["error"], "by the new codebooks"


def test_a_few_others_every_night_add_up(vectors: Config) -> None:
    index(vectors)
    others = np.random.default_rng(10).standard_normal((16, DIM))
    nights = [with_more(vectors, 3 + night, 2, others).decisions["given"] for night in range(5)]
    assert {night.new_images for night in nights} == {2}
    choices = [night.choice for night in nights]
    assert choices[0] == "append"
    assert choices.count("retrain") == 1, "and then it fits again"
    beyond = nights[choices.index("retrain")]
    assert beyond.figures["error_of_all"] > vectors.reindex.error


def test_whether_to_train_can_be_said(vectors: Config) -> None:
    others = np.random.default_rng(10).standard_normal((16, DIM))
    index(vectors)
    assert with_more(vectors, 3, 500, others, retrain="never").decisions["given"].choice == "append"
    assert with_more(vectors, 4, 500, others, retrain="always").decisions["given"].choice == "retrain"


def test_recall_of_new_images_alone_can_train_anew(vectors: Config) -> None:
    others = np.random.default_rng(10).standard_normal((16, DIM))
    index(vectors)
    lenient = {"error": 1e6, "imbalance": 1e6, "entropy": 1e-6}
    done = with_more(vectors, 3, 500, others, **lenient, recall=0.1).decisions["given"]
    assert done.choice == "retrain", done.reason
    assert done.reason.endswith("(limit 0.1, beyond it)")
    assert with_more(vectors, 4, 500, others, **lenient, recall=1.0).decisions["given"].choice == "append"
