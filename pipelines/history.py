"""The command that shows the history of an index."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from pipelines.terminal import IndexOrConfig, out, printable, store_of

__all__ = ["runs"]

_COLUMNS = ("time", "command", "outcome", "version", "images", "wall time", "reused", "decision or error")
_LEAST_WIDTH = 120  # for errors a column of some words; a narrower terminal breaks the lines
_RIGHT = ("version", "images", "wall time", "reused")


def runs(
    index: IndexOrConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run, with its stages.")] = False,
) -> None:
    """List the runs that built this index, also those that failed, the newest last.

    `images` are those of the version; `reused` is the share of them whose features were there already. A run that was
    killed counts as lost when it has been silent for ten minutes. The store keeps the newest 1,000.

    Example: `cbir runs my-index`

    Example: `cbir runs s3://indexes/landmarks --json`
    """
    from pipelines.runs import RunHistory

    records = RunHistory(store_of(index)).records()
    if as_json:
        for record in records:
            print(json.dumps(record))
        return
    table = Table(box=None, header_style="dim")
    for name in _COLUMNS:
        justify: Literal["left", "right"] = "right" if name in _RIGHT else "left"
        table.add_column(name, justify=justify, no_wrap=name != _COLUMNS[-1], overflow="fold")
    for record in records:
        table.add_row(*_cells(record))
    wide = Console(markup=False, emoji=False, highlight=False, width=max(out.width, _LEAST_WIDTH))
    wide.print(table, soft_wrap=True)


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Of one line; what a record does not say is empty."""
    from pipelines.progress import duration

    images, share, wall_s = record.get("counts", {}).get("images"), record.get("reused_share"), record.get("wall_s")
    decisions = ", ".join(f"{name}: {made['choice']}" for name, made in record.get("decisions", {}).items())
    error = printable(record.get("error", "").partition("\n")[0])
    return (
        record.get("started", record["id"]),
        record.get("command", ""),
        record["outcome"],
        _text(record.get("version")),
        "" if images is None else f"{images:,}",
        "" if wall_s is None else duration(wall_s),
        "" if share is None else f"{share:.1%}",
        "; ".join(text for text in (decisions, error) if text),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
