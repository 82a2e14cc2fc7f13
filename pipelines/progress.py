"""What a run shows while it runs: a live table on a terminal, one line every ten seconds elsewhere."""

import threading
import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.work import PHASES, Report, Task

__all__ = ["RunProgress", "StageFigures"]

LINE_EVERY_S = 10.0
_LOOK_EVERY_S = 1.0


@dataclass
class StageFigures:
    """What is known about one stage of a run; seconds by phase are summed over its workers."""

    name: str
    num_tasks: int | None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    done: int = 0
    reused: int = 0
    images: int = 0
    quarantined: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def wall_s(self) -> float:
        """Seconds since it began, or that it took."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

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

    def add(self, report: Report, *, reused: bool) -> None:
        """Count a finished task."""
        self.done += 1
        self.quarantined += report.done.counts.get("quarantined", 0)
        if reused:
            self.reused += 1
            return
        self.images += report.done.counts.get("images", 0)
        for phase, seconds in report.seconds.items():
            self.seconds[phase] += seconds


class RunProgress:
    """Shows the stages of a run on a console; use it as a context manager.

    A thread of its own keeps the figures moving while the run lists, or works on a long task in this process.
    """

    def __init__(self, console: Console) -> None:
        self.stages: list[StageFigures] = []
        self._console = console
        self._live: Live | None = None
        self._lines = threading.Lock()
        self._last_line = time.monotonic()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look_again_and_again, name="cbir progress", daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()
        self._ended.set()
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str, num_tasks: int | None) -> None:
        """A stage begins, and the one before it has ended."""
        self._end_stage()
        self.stages.append(StageFigures(name, num_tasks))

    def report(self, task: Task, report: Report, *, reused: bool) -> None:  # noqa: ARG002
        """A task has ended, or was found done."""
        self.stages[-1].add(report, reused=reused)

    def tick(self) -> None:
        """Print a line if ten seconds have passed; the table refreshes itself."""
        with self._lines:
            if self._live is None and self.stages and time.monotonic() - self._last_line >= LINE_EVERY_S:
                self._print_line()

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _look_again_and_again(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self.tick()

    def _end_stage(self) -> None:
        with self._lines:
            if self.stages and self.stages[-1].ended is None:
                self.stages[-1].ended = time.monotonic()
                if self._live is None:
                    self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
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
        _duration(stage.wall_s),
        "" if eta is None else _duration(eta),
        " ".join(f"{phase} {share:.0%}" for phase, share in stage.shares.items() if share >= 0.005),
    ]


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
