"""Everything that watches a run of the command line: the display, its record in the store, its metrics, its log."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.logs import is_json, log_event
from pipelines.terminal import err

if TYPE_CHECKING:
    from cbir.config import Config
    from pipelines.progress import LineProgress
    from pipelines.runs import WatchedRun

__all__ = ["MetricsFileOption", "MetricsPortOption", "display", "watched"]

MetricsFileOption = Annotated[
    Path | None,
    typer.Option("--metrics-file", help="Keep Prometheus metrics of the run in this file, which ends in .prom."),
]
MetricsPortOption = Annotated[
    str | None,
    typer.Option("--metrics-port", metavar="[HOST:]PORT", help="Serve them while it runs, on this machine by default."),
]

_TICK_S = 1.0


def display() -> "LineProgress":
    """What shows a run: a table or lines on the error stream, or events of a log."""
    from pipelines.progress import LogProgress, RunProgress

    return LogProgress() if is_json() else RunProgress(err)


@contextlib.contextmanager
def watched(
    command: str, config: "Config", metrics_file: Path | None = None, metrics_port: str | None = None
) -> "Iterator[WatchedRun]":
    """A run to give to `pipelines.indexing.index` as its progress; however the block ends, the record says so."""
    from cbir.storage import open_store
    from pipelines.metrics import MetricsFile, metrics_at
    from pipelines.runs import RunHistory, RunRecord, WatchedRun

    with contextlib.ExitStack() as watchers:
        run = WatchedRun(command, config.store, watchers.enter_context(display()), is_remote=bool(config.workers))
        record = RunRecord(RunHistory(open_store(config.store)), run)
        ticked = [record.tick]
        if metrics_file is not None:
            file = MetricsFile(metrics_file, run)
            watchers.callback(file.write)
            ticked.append(file.tick)
        if metrics_port is not None:
            run.say(f"metrics at {watchers.enter_context(metrics_at(metrics_port, run))}")
        record.begin()
        watchers.callback(record.end)
        watchers.enter_context(_ticking(ticked))
        watchers.enter_context(_interrupted_by_sigterm())
        try:
            yield run
        except BaseException as error:
            run.ended(error)
            raise
        else:
            run.ended(None)
        finally:
            log_event("run ended", {key: value for key, value in run.to_json().items() if key != "stages"})


@contextlib.contextmanager
def _ticking(ticked: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Call all of them about once a second."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(_TICK_S):
            for call in ticked:
                call()

    thread = threading.Thread(target=tick, name="cbir watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """End by SIGTERM, with which schedulers stop a run, as by Ctrl-C: leases are given back, and the record is written.

    Only the main thread can ask for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt("SIGTERM")
