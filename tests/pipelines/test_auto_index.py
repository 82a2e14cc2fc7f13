"""An index that is chosen by measuring, through the whole pipeline: built, gated, searched, exported, reported."""

import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cbir
from cbir.config import Config, parse_config
from cbir.errors import ConfigError
from cbir.index.choice import Choice
from cbir.layout import Layout
from cbir.storage import open_store
from cbir.types import Floats, image_id
from cbir.versions import Manifest
from pipelines.cli import _print_quality
from pipelines.export import export
from pipelines.indexing import index
from pipelines.reporting import write_evaluation
from pipelines.run import Run

NUM, DIM = 900, 32
VECTORS: Floats = np.random.default_rng(0).normal(size=(NUM, DIM)).astype(np.float32)
KEYS = [f"product/{number}" for number in range(NUM)]


def settings(folder: Path, num_files: int) -> Config:
    """Vectors in so many files, and an index of them."""
    for number, rows in enumerate(np.array_split(np.arange(NUM), num_files)):
        path = folder / "vectors" / f"{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS[rows].ravel()), DIM)
        pq.write_table(pa.table({"key": [KEYS[row] for row in rows], "vector": vectors}), path)
    data = {
        "images": str(folder / "vectors"),
        "store": str(folder / "store"),
        "input": {"format": "vectors"},
        "channels": {
            "given": {
                "extractor": {"name": "vectors", "dim": DIM},
                "index": {"name": "auto", "recall": 0.9, "bytes": 48, "metric": "l2"},
            }
        },
        "evaluate": {"probes": 60},
        "workers": 0,
    }
    return parse_config(data, "the test")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Manifest]:
    """Three files, two partitions."""
    config = settings(tmp_path_factory.mktemp("auto"), 3)
    return config, built_in_two_partitions(config)


def built_in_two_partitions(config: Config) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: 2)
        return index(config)


def trained_state(manifest: Manifest) -> str:
    key = Layout.from_json(manifest.layout).channels["given"].index
    return next(file.sha256 for file in manifest.files if file.key == key)


def choice_of(manifest: Manifest) -> Choice:
    return Choice.from_json(manifest.quality["index_choice"]["given"])


def test_every_vector_finds_itself(built):
    searcher = cbir.open(built[0].store)
    own = [searcher.search(VECTORS[number], depth=1)[0].key == KEYS[number] for number in range(20, 60)]
    assert np.mean(own) > 0.9


def test_the_version_tells_what_was_chosen_and_measures_it(built):
    _, manifest = built
    choice = choice_of(manifest)
    (chosen,) = [trial for trial in choice.trials if trial.chosen]
    curve = manifest.quality["recall_by_effort"]["given"]
    assert curve["1"] < 0.5 < curve[str(chosen.probes)]
    assert manifest.quality["ann_recall"]["given"]["10"] == curve[str(chosen.probes)]
    assert curve[str(chosen.probes)] == pytest.approx(chosen.recall, abs=0.1)
    assert manifest.config["channels"]["given"]["index"]["name"] == "auto"


def test_partitions_are_sized_by_what_was_chosen(built):
    config, manifest = built
    store = open_store(config.store)
    done = [
        json.loads(store.read(f"{prefix}DONE.json")) for prefix in manifest.work if prefix.startswith("stages/build")
    ]
    per_vector = sum(record["facts"]["entry_bytes"] for record in done) / NUM
    spec = choice_of(manifest).spec
    assert per_vector == spec.entry_bytes(DIM) != config.channels["given"].index.entry_bytes(DIM)


def test_shards_do_not_show(built, tmp_path):
    manifest = built_in_two_partitions(settings(tmp_path, 1))
    assert trained_state(manifest) == trained_state(built[1])
    assert choice_of(manifest) == choice_of(built[1])


def test_codebooks_of_another_index_come_with_its_choice(built, tmp_path):
    config, manifest = built
    data = config.model_dump(mode="json")
    data["store"] = str(tmp_path / "other")
    data["channels"]["given"]["codebooks"] = {"store": config.store}
    other = index(parse_config(data, "the test"))
    assert trained_state(other) == trained_state(manifest)
    assert choice_of(other) == choice_of(manifest)


def test_an_exported_index_is_the_one_chosen(built, tmp_path):
    config, manifest = built
    path, _ = export(open_store(config.store), manifest, tmp_path, "given", "faiss")
    whole = faiss.read_index(str(path))
    assert whole.ntotal == NUM
    assert image_id(KEYS[500]) in whole.search(VECTORS[500:501], 10)[1]


def test_the_report_shows_the_table_and_the_command_a_line(built, tmp_path, capsys):
    config, manifest = built
    choice = choice_of(manifest)
    page = write_evaluation(tmp_path, open_store(config.store), cbir.open(config.store), None).read_text()
    assert "Choice of the index" in page
    assert choice.summary in page
    assert all(f"<th>{trial.index}" in page for trial in choice.trials)
    content = json.loads((tmp_path / "report.json").read_text())
    (shown,) = content["choices"]
    assert (shown["channel"], shown["queries"], shown["vectors"]) == ("given", choice.queries, choice.vectors)
    assert [trial["recall"] for trial in shown["trials"]] == [trial.recall for trial in choice.trials]
    assert list(content["recall_by_effort"]) == ["probes of given"]
    _print_quality(manifest.quality)
    assert f"given, index chosen: {choice.summary.split()[0]}" in capsys.readouterr().out


def test_an_index_without_choice_has_no_such_section(tmp_path, built):
    data = built[0].model_dump(mode="json")
    data["store"] = str(tmp_path / "store")
    data["channels"]["given"]["index"] = {"name": "flat"}
    manifest = index(parse_config(data, "the test"))
    assert "index_choice" not in manifest.quality
    page = write_evaluation(tmp_path / "report", open_store(data["store"]), cbir.open(data["store"]), None)
    assert "Choice of the index" not in page.read_text()


def test_local_features_are_refused():
    channel = {"extractor": {"name": "sift"}, "index": {"name": "auto"}}
    with pytest.raises(ConfigError, match=r"channels.local.encoders: the index auto holds one descriptor per image"):
        parse_config({"images": "a", "store": "b", "channels": {"local": channel}}, "the test")
