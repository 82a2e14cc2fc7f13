"""The history of an index: every run leaves one record, whatever becomes of it, and no record stops a run."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from cbir.artifacts import Done, StoredFile, dump_json
from cbir.config import Config
from cbir.errors import DataError, StorageError
from cbir.garbage import garbage
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions
from pipelines import runs
from pipelines.cli import app
from pipelines.runs import RunHistory, WatchedRun
from pipelines.watching import watched
from pipelines.work import Report, Task

MakeConfig = Callable[..., Config]
TASK = Task.__new__(type("AnyTask", (Task,), {"stage": "extract", "run": lambda self, worker: None}))
MANIFEST = Manifest(4, "c", {}, (), {}, {"images": 10, "indexed": 9, "quarantined": 1}, ())


def cbir(*arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def report(images: int, *, recalled: int = 0, worker_s: float = 0.0) -> Report:
    file = StoredFile("features", "k", 500, "0" * 64)
    return Report(Done("extract", "f", (file,), {"images": images}), {"read": 1.0}, worker_s, {"recalled": recalled})


def begin_work(run: WatchedRun) -> None:
    run.stage("plan", None)
    run.stage("workers", None)


@pytest.fixture
def settings_of(config: MakeConfig) -> Config:
    return config()


@pytest.fixture
def store(settings_of: Config) -> Store:
    return open_store(settings_of.store)


def records(store: Store) -> list[dict[str, Any]]:
    return list(RunHistory(store).records())


def fail(settings: Config, error: BaseException, *, at_work: bool = True) -> None:
    """A run that ends with this error, by default after it has begun to work."""
    with watched("index", settings) as run:
        run.stage("plan", None)
        if at_work:
            run.stage("workers", None)
        raise error


def run_until_terminated(settings: Config) -> None:
    with watched("index", settings) as run:
        begin_work(run)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)


def publish_something(store: Store, version: int = 4) -> None:
    store.write("CURRENT", dump_json({"version": version, "manifest_sha256": "", "epoch": 1, "write_id": ""}))


class TestOutcome:
    def test_a_run_is_recorded_with_what_it_did_and_what_it_came_to(self, settings_of: Config, store: Store) -> None:
        with watched("reindex", settings_of) as run:
            begin_work(run)
            run.stage("extract", 3)
            run.report(TASK, report(6, recalled=4, worker_s=2.5), reused=False)
            run.report(TASK, report(10), reused=True)
            run.counted(added=1, deleted=2)
            run.decided("local", "append", error=np.float32(0.25), limit=1.5)  # a number of numpy is no number of JSON
            run.published(MANIFEST)
        (record,) = records(store)
        assert (record["command"], record["outcome"], record["version"]) == ("reindex", "published", 4)
        assert record["counts"] == {"images": 10, "indexed": 9, "quarantined": 1, "added": 1, "deleted": 2}
        assert record["decisions"] == {"local": {"choice": "append", "error": 0.25, "limit": 1.5}}
        assert record["reused_share"] == 14 / 16
        assert (record["worker_s"], record["processor_s"] > 0, record["wall_s"] > 0) == (2.5, True, True)
        extract = record["stages"][-1]
        assert (extract["stage"], extract["done"], extract["reused"], extract["written_bytes"]) == (
            "extract",
            2,
            1,
            500,
        )
        assert re.fullmatch(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{8}", record["id"])
        assert record["started"].replace("-", "").replace(":", "")[:-1] == record["id"].partition(".")[0]

    def test_the_version_that_was_there_before_is_no_new_one(self, settings_of: Config, store: Store) -> None:
        publish_something(store)
        with watched("index", settings_of) as run:
            run.published(MANIFEST)
        assert records(store)[0]["outcome"] == "unchanged"

    @pytest.mark.parametrize(
        ("error", "outcome", "text"),
        [
            (DataError("7 of 10 images could not be used"), "failed", "7 of 10 images could not be used"),
            (RuntimeError("odd"), "failed", "RuntimeError: odd"),
            (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        ],
    )
    def test_a_run_that_ends_badly_says_how(
        self, error: BaseException, outcome: str, text: str, settings_of: Config, store: Store
    ) -> None:
        with pytest.raises(type(error)):
            fail(settings_of, error)
        (record,) = records(store)
        assert (record["outcome"], record["error"], record["version"]) == (outcome, text, None)
        assert [stage["stage"] for stage in record["stages"]] == ["plan", "workers"]

    def test_a_scheduler_that_ends_a_run_interrupts_it(self, settings_of: Config, store: Store) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run_until_terminated(settings_of)
        assert (records(store)[0]["outcome"], records(store)[0]["error"]) == (
            "interrupted",
            "KeyboardInterrupt: SIGTERM",
        )
        assert signal.getsignal(signal.SIGTERM) == before

    def test_ray_does_not_take_the_signal(self, settings_of: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own start ends the process on the spot when a scheduler ends it."""
        from pipelines import cluster

        def init(**_: object) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        monkeypatch.setattr(cluster, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
        with watched("index", settings_of):
            ours = signal.getsignal(signal.SIGTERM)
            assert cluster.connect(None, 1)
            assert callable(ours)
            assert signal.getsignal(signal.SIGTERM) == ours

    def test_the_middle_of_a_very_long_error_is_left_out(self, settings_of: Config, store: Store) -> None:
        with pytest.raises(DataError):
            fail(settings_of, DataError("first " + "x" * 9000 + " last"))
        text = records(store)[0]["error"]
        assert text.startswith("first ")
        assert text.endswith(" last")
        assert len(text) < 2100

    def test_a_wrong_name_makes_no_store(self, settings_of: Config) -> None:
        with pytest.raises(DataError):
            fail(settings_of, DataError("nothing lies under /nowhere"), at_work=False)
        assert not Path(settings_of.store).exists()

    def test_an_index_whose_source_is_gone_keeps_a_record_of_it(self, settings_of: Config, store: Store) -> None:
        publish_something(store)
        with pytest.raises(DataError):
            fail(settings_of, DataError("nothing lies under /nowhere"), at_work=False)
        assert records(store)[0]["error"] == "nothing lies under /nowhere"


class TestNoRecordStopsARun:
    def test_a_store_that_cannot_be_written_at_the_end_is_a_warning(
        self, settings_of: Config, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(self: RunHistory, key: str, record: object) -> None:
            raise StorageError("no space is left")

        monkeypatch.setattr(RunHistory, "write", refuse)
        with watched("index", settings_of) as run:
            begin_work(run)
            run.published(MANIFEST)
        assert records(store) == []

    def test_the_warning_says_what_is_missing(self, settings_of: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []

        def refuse(self: RunHistory, key: str, record: object) -> None:
            raise StorageError("no space is left")

        monkeypatch.setattr(RunHistory, "write", refuse)
        monkeypatch.setattr(WatchedRun, "say", lambda self, text: said.append(text))
        with watched("index", settings_of) as run:
            begin_work(run)
        assert said == [f"warning: this run is missing in the history of {settings_of.store}: no space is left"]

    def test_a_store_that_cannot_be_asked_at_the_start_leaves_the_error_to_the_run(
        self, settings_of: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: Versions) -> None:
            raise StorageError("the server is away")

        monkeypatch.setattr(Versions, "current", refuse)
        with pytest.raises(DataError, match="its own"), watched("index", settings_of):
            raise DataError("its own error")
        assert not Path(settings_of.store).exists()

    def test_credentials_of_the_environment_are_not_written(
        self, settings_of: Config, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'wJalr"XUtn/FEMI')
        with pytest.raises(DataError):
            fail(settings_of, DataError('with wJalr"XUtn/FEMI at https://me:hunter2@host/x'))
        text = "".join(store.read(info.key).decode() for info in store.list("runs/"))
        assert "with *** at https://***@host/x" in text
        assert not {"hunter2", "FEMI"} & set(re.findall(r"\w+", text))


class TestHistory:
    def put(self, store: Store, number: int, **fields: object) -> None:
        record = {"format": 1, "outcome": "running", "renewed": "2026-01-01T00:00:00Z", **fields}
        RunHistory(store).write(f"runs/2026010{number}T000000Z-00000000.json", record)

    def test_a_run_under_way_is_in_it(self, settings_of: Config, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        run = WatchedRun("index", store.uri, _Quiet())
        record = runs.RunRecord(RunHistory(store), run)
        record.tick()
        assert records(store) == [], "it has not begun to work"
        begin_work(run)
        record.tick()
        assert [found["outcome"] for found in records(store)] == ["running"]
        run.stage("extract", 2)
        record.tick()
        assert len(records(store)[0]["stages"]) == 2, "renewed at most once a minute"
        monkeypatch.setattr(runs, "RENEW_EVERY_S", 0.0)
        record.tick()
        assert len(records(store)[0]["stages"]) == 3

    def test_a_run_that_nobody_renews_is_lost(self, store: Store) -> None:
        self.put(store, 1)
        self.put(store, 2, renewed=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self.put(store, 3, outcome="failed")
        assert [record["outcome"] for record in records(store)] == ["lost", "running", "failed"]

    def test_it_keeps_the_newest(self, settings_of: Config, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "KEPT_RUNS", 3)
        for number in range(1, 6):
            self.put(store, number, outcome="done")
        with watched("index", settings_of) as run:
            begin_work(run)
        assert [record["id"][:8] for record in records(store)][:2] == ["20260104", "20260105"]
        assert len(records(store)) == 3

    def test_gc_leaves_it_alone(self, store: Store) -> None:
        self.put(store, 1)
        store.write("stages/extract/f/part-0.parquet", b"unfinished")
        assert [info.key for info in garbage(Versions(store), 0)] == ["stages/extract/f/part-0.parquet"]

    @pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": 1}', b'{"format": 1, "outcome": "running"}'])
    def test_a_damaged_record_hides_no_other(self, damage: bytes, store: Store) -> None:
        store.write("runs/20260101T000000Z-00000000.json", damage)
        self.put(store, 2, outcome="done")
        first, second = records(store)
        assert (first["outcome"], second["outcome"]) == ("unreadable", "done")
        assert "runs/20260101T000000Z-00000000.json is damaged; delete it" in first["error"]

    def test_a_flipped_bit_is_never_taken_for_a_figure(self, settings_of: Config, store: Store) -> None:
        with watched("index", settings_of) as run:
            begin_work(run)
            run.decided("local", "append", error=0.25)
        (whole,) = records(store)
        key = f"runs/{whole['id']}.json"
        data, rng = store.read(key), np.random.default_rng(0)
        outcomes = []
        for place, bit in zip(rng.integers(len(data), size=100), rng.integers(8, size=100), strict=True):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            store.write(key, bytes(flipped))
            (found,) = records(store)
            outcomes.append("same" if found == whole else found["outcome"])
        assert set(outcomes) <= {"same", "unreadable"}
        assert outcomes.count("unreadable") > 80

    def test_a_record_of_a_newer_cbir_says_so(self, store: Store) -> None:
        self.put(store, 1, format=2)
        assert records(store)[0]["error"] == "format 2: update cbir"


class _Quiet:
    """A display that shows nothing."""

    def __init__(self) -> None:
        self.stages: list[Any] = []

    def stage(self, name: str, num_tasks: int | None) -> None:
        from pipelines.progress import StageFigures

        self.stages.append(StageFigures(name, num_tasks))


@pytest.fixture(scope="module")
def built(settings: Callable[..., dict[str, Any]], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that was built, found unchanged, and refused."""
    root = tmp_path_factory.mktemp("runs")
    images = [str(folder / "images" / "object0")]
    (root / "own.yaml").write_text(yaml.safe_dump(settings(store=str(root / "own"), images=images)))
    assert cbir("index", root / "own.yaml", "--metrics-file", root / "cbir.prom").exit_code == 0
    again = cbir("--log-format", "json", "index", root / "own.yaml")
    assert again.exit_code == 0
    (root / "log").write_text(again.stderr)
    assert cbir("index", root / "own.yaml", "--set", "evaluate.floor.ann_recall=2").exit_code != 0
    return root


class TestCommand:
    def test_lists_what_was_run(self, built: Path) -> None:
        done = cbir("runs", built / "own")
        assert done.exit_code == 0, done.stderr
        header, first, second, *_ = [line.split() for line in done.stdout.splitlines()]
        assert header[:5] == ["time", "command", "outcome", "version", "images"]
        assert (first[1:5], first[-1]) == (["index", "published", "1", "5"], "0.0%")
        assert (second[1:5], second[-1]) == (["index", "unchanged", "1", "5"], "100.0%")

    def test_what_went_wrong_is_told_on_a_narrow_terminal_too(
        self, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipelines.history.out", Console(width=60))
        lines = cbir("runs", built / "own").stdout.splitlines()
        told = " ".join(line[lines[0].index("decision") :].strip() for line in lines[3:])
        assert told.startswith("the gate refuses this version: ann_recall of local is 1.0000, the floor is 2.")

    def test_json_has_the_stages(self, built: Path) -> None:
        lines = cbir("runs", built / "own.yaml", "--json").stdout.splitlines()
        first = json.loads(lines[0])
        assert first["stages"][-1]["stage"] == "publish"
        assert [stage["images"] for stage in first["stages"] if stage["stage"] == "extract"] == [5]

    def test_a_log_of_json_holds_nothing_else(self, built: Path) -> None:
        events = [json.loads(line) for line in (built / "log").read_text().splitlines()]
        assert [event["event"] for event in events][:2] == ["stage started", "stage ended"]
        assert (events[-1]["event"], events[-1]["outcome"], events[-1]["version"]) == ("run ended", "unchanged", 1)
        assert {event["stage"] for event in events[:-1]} >= {"plan", "extract", "train", "publish"}

    def test_the_metrics_of_the_run_are_in_the_file(self, built: Path) -> None:
        text = (built / "cbir.prom").read_text()
        label = f'store="{built / "own"}"'
        assert f'cbir_build_images_total{{stage="extract",{label}}} 5.0' in text
        assert f'cbir_build_outcome{{outcome="published",{label}}} 1.0' in text
        assert f'cbir_build_count{{{label},what="indexed"}} 5.0' in text
        assert f"cbir_build_version{{{label}}} 1.0" in text
