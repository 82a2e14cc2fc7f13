"""The command line: every command does what its help says, and the exit code tells the truth."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cbir.lease import lease, writer_of
from cbir.storage import open_store
from cbir.versions import Versions
from pipelines.cli import app
from tests.conftest import PROJECT
from tests.test_lease import held_elsewhere

Settings = Callable[..., dict[str, Any]]

COMMANDS = sorted(
    command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback
)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def cbir(*arguments: object, width: int = 200) -> Outcome:
    """Run a command in this process, as on a terminal of this many columns that is piped."""
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def built(settings: Settings, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`config.yaml` and its index `store` with versions 1 and 2, which no test of this module changes."""
    root = tmp_path_factory.mktemp("cli")
    path = write_config(
        root / "config.yaml",
        settings(store=str(root / "store"), evaluate={"probes": 10, "ground_truth": str(folder / "truth.csv")}),
    )
    assert cbir("index", path).code == 0
    assert cbir("index", path, "--set", "sample.seed=1").code == 0
    return root


@pytest.fixture
def own(settings: Settings, folder: Path, tmp_path: Path) -> Path:
    """A configuration and an index of a few pictures that a test may damage."""
    images = [str(folder / "images" / "object0")]
    path = write_config(tmp_path / "own.yaml", settings(store=str(tmp_path / "own"), images=images))
    assert cbir("index", path).code == 0
    return path


class TestHelp:
    def test_no_command_is_a_usage_error_that_lists_the_commands(self) -> None:
        outcome = cbir()
        assert outcome.code == 2
        assert all(command in outcome.out + outcome.err for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_teaches_by_an_example_that_is_a_real_command_line(self, command: str) -> None:
        outcome = cbir(command, "--help")
        assert outcome.code == 0
        example = re.search(r"Example: cbir (.*)", outcome.out)
        assert example, outcome.out
        words = example[1].split(">")[0].split()
        assert words[0] == command
        options = [word for word in words if word.startswith("--")]
        assert all(f"{option} " in outcome.out.replace("Example:", "", 1) for option in options)

    def test_needs_no_heavy_library(self) -> None:
        script = (
            "import sys\nfrom pipelines.cli import main\nsys.argv = ['cbir', '--help']\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
            "heavy = {'torch', 'ray', 'faiss', 'cv2', 'boto3', 'pyarrow', 'numpy', 'matplotlib'} & set(sys.modules)\n"
            "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "evaluate" in done.stdout

    @pytest.mark.parametrize(
        "arguments",
        [
            ["indx", "config.yaml"],
            ["index"],
            ["index", "config.yaml", "--wokers", "2"],
            ["index", "config.yaml", "--workers", "-1"],
            ["index", "config.yaml", "--workers", "two"],
            ["search", "store", "picture.jpg", "--depth", "0"],
            ["export", "store", "folder", "--format", "csv"],
            ["evaluate", "store", "--protocol", "medum"],
            ["rollback", "store"],
        ],
    )
    def test_usage_errors_exit_with_2(self, arguments: list[str]) -> None:
        outcome = cbir(*arguments)
        assert outcome.code == 2
        assert "Usage: cbir" in outcome.err


class TestOverrides:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--set", "sample.images"], "expected dotted.path=value"),
            (["--set", "sample.imagse=5"], "sample: unknown key 'imagse'; did you mean 'images'"),
            (["--set", "sample.images=many"], "sample.images: .*found 'many'"),
            (["--set", "workers.count=2"], "workers is 0, not a group of keys"),
            (["--set", "channels.local.encoders.7.words=16"], "encoders is a list of 2 elements.*found '7'"),
            (["--set", "channels.local.encoders.vlad.words=16"], "is a list of 2 elements.*found 'vlad'"),
            (["--set", "search={depth: [}"], "not valid YAML"),
            (["--store", ""], "store: "),
            (["--images", "/nowhere/at/all"], "/nowhere/at/all"),
        ],
    )
    def test_bad_ones_are_refused_with_their_path(self, built: Path, arguments: list[str], message: str) -> None:
        outcome = cbir("check", built / "config.yaml", *arguments)
        assert outcome.code == (1 if "--images" in arguments else 2)
        assert re.search(message, outcome.err, re.DOTALL)

    def test_good_ones_replace_what_the_yaml_says(self, built: Path, folder: Path, tmp_path: Path) -> None:
        sources = ["--images", folder / "images" / "object0", "--images", folder / "images" / "broken"]
        changes = ["--set", "channels.local.encoders.1.words=2", "--set", "evaluate={probes: 0}"]
        store = tmp_path / "other"
        outcome = cbir("index", built / "config.yaml", *sources, "--store", store, "--workers", 0, *changes)
        assert outcome.code == 0, outcome.err
        config = Versions(open_store(str(store))).load().config
        assert config["images"] == [str(source) for source in sources[1::2]]
        assert config["store"] == str(store)
        assert config["channels"]["local"]["encoders"][1]["words"] == 2
        assert config["evaluate"]["ground_truth"] is None

    def test_a_missing_or_broken_yaml_is_a_configuration_error(self, tmp_path: Path) -> None:
        assert cbir("check", tmp_path / "none.yaml").code == 2
        (tmp_path / "list.yaml").write_text("- a\n- b\n")
        assert "must be a mapping" in cbir("check", tmp_path / "list.yaml").err


def test_check_tells_what_a_run_will_need_and_writes_nothing(built: Path, tmp_path: Path) -> None:
    outcome = cbir("check", built / "config.yaml", "--store", tmp_path / "new")
    assert outcome.code == 0, outcome.err
    first_words = [line.split("  ")[0].strip() for line in outcome.out.splitlines()]
    assert first_words[0] == "what"
    assert {"shards", "images", "bytes to read", "disk", "memory", "time"} <= set(first_words)
    assert re.search(r"images +42 +counted", outcome.out)
    assert "16 images tried" in outcome.out
    assert not (tmp_path / "new").exists()


def test_index_reports_its_version_and_its_stages(built: Path) -> None:
    outcome = cbir("index", built / "config.yaml", "--set", "sample.seed=1")
    assert outcome.code == 0
    assert "version 2 of" in outcome.out
    assert "40 images indexed, 2 quarantined, 1 partition(s)" in outcome.out
    assert re.search(r"mAP [01]\.\d+ +recall@1 1\.000", outcome.out)
    assert re.search(r"^extract +tasks \d+/\d+  reused \d+", outcome.err, re.MULTILINE)


def test_index_writes_a_report_when_asked(own: Path, tmp_path: Path) -> None:
    outcome = cbir("index", own, "--report", tmp_path / "report")
    assert outcome.code == 0
    assert outcome.out.strip().endswith("report.html")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["name"] for row in report["stages"]][:3] == ["plan", "extract", "sample"]
    assert report["counts"]["indexed"] == 5


def test_index_fails_with_a_message_when_nothing_can_be_indexed(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = cbir("index", built / "config.yaml", "--images", tmp_path / "empty", "--store", tmp_path / "new")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "new" / "CURRENT").exists()


def test_a_refused_version_is_a_failure(built: Path) -> None:
    outcome = cbir("index", built / "config.yaml", "--set", "evaluate.floor.map=2")
    assert outcome.code == 1
    assert "the gate refuses this version" in outcome.err


class TestSearch:
    def test_prints_rank_score_and_key(self, built: Path, folder: Path) -> None:
        picture = folder / "images" / "object3" / "view1.jpg"
        for index in (built / "store", built / "config.yaml"):
            outcome = cbir("search", index, picture, "--depth", 4, width=30)
            assert outcome.code == 0
            rows = [line.split() for line in outcome.out.splitlines()]
            assert [row[0] for row in rows] == ["1", "2", "3", "4"]
            assert rows[0][2] == "object3/view1.jpg"
            assert all(row[2].startswith("object3/") for row in rows)

    def test_json_is_one_object_per_line(self, built: Path, folder: Path) -> None:
        outcome = cbir("search", built / "store", folder / "images" / "object2" / "view0.jpg", "--json", "--depth", 3)
        rows = [json.loads(line) for line in outcome.out.splitlines()]
        assert [row["key"].split("/")[0] for row in rows] == ["object2"] * 3
        assert rows[0]["score"] > rows[1]["score"] > rows[2]["score"]
        assert set(rows[0]["channels"]) == {"local"}

    def test_writes_a_page_with_matches_for_a_box(self, built: Path, folder: Path, tmp_path: Path) -> None:
        page = tmp_path / "result.html"
        outcome = cbir(
            "search", built / "store", folder / "images" / "object5" / "view2.jpg",
            "--box", "20,20,120,120", "--html", page,
        )  # fmt: skip
        assert outcome.code == 0
        assert f"wrote {page}" in outcome.err
        text = page.read_text()
        assert "object5/view2.jpg" in text
        assert text.count("<line") >= 6
        assert text.count("data:image/jpeg") >= 11

    def test_an_older_version_can_be_asked(self, built: Path, folder: Path) -> None:
        picture = folder / "images" / "object1" / "view0.jpg"
        outcome = cbir("search", built / "store", picture, "--version", 1, "--depth", 1)
        assert outcome.out.split()[-1] == "object1/view0.jpg"
        missing = cbir("search", built / "store", picture, "--version", 9)
        assert missing.code == 1
        assert "has no version 9; published are: 1, 2" in missing.err

    @pytest.mark.parametrize(
        ("picture", "options", "code", "message"),
        [
            ("object1/view0.jpg", ["--box", "1,2,3"], 2, "--box must be X,Y,W,H"),
            ("object1/view0.jpg", ["--box", "900,0,9,9"], 1, "lies outside the query picture"),
            ("object1/none.jpg", [], 1, "cannot read the query picture"),
            ("broken/text.jpg", [], 1, "cannot be used: not_an_image"),
            ("object1/view0.jpg", ["--html", "/nowhere/page.html"], 1, "/nowhere/page.html: No such file"),
        ],
    )
    def test_what_cannot_be_searched_is_an_error(
        self, built: Path, folder: Path, picture: str, options: list[str], code: int, message: str
    ) -> None:
        outcome = cbir("search", built / "store", folder / "images" / picture, *options)
        assert outcome.code == code
        assert f"error: {message}" in outcome.err or message in outcome.err

    def test_keys_are_printed_as_they_are(self, own: Path, folder: Path, tmp_path: Path) -> None:
        """Brackets and colons in keys are no markup, and a narrow terminal does not break them."""
        images = tmp_path / "odd"
        images.mkdir()
        key = f"[bold]holiday[bold] :smile: {'long ' * 30}.jpg"
        (images / key).write_bytes((folder / "images" / "object0" / "view0.jpg").read_bytes())
        store = tmp_path / "odd-index"
        options = ["--images", images, "--store", store, "--set", "channels.local.encoders.1.words=1"]
        assert cbir("index", own, *options).code == 0
        assert key in cbir("search", store, images / key, width=40).out

    @pytest.mark.parametrize("index", ["nowhere", "nowhere.yaml"])
    def test_no_index_is_a_wrong_command(self, index: str, folder: Path) -> None:
        assert cbir("search", index, folder / "images" / "object1" / "view0.jpg").code == 2

    def test_an_empty_folder_has_no_version(self, tmp_path: Path, folder: Path) -> None:
        outcome = cbir("search", tmp_path, folder / "images" / "object1" / "view0.jpg")
        assert outcome.code == 1
        assert "run `cbir index` first" in outcome.err


class TestEvaluate:
    def test_a_folder_and_a_yaml_give_the_same_figures(self, built: Path, folder: Path, tmp_path: Path) -> None:
        figures = []
        for number, arguments in enumerate([[built / "store", "--ground-truth", folder / "truth.csv"],
                                            [built / "config.yaml"]]):  # fmt: skip
            target = tmp_path / f"{number}.json"
            outcome = cbir("evaluate", *arguments, "--json", target, "--report", tmp_path / "report")
            assert outcome.code == 0, outcome.err
            assert outcome.out.strip().endswith("report.html")
            figures.append(json.loads(target.read_text()))
            assert 0 < figures[-1].pop("median_ms") <= figures[-1].pop("p99_ms")
        assert figures[0] == figures[1]
        assert figures[0]["bytes_per_image"] > 0
        assert figures[0]["ann_recall"]["local"]["10"] == 1.0
        assert figures[0]["map"] > 0.9
        assert figures[0]["recall_at_1"] == 1.0
        assert figures[0]["version"] == 2
        assert "object" in (tmp_path / "report" / "report.html").read_text()

    def test_graded_labels_follow_the_protocol(self, built: Path, folder: Path, tmp_path: Path) -> None:
        """Oxford-style: an easy answer that is found first, a hard one that is another object, the rest is junk."""
        names = [f"object{number}/view{seen}.jpg" for number in range(4) for seen in range(5)]
        label = {"bbx": [0, 0, 160, 160], "easy": [1], "hard": [16], "junk": [2, 3, 4]}
        truth = {"imlist": names, "qimlist": [names[0]], "gnd": [label]}
        (tmp_path / "gnd.json").write_text(json.dumps(truth))
        found = {}
        for protocol in ("easy", "medium", "hard"):
            outcome = cbir(
                "evaluate", built / "store", "--ground-truth", tmp_path / "gnd.json", "--protocol", protocol,
                "--json", tmp_path / "out.json", "--report", tmp_path / "report",
            )  # fmt: skip
            assert outcome.code == 0, outcome.err
            found[protocol] = json.loads((tmp_path / "out.json").read_text())
        assert found["easy"]["map"] == found["easy"]["recall_at_1"] == 1.0
        assert found["hard"]["recall_at_1"] == 0.0
        assert 0 < found["hard"]["map"] < found["medium"]["map"] < 1

    def test_without_ground_truth_it_says_how_to_give_one(self, own: Path) -> None:
        outcome = cbir("evaluate", own)
        assert outcome.code == 2
        assert "--ground-truth FILE" in outcome.err


class TestVerify:
    def test_a_whole_version_is_accepted(self, built: Path) -> None:
        outcome = cbir("verify", built / "store", "--version", 1)
        assert outcome.code == 0
        assert re.search(r"version 1 is whole: \d+ files, 42 images = 40 indexed \+ 2 quarantined", outcome.out)

    @pytest.mark.parametrize("role", ["ids", "index", "features", "quarantine", "encoder-1"])
    @pytest.mark.parametrize("damage", ["flip", "remove", "cut"])
    def test_damage_is_found_and_healed(self, own: Path, role: str, damage: str) -> None:
        store = own.parent / "own"
        file = next(f for f in Versions(open_store(str(store))).load().files if f.role == role)
        path, good = store / file.key, (store / file.key).read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(good[:-1] if damage == "cut" else good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        outcome = cbir("verify", store)
        assert outcome.code == 1
        assert outcome.err.count(f"{file.key} ") == 1
        assert "verify --repair" in outcome.err
        repaired = cbir("verify", store, "--repair")
        assert repaired.code == 0
        assert f"forgot {file.key.rpartition('/')[0]}/" in repaired.out
        assert cbir("index", own).code == 0
        assert path.read_bytes() == good
        assert cbir("verify", store).code == 0


class TestVersions:
    def test_lists_them_and_marks_the_current_one(self, built: Path) -> None:
        rows = [line.split() for line in cbir("versions", built / "store").out.splitlines()]
        assert rows[0] == ["version", "created", "indexed", "quarantined", "size", "mAP"]
        assert [row[0] for row in rows[1:]] == ["1", "*"]
        assert rows[2][1] == "2"
        assert rows[1][2:4] == ["40", "2"]

    def test_rollback_pin_and_gc(self, own: Path, folder: Path) -> None:
        store, picture = own.parent / "own", folder / "images" / "object0" / "view3.jpg"
        for seed in (1, 2, 3):
            assert cbir("index", own, "--set", f"sample.seed={seed}", "--set", "sample.images=4").code == 0
        found = Versions(open_store(str(store)))
        assert found.numbers() == [1, 2, 3, 4]
        assert cbir("rollback", store, "--to", 3).code == 0
        assert cbir("rollback", store, "--to", 7).code == 1
        assert cbir("pin", store, "--version", 1).code == 0
        assert cbir("pin", store, "--version", 9).code == 1
        assert cbir("versions", store).out.splitlines()[1].split()[0] == "p"

        before = sum(1 for path in store.rglob("*") if path.is_file())
        dry = cbir("gc", store, "--keep", 0)
        assert re.match(r"would delete \(add --delete\): [1-9]\d* objects", dry.out)
        assert sum(1 for path in store.rglob("*") if path.is_file()) == before
        assert cbir("gc", store, "--keep", 0, "--delete").out.startswith("deleted: ")
        assert found.numbers() == [1, 3]
        for version in (1, 3):
            assert cbir("verify", store, "--version", version).code == 0
            assert cbir("search", store, picture, "--version", version, "--depth", 1).out.split()[-1] == "view3.jpg"
        assert cbir("gc", store, "--keep", 0).out.startswith("would delete (add --delete): 0 objects")

        assert cbir("unpin", store, "--version", 1).code == 0
        assert cbir("gc", store, "--keep", 0, "--delete").code == 0
        assert found.numbers() == [3]

    def test_gc_waits_for_a_run_that_is_alive(self, own: Path) -> None:
        store = open_store(str(own.parent / "own"))
        with lease(store, "cbir index of somebody"):
            outcome = cbir("gc", own, "--delete")
        assert outcome.code == 1
        assert "being written by cbir index of somebody" in outcome.err
        assert cbir("gc", own, "--delete").code == 0

    def test_a_dry_run_says_whose_work_it_counts(self, tmp_path: Path) -> None:
        with lease(open_store(str(tmp_path)), "cbir index of somebody"):
            outcome = cbir("gc", tmp_path)
        assert outcome.out.startswith("would delete (add --delete): 0 objects")
        assert "this counts what cbir index of somebody (process" in outcome.err

    def test_unlock_frees_the_lease_of_a_run_that_died_elsewhere(self, tmp_path: Path) -> None:
        assert cbir("unlock", tmp_path).out == "nobody held the lease\n"
        held_elsewhere(open_store(str(tmp_path)))
        assert cbir("unlock", tmp_path).out == "freed the lease of cbir index (process 71 on node-7)\n"
        with lease(open_store(str(tmp_path)), "cbir index"):
            assert cbir("unlock", tmp_path).err.startswith("error: file://")


def test_export_names_its_files(built: Path, tmp_path: Path) -> None:
    outcome = cbir("export", built / "store", tmp_path / "out", "--format", "parquet", width=20)
    assert outcome.out.split() == [str(tmp_path / "out" / "vectors.parquet")]
    assert cbir("export", built / "store", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vectors.parquet", "index.faiss", "ids.parquet"}
    wrong = cbir("export", built / "store", tmp_path / "out", "--channel", "lcal")
    assert wrong.code == 2
    assert "did you mean 'local'?" in wrong.err


class TestSchemaAndMethods:
    @pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
    def test_shipped_configurations_fit_the_schema(self, path: Path) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        schema = json.loads(cbir("schema").out)
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        data = yaml.safe_load(path.read_text())
        validator.validate(data)
        assert not validator.is_valid({**data, "chanels": {}})
        name = next(iter(data["channels"]))
        data["channels"][name]["extractor"]["nonsense"] = 1
        assert not validator.is_valid(data)

    def test_an_editor_finds_words_for_every_key_and_method(self) -> None:
        schema = json.loads(cbir("schema").out)
        for name, place in schema["$defs"].items():
            assert place["description"], name
        sections = {"input", "limits", "sample", "search", "evaluate", "pools", "images", "store", "channels"}
        for key, place in schema["properties"].items():
            words = place.get("description") or schema["$defs"][place["$ref"].rpartition("/")[2]]["description"]
            assert len(words) > 10, key
        assert sections <= set(schema["properties"])

    def test_methods_have_papers_and_fields(self) -> None:
        everything = cbir("methods")
        assert everything.code == 0
        one = cbir("methods", "encoder")
        assert "vlad" in one.out
        assert "words (64)" in one.out
        assert "dim (required)" in one.out
        assert "Aggregating local descriptors" in one.out
        assert "vlad" in everything.out
        assert "ransac" not in one.out
        wrong = cbir("methods", "encodr")
        assert wrong.code == 2
        assert "did you mean 'encoder'?" in wrong.err


@pytest.mark.service
class TestProcess:
    def test_ctrl_c_exits_with_130_and_the_next_run_goes_on(
        self, settings: Settings, tmp_path: Path, folder: Path
    ) -> None:
        path = write_config(tmp_path / "config.yaml", settings(store=str(tmp_path / "store")))
        slow = "import time, pipelines.extract as e\nrun = e.ExtractTask.run\n" + (
            "def later(self, worker):\n    print('extracting', flush=True)\n    time.sleep(20)\n"
            "    return run(self, worker)\ne.ExtractTask.run = later\nfrom pipelines.cli import main\nmain()"
        )
        command = [sys.executable, "-c", slow, "index", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "extracting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "error: interrupted; run the same command again to go on"
        assert "Traceback" not in errors
        writer = writer_of(open_store(str(tmp_path / "store")))
        assert writer is not None
        assert writer.owner == "", "its lease is free"
        assert cbir("index", path).code == 0

    def test_a_run_on_ray_says_nothing_but_its_progress(self, settings: Settings, tmp_path: Path) -> None:
        path = write_config(tmp_path / "config.yaml", settings(store=str(tmp_path / "store"), workers=1))
        command = [sys.executable, "-m", "pipelines.cli", "index", str(path)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        stages = [line.split()[0] for line in done.stderr.splitlines()]
        assert list(dict.fromkeys(stages)) == [
            "plan", "workers", "extract", "sample", "train", "build", "catalog", "merge", "evaluate", "publish",
        ]  # fmt: skip
