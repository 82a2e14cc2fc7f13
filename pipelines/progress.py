"""What a run shows while it runs: a live table on a terminal, one line every ten seconds elsewhere."""

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.work import PHASES, Report, Task

__all__ = ["RunProgress", "StageFigures"]

LINE_EVERY_S = 10.0


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
        return (self.ended or time.monotonic()) - self.started

    @property
    def images_per_s(self) -> float:
        """Images that were worked on (not reused) by second of wall time."""
        return self.images / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the speed so far; None before the first task has ended."""
        worked = self.done - self.reused
        if self.num_tasks is None or not worked:
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
    """Shows the stages of a run on a console; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self.stages: list[StageFigures] = []
        self._console = console
        self._live: Live | None = None
        self._last_line = 0.0

    def __enter__(self) -> "RunProgress":
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_stage()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def stage(self, name: str, num_tasks: int | None) -> None:
        """A stage begins, and the one before it has ended."""
        self._end_stage()
        self.stages.append(StageFigures(name, num_tasks))
        self._last_line = time.monotonic()
        self.tick()

    def report(self, task: Task, report: Report, *, reused: bool) -> None:  # noqa: ARG002
        """A task has ended, or was found done."""
        self.stages[-1].add(report, reused=reused)
        self.tick()

    def tick(self) -> None:
        """Refresh the table, or print a line if ten seconds have passed."""
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(text, highlight=False)

    def _end_stage(self) -> None:
        if self.stages and self.stages[-1].ended is None:
            self.stages[-1].ended = time.monotonic()
            if self._live is None:
                self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        cells = _cells(self.stages[-1])
        named = zip(_COLUMNS[1:], cells[1:], strict=True)
        text = f"{cells[0]:<9} " + "  ".join(f"{name} {cell}" for name, cell in named if cell)
        self._console.print(text, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if number in (0, len(_COLUMNS) - 1) else "right", no_wrap=True)
        for stage in self.stages:
            table.add_row(*_cells(stage), style="bold" if stage.ended is None else "")
        return table


_COLUMNS = ("stage", "tasks", "reused", "images", "images/s", "quarantined", "time", "ETA", "share of time")


def _cells(stage: StageFigures) -> list[str]:
    total = "" if stage.num_tasks is None else f"{stage.done}/{stage.num_tasks}"
    eta = stage.eta_s if stage.ended is None else None
    shares = " ".join(f"{phase} {share:.0%}" for phase, share in stage.shares.items() if share >= 0.005)
    return [
        stage.name,
        total,
        str(stage.reused or ""),
        f"{stage.images:,}" if stage.images else "",
        f"{stage.images_per_s:,.1f}" if stage.images else "",
        f"{stage.quarantined:,}" if stage.quarantined else "",
        _duration(stage.wall_s),
        _duration(eta) if eta is not None else "",
        shares,
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
