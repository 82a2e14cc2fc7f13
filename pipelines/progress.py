"""What a run shows while it runs: a live table on a terminal, one line or JSON object every ten seconds elsewhere."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.logs import log_event
from pipelines.work import PHASES, Report, Task

__all__ = ["LineProgress", "LogProgress", "RunProgress", "StageFigures", "duration"]

LINE_EVERY_S = 10.0
_LOOK_EVERY_S = 1.0


@dataclass
class StageFigures:
    """What is known about one stage of a run; seconds by phase are summed over its workers.

    `images` are those of the tasks that were worked on, `recalled_images` the ones among them that an earlier version
    knew, `found_images` those of the tasks that were found done. `worker_s` is how long workers were busy,
    `processor_s` the processor time of their processes, `read_bytes` the files of the images that they read,
    `written_bytes` what they left in the store.
    """

    name: str
    num_tasks: int | None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    done: int = 0
    reused: int = 0
    images: int = 0
    quarantined: int = 0
    found_images: int = 0
    recalled_images: int = 0
    worker_s: float = 0.0
    processor_s: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def wall_s(self) -> float:
        """Seconds since it began, or that it took."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def reused_images(self) -> int:
        """Images that nothing was done for."""
        return self.found_images + self.recalled_images

    @property
    def images_per_s(self) -> float:
        """Images that were worked on (not reused) by second of wall time."""
        return self.images / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the speed so far; None before the first task has ended, and after the last."""
        worked = self.done - self.reused
        if self.num_tasks is None or not worked or self.ended is not None:
            return None
        return self.wall_s / worked * (self.num_tasks - self.done)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the measured time by phase."""
        total = sum(self.seconds.values())
        return {phase: seconds / total for phase, seconds in self.seconds.items()} if total else {}

    def to_json(self) -> dict[str, Any]:
        """All figures, as a record of the run keeps them."""
        seconds = {f"{phase}_s": round(value, 3) for phase, value in self.seconds.items()}
        return {
            "stage": self.name,
            "tasks": self.num_tasks,
            "done": self.done,
            "reused": self.reused,
            "images": self.images,
            "found_images": self.found_images,
            "recalled_images": self.recalled_images,
            "quarantined": self.quarantined,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "wall_s": round(self.wall_s, 3),
            "worker_s": round(self.worker_s, 3),
            "processor_s": round(self.processor_s, 3),
            **seconds,
        }

    def add(self, report: Report, *, reused: bool) -> None:
        """Count a finished task."""
        self.done += 1
        self.quarantined += report.done.counts.get("quarantined", 0)
        if reused:
            self.reused += 1
            self.found_images += report.done.counts.get("images", 0)
            return
        self.recalled_images += report.tally.get("recalled", 0)
        self.images += report.done.counts.get("images", 0)
        self.worker_s += report.wall_s
        self.processor_s += report.processor_s
        self.read_bytes += report.done.counts.get("bytes", 0)
        self.written_bytes += sum(file.num_bytes for file in report.done.files)
        for phase, seconds in report.seconds.items():
            self.seconds[phase] += seconds


class LineProgress(ABC):
    """Keeps the figures of the stages of a run, and puts out a line about the last one every ten seconds.

    Use it as a context manager. A thread of its own keeps the lines coming while the run lists, or works on a long task
    in this process.
    """

    def __init__(self) -> None:
        self.stages: list[StageFigures] = []
        self._lines = threading.Lock()
        self._last_line = time.monotonic()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look_again_and_again, name="cbir progress", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_stage()
        self._ended.set()

    def stage(self, name: str, num_tasks: int | None) -> None:
        """A stage begins, and the one before it has ended."""
        self.end_stage()
        self.stages.append(StageFigures(name, num_tasks))

    def report(self, task: Task, report: Report, *, reused: bool) -> None:  # noqa: ARG002
        """A task has ended, or was found done."""
        self.stages[-1].add(report, reused=reused)

    def tick(self) -> None:
        """Put out a line if ten seconds have passed."""
        with self._lines:
            if self.stages and time.monotonic() - self._last_line >= LINE_EVERY_S:
                self._put_line()

    @abstractmethod
    def say(self, text: str) -> None:
        """Put out something worth a line."""

    @abstractmethod
    def _line(self) -> None:
        """Put out the figures of the last stage."""

    def _put_line(self) -> None:
        self._last_line = time.monotonic()
        self._line()

    def _look_again_and_again(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self.tick()

    def end_stage(self) -> None:
        """No stage is under way any more."""
        with self._lines:
            if self.stages and self.stages[-1].ended is None:
                self.stages[-1].ended = time.monotonic()
                self._put_line()


class RunProgress(LineProgress):
    """Shows the stages of a run on a console: a live table on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if not self._console.is_terminal:
            return super().__enter__()
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _line(self) -> None:
        if self._live is not None:
            return  # the table refreshes itself
        cells = _cells(self.stages[-1])
        named = zip(_COLUMNS[1:], cells[1:], strict=True)
        self.say(f"{cells[0]:<9} " + "  ".join(f"{name} {cell}" for name, cell in named if cell))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if number in (0, len(_COLUMNS) - 1) else "right", no_wrap=True)
        for stage in list(self.stages):
            table.add_row(*_cells(stage), style="bold" if stage.ended is None else "")
        return table


class LogProgress(LineProgress):
    """Logs the stages of a run as events with their figures."""

    def stage(self, name: str, num_tasks: int | None) -> None:
        """A stage begins."""
        super().stage(name, num_tasks)
        log_event("stage started", {"stage": name, "tasks": num_tasks})

    def say(self, text: str) -> None:
        """Log the text as an event; as a warning where it says that it is one."""
        warning = text.removeprefix("warning: ")
        log_event(warning, level=logging.INFO if warning == text else logging.WARNING)

    def _line(self) -> None:
        stage = self.stages[-1]
        figures = stage.to_json() | {"images_per_s": round(stage.images_per_s, 3), "eta_s": stage.eta_s}
        log_event("progress" if stage.ended is None else "stage ended", figures)


_COLUMNS = ("stage", "tasks", "reused", "images", "images/s", "quarantined", "time", "ETA", "share of time")


def _cells(stage: StageFigures) -> list[str]:
    eta = stage.eta_s
    return [
        stage.name,
        "" if stage.num_tasks is None else f"{stage.done:,}/{stage.num_tasks:,}",
        f"{stage.reused:,}" if stage.reused else "",
        f"{stage.images:,}" if stage.images else "",
        f"{stage.images_per_s:,.1f}" if stage.images else "",
        f"{stage.quarantined:,}" if stage.quarantined else "",
        duration(stage.wall_s),
        "" if eta is None else duration(eta),
        " ".join(f"{phase} {share:.0%}" for phase, share in stage.shares.items() if share >= 0.005),
    ]


def duration(seconds: float) -> str:
    """In words: seconds, minutes and seconds, or hours and minutes."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
