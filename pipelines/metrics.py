"""What Prometheus reads about a build: from a file for node_exporter's textfile collector, or from a port of its own.

All metrics have the label `store`, so that several builds of a machine can stand in one folder of the collector.

    cbir_build_tasks_done_total{stage}               tasks that have ended, or were found done
    cbir_build_tasks_reused_total{stage}             those among them that were found done
    cbir_build_images_total{stage}                   images of the tasks that were worked on
    cbir_build_images_reused_total{stage}            images that an earlier run or version had worked on
    cbir_build_quarantined_total{stage}              images that could not be used
    cbir_build_phase_seconds_total{stage,phase}      time of workers: read, decode, device, write
    cbir_build_read_bytes_total{stage}               files of the images that were read
    cbir_build_written_bytes_total{stage}            what the tasks left in the store
    cbir_build_stage_seconds{stage}                  wall time of a stage
    cbir_build_seconds                               wall time of the run
    cbir_build_start_timestamp_seconds               when it began
    cbir_build_running                               1 while it is under way
    cbir_build_outcome{outcome}                      1 for how it stands: running, published, unchanged, failed ...
    cbir_build_count{what}                           images, indexed, quarantined, added, deleted ... of the version
    cbir_build_version                               the version that it came to
    cbir_build_decision{decision,choice}             1 for what was chosen
    cbir_build_decision_figure{decision,figure}      what spoke for it
    cbir_build_last_success_timestamp_seconds        when a build last came to a version; a file keeps it
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cbir.errors import ConfigError
from pipelines.progress import StageFigures
from pipelines.runs import WatchedRun
from pipelines.work import PHASES

__all__ = ["BuildMetrics", "MetricsFile", "metrics_at"]

WRITE_EVERY_S = 15.0
LOOPBACK = "127.0.0.1"

_LAST_SUCCESS = "cbir_build_last_success_timestamp_seconds"
_STAGE_COUNTERS: Mapping[str, tuple[str, Callable[[StageFigures], float]]] = {
    "tasks_done": ("Tasks that have ended, or were found done.", lambda stage: stage.done),
    "tasks_reused": ("Tasks that were found done.", lambda stage: stage.reused),
    "images": ("Images of the tasks that were worked on.", lambda stage: stage.images),
    "images_reused": ("Images that an earlier run or version had worked on.", lambda stage: stage.reused_images),
    "quarantined": ("Images that could not be used.", lambda stage: stage.quarantined),
    "read_bytes": ("Files of the images that were read.", lambda stage: stage.read_bytes),
    "written_bytes": ("What the tasks left in the store.", lambda stage: stage.written_bytes),
}


class BuildMetrics(Collector):
    """The figures of a run in a registry of its own; they are read when they are asked for."""

    def __init__(self, run: WatchedRun, last_success: float | None = None) -> None:
        self._run, self._last_success = run, last_success
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Every metric as it stands."""
        yield from self._of_stages()
        yield from self._of_the_run()
        yield from self._of_the_version()

    def _of_stages(self) -> Iterator[Metric]:
        stages = _by_name(self._run.stages)
        worked = _by_name([stage for stage in self._run.stages if stage.num_tasks is not None])
        for name, (about, figure) in _STAGE_COUNTERS.items():
            counter = CounterMetricFamily(f"cbir_build_{name}", about, labels=["store", "stage"])
            for stage, parts in worked.items():
                counter.add_metric(self._labels(stage), sum(map(figure, parts)))
            yield counter
        about = "Time of workers by phase."
        phases = CounterMetricFamily("cbir_build_phase_seconds", about, labels=["store", "stage", "phase"])
        seconds = self._gauge("stage_seconds", "Wall time of a stage.", "stage")
        for stage, parts in stages.items():
            seconds.add_metric(self._labels(stage), sum(part.wall_s for part in parts))
        for stage, parts in worked.items():
            for phase in PHASES:
                phases.add_metric(self._labels(stage, phase), sum(part.seconds[phase] for part in parts))
        yield from (phases, seconds)

    def _of_the_run(self) -> Iterator[Metric]:
        run = self._run
        outcome = self._gauge("outcome", "1 for how the run stands.", "outcome")
        outcome.add_metric(self._labels(run.outcome), 1)
        yield outcome
        yield self._one("running", "1 while the run is under way.", float(run.outcome == "running"))
        yield self._one("seconds", "Wall time of the run.", run.wall_s)
        yield self._one("start_timestamp_seconds", "When the run began.", run.started)
        last = run.started + run.wall_s if run.outcome in ("published", "unchanged") else self._last_success
        yield self._one("last_success_timestamp_seconds", "When a build last ended with a version.", last)

    def _of_the_version(self) -> Iterator[Metric]:
        counts = self._gauge("count", "Images and features of the version, and what changed.", "what")
        for what, number in self._run.counts.items():
            counts.add_metric(self._labels(what), number)
        decisions = self._gauge("decision", "1 for what was chosen.", "decision", "choice")
        figures = self._gauge("decision_figure", "What spoke for a decision.", "decision", "figure")
        for name, decision in self._run.decisions.items():
            decisions.add_metric(self._labels(name, decision["choice"]), 1)
            for figure, value in decision.items():
                if isinstance(value, Real):
                    figures.add_metric(self._labels(name, figure), float(value))
        yield from (counts, decisions, figures)
        yield self._one("version", "The version that the run came to.", self._run.version)

    def _labels(self, *values: str) -> list[str]:
        return [self._run.store_uri, *values]

    def _gauge(self, name: str, about: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"cbir_build_{name}", about, labels=["store", *labels])

    def _one(self, name: str, about: str, value: float | None) -> Metric:
        """A gauge without other labels; without a sample where nothing is known."""
        family = self._gauge(name, about)
        if value is not None:
            family.add_metric(self._labels(), value)
        return family


def _by_name(stages: Sequence[StageFigures]) -> dict[str, list[StageFigures]]:
    """Stages of one name are one series; rounds of a stage, which follow a comma, are that stage."""
    found: dict[str, list[StageFigures]] = {}
    for stage in list(stages):
        found.setdefault(stage.name.partition(",")[0], []).append(stage)
    return found


class MetricsFile:
    """The metrics of a run in a file that is whole at any time."""

    def __init__(self, path: Path, run: WatchedRun) -> None:
        self._path, self._run = path, run
        self._metrics = BuildMetrics(run, _last_success(path, run.store_uri))
        self._written = time.monotonic()
        self._is_broken = False
        try:
            write_to_textfile(str(path), self._metrics.registry)
        except OSError as error:
            raise ConfigError(f"--metrics-file {path}: cannot be written ({error.strerror})") from None

    def tick(self) -> None:
        """About a second has passed."""
        if time.monotonic() - self._written >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Replace the file; once it could be written, that it no longer can is a warning."""
        self._written = time.monotonic()
        try:
            write_to_textfile(str(self._path), self._metrics.registry)
            self._is_broken = False
        except OSError as error:
            if not self._is_broken:
                self._run.say(f"warning: {self._path} cannot be written any more ({error.strerror})")
            self._is_broken = True


def _last_success(path: Path, store_uri: str) -> float | None:
    """When the last build succeeded, of the file that the run before has left; None where nothing can be read."""
    with contextlib.suppress(OSError, ValueError):
        for family in text_string_to_metric_families(path.read_text()):
            for sample in family.samples:
                if sample.name == _LAST_SUCCESS and sample.labels.get("store") == store_uri:
                    return float(sample.value)
    return None


@contextlib.contextmanager
def metrics_at(address: str, run: WatchedRun) -> Iterator[str]:
    """Serve the metrics at PORT of this machine alone, or at HOST:PORT; gives the URL. ConfigError if that fails."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--metrics-port must be PORT or HOST:PORT, found {address!r}")
    host = host.strip("[]") or LOOPBACK
    try:
        server, thread = start_http_server(int(port), host, BuildMetrics(run).registry)
    except OSError as error:
        raise ConfigError(f"--metrics-port {address}: cannot listen there ({error.strerror})") from None
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
