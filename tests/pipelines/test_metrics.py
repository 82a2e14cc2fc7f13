"""What Prometheus reads about a build, in a file and at a port, and the dashboard that shows it."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cbir.artifacts import Done, StoredFile
from cbir.errors import ConfigError
from cbir.versions import Manifest
from pipelines import metrics
from pipelines.metrics import BuildMetrics, MetricsFile, metrics_at
from pipelines.progress import LogProgress
from pipelines.runs import WatchedRun
from pipelines.service import Metrics
from pipelines.work import Report, Task
from tests.conftest import PROJECT

TASK = Task.__new__(type("AnyTask", (Task,), {"stage": "extract", "run": lambda self, worker: None}))
MANIFEST = Manifest(7, "c", {}, (), {}, {"images": 10, "indexed": 9}, ())


def report(images: int, num_bytes: int, **seconds: float) -> Report:
    file = StoredFile("features", "k", num_bytes, "0" * 64)
    return Report(Done("extract", "f", (file,), {"images": images, "quarantined": 1, "bytes": 7}), seconds)


@pytest.fixture
def run() -> WatchedRun:
    return WatchedRun("index", "s3://me:hunter2@bucket/index", LogProgress())


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """By name and labels, without the store's; a series that stands twice is an error."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.labels["store"] == "s3://***@bucket/index"
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "store")
            assert (sample.name, labels) not in found
            found[sample.name, labels] = sample.value
    return found


class TestBuildMetrics:
    def test_figures_are_those_of_the_stages(self, run: WatchedRun) -> None:
        run.stage("plan", None)
        run.stage("extract", 3)
        run.report(TASK, report(40, 1000, read=1.0, device=3.0), reused=False)
        run.report(TASK, report(60, 9000), reused=True)
        found = samples(BuildMetrics(run).registry)
        assert found["cbir_build_tasks_done_total", "stage=extract"] == 2
        assert found["cbir_build_tasks_reused_total", "stage=extract"] == 1
        assert found["cbir_build_images_total", "stage=extract"] == 40
        assert found["cbir_build_images_reused_total", "stage=extract"] == 60
        assert found["cbir_build_quarantined_total", "stage=extract"] == 2
        assert found["cbir_build_read_bytes_total", "stage=extract"] == 7
        assert found["cbir_build_written_bytes_total", "stage=extract"] == 1000
        assert found["cbir_build_phase_seconds_total", "phase=device,stage=extract"] == 3.0
        assert found["cbir_build_running", ""] == 1
        assert found["cbir_build_outcome", "outcome=running"] == 1
        assert ("cbir_build_tasks_done_total", "stage=plan") not in found
        assert ("cbir_build_stage_seconds", "stage=plan") in found
        assert ("cbir_build_version", "") not in found
        assert ("cbir_build_last_success_timestamp_seconds", "") not in found

    def test_rounds_of_a_stage_are_one_series(self, run: WatchedRun) -> None:
        for name in ("codebook", "codebook, round 1 of 2", "codebook, round 1 of 2", "codebook, round 2 of 2"):
            run.stage(name, 1)
            run.report(TASK, report(1, 10), reused=False)
        assert samples(BuildMetrics(run).registry)["cbir_build_tasks_done_total", "stage=codebook"] == 4

    def test_a_run_that_is_over(self, run: WatchedRun) -> None:
        run.decided("local", "append", error=0.25, reason="it fits")  # type: ignore[arg-type]
        run.counted(added=3)
        run.published(MANIFEST)
        run.ended(None)
        found = samples(BuildMetrics(run, last_success=5.0).registry)
        assert found["cbir_build_version", ""] == 7
        assert found["cbir_build_running", ""] == 0
        assert (found["cbir_build_count", "what=indexed"], found["cbir_build_count", "what=added"]) == (9, 3)
        assert found["cbir_build_decision", "choice=append,decision=local"] == 1
        shown = {labels: value for (name, labels), value in found.items() if name == "cbir_build_decision_figure"}
        assert shown == {"decision=local,figure=error": 0.25}
        assert found["cbir_build_last_success_timestamp_seconds", ""] == pytest.approx(run.started + run.wall_s)

    def test_a_failure_keeps_the_last_success(self, run: WatchedRun) -> None:
        run.ended(RuntimeError("disk"))
        found = samples(BuildMetrics(run, last_success=5.0).registry)
        assert found["cbir_build_outcome", "outcome=failed"] == 1
        assert found["cbir_build_last_success_timestamp_seconds", ""] == 5.0


class TestFile:
    def test_the_last_success_stays_through_a_failed_run(self, run: WatchedRun, tmp_path: Path) -> None:
        path = tmp_path / "cbir.prom"
        file = MetricsFile(path, run)
        run.published(MANIFEST)
        run.ended(None)
        file.write()
        success = run.started + run.wall_s
        after = WatchedRun("index", "s3://me:hunter2@bucket/index", LogProgress())
        again = MetricsFile(path, after)
        after.ended(RuntimeError("disk"))
        again.write()
        (line,) = re.findall(r"^cbir_build_last_success_timestamp_seconds\{.*\} (.*)$", path.read_text(), re.MULTILINE)
        assert float(line) == pytest.approx(success)
        assert list(tmp_path.iterdir()) == [path]
        other = MetricsFile(path, WatchedRun("index", "elsewhere", LogProgress()))
        other.write()
        assert "last_success_timestamp_seconds{" not in path.read_text()

    def test_is_written_again_after_a_while(
        self, run: WatchedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "cbir.prom"
        file = MetricsFile(path, run)
        run.stage("extract", 1)
        file.tick()
        assert "extract" not in path.read_text()
        monkeypatch.setattr(metrics, "WRITE_EVERY_S", 0.0)
        file.tick()
        assert "extract" in path.read_text()

    def test_a_place_that_cannot_be_written_is_refused_at_once(self, run: WatchedRun, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--metrics-file .*/none/cbir.prom: cannot be written \(No such file"):
            MetricsFile(tmp_path / "none" / "cbir.prom", run)

    def test_later_it_is_one_warning(self, run: WatchedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr(WatchedRun, "say", lambda self, text: said.append(text))
        (tmp_path / "folder").mkdir()
        file = MetricsFile(tmp_path / "folder" / "cbir.prom", run)
        (tmp_path / "folder" / "cbir.prom").unlink()
        (tmp_path / "folder").rmdir()
        file.write()
        file.write()
        assert [text.partition(" (")[0] for text in said] == [
            f"warning: {tmp_path / 'folder' / 'cbir.prom'} cannot be written any more"
        ]


class TestPort:
    def test_serves_on_this_machine_until_the_run_ends(self, run: WatchedRun) -> None:
        with metrics_at("0", run) as url:
            assert url.startswith("http://127.0.0.1:")
            run.stage("extract", 1)
            with urllib.request.urlopen(url, timeout=20) as answer:
                assert "cbir_build_running{" in answer.read().decode()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(url, timeout=20)

    @pytest.mark.parametrize("address", ["http", "127.0.0.1:", "70000", "-1"])
    def test_an_address_that_is_none(self, address: str, run: WatchedRun) -> None:
        with pytest.raises(ConfigError, match=r"--metrics-port must be PORT or HOST:PORT"), metrics_at(address, run):
            pass

    def test_a_port_that_is_taken(self, run: WatchedRun) -> None:
        with metrics_at("0", run) as url:
            port = url.rpartition(":")[2].partition("/")[0]
            with pytest.raises(ConfigError, match="cannot listen there"), metrics_at(port, run):
                pass


class TestDashboard:
    @pytest.fixture
    def dashboard(self) -> Any:
        return json.loads((PROJECT / "deploy" / "grafana" / "cbir.json").read_text())

    @pytest.fixture
    def exported(self) -> set[str]:
        """Every name that the build and the service export, as a query must spell it."""
        build = BuildMetrics(WatchedRun("index", "store", LogProgress())).registry
        service = Metrics(SimpleNamespace(version=1, num_partitions=1)).registry  # type: ignore[arg-type]
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
        families = [family for registry in (build, service) for family in registry.collect()]
        return {f"{family.name}{suffix}" for family in families for suffix in suffixes[family.type]}

    def queries(self, dashboard: Any) -> Iterator[str]:
        for variable in dashboard["templating"]["list"]:
            yield variable.get("definition", "")
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))

    def test_asks_only_for_metrics_that_there_are(self, dashboard: Any, exported: set[str]) -> None:
        asked = {name for query in self.queries(dashboard) for name in re.findall(r"\bcbir_\w+", query)}
        assert asked <= exported
        assert exported - asked <= {"cbir_build_running", "cbir_build_start_timestamp_seconds"} | {
            f"cbir_search_seconds_{kind}" for kind in ("sum", "count")
        }, "what is exported is shown"

    def test_panels_have_their_own_place_and_number(self, dashboard: Any) -> None:
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in dashboard["panels"])
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24

    def test_the_documentation_names_every_metric_of_a_build(self, exported: set[str]) -> None:
        named = set(re.findall(r"^    (cbir_build_\w+)", metrics.__doc__ or "", re.MULTILINE))
        assert named == {name for name in exported if name.startswith("cbir_build_")}
