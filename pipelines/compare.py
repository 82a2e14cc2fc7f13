"""The command that compares two versions before a switch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cbir.errors import ConfigError
from pipelines.terminal import err, open_searcher, out, store_of

if TYPE_CHECKING:
    from cbir.evaluation.comparison import Table as Cells
    from cbir.evaluation.side_by_side import SideBySide
    from pipelines.side_by_side import Opened

__all__ = ["compare"]

DEFAULT_QUERIES = 100

What = Annotated[
    list[str],
    typer.Argument(
        metavar="INDEX V1 V2",
        help="A store or the YAML that names it, and two of its versions; or two indexes, whose current versions.",
        show_default=False,
    ),
]


def compare(
    what: What,
    queries: Annotated[
        int | None,
        typer.Option("--queries", min=1, help=f"Ask so many indexed images; {DEFAULT_QUERIES} by default."),
    ] = None,
    ground_truth: Annotated[
        str | None, typer.Option("--ground-truth", help="Ask and judge these queries: CSV or Oxford-style JSON.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with the answers that differ most, as pictures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures and every query as JSON.")] = False,
) -> None:
    """Compare two versions before a switch: what they find, how far they agree, time, bytes, settings.

    Both are asked the same queries in turn: pictures of the collection, drawn by chance, read again; or those of a
    ground truth, which tells what the answers are worth. Indexes of vectors are asked with vectors that they hold.
    Overlap@k is the share of the first k results that both have in common.

    Example: `cbir compare my-index 3 4 --queries 200 --html compare.html`

    Example: `cbir compare old-index new-index --ground-truth queries.csv`
    """
    from pipelines.side_by_side import ask_ground_truth, ask_indexed, write_pictures

    if queries is not None and ground_truth is not None:
        raise ConfigError("--queries asks indexed images, --ground-truth its own queries; give one of the two")
    both = _opened(what)
    with err.status("searching") as status:

        def on_progress(done: int, total: int) -> None:
            status.update(f"{done}/{total} queries")

        if ground_truth is not None:
            found = ask_ground_truth(both, ground_truth, on_progress)
        else:
            found = ask_indexed(both, queries or DEFAULT_QUERIES, on_progress)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)
    if html is not None:
        write_pictures(html, both, found, ground_truth)
        err.print(f"wrote {html}", soft_wrap=True)


def _opened(what: Sequence[str]) -> "tuple[Opened, Opened]":
    """Both versions, with names that tell them apart."""
    from pipelines.side_by_side import Opened

    if len(what) == 3 and all(version.isdigit() for version in what[1:]):
        store = store_of(what[0])
        first, second = (Opened(f"version {v}", store, open_searcher(store, int(v))) for v in what[1:])
    elif len(what) == 2 and not any(index.isdigit() for index in what):
        stores = [(index, store_of(index)) for index in what]
        first, second = (Opened(index, store, open_searcher(store, None)) for index, store in stores)
    else:
        raise ConfigError(
            f"compare INDEX V1 V2, or compare INDEX INDEX; found {' '.join(what)!r}. `cbir versions INDEX` lists them"
        )
    return first, second


def _print(found: "SideBySide") -> None:
    overlap = "  ".join(f"overlap@{k} {share:.3f}" for k, share in found.overlap.items())
    asked = f"of {found.ground_truth}" if found.ground_truth else "of indexed images"
    out.print(
        f"{len(found.asked):,} queries {asked}: {overlap}; {found.images_in_both:,} images are in both\n",
        soft_wrap=True,
    )
    if found.unreadable:
        out.print(f"{found.unreadable:,} more could not be read from the collection again\n")
    _print_cells(found.table())
    if found.settings:
        out.print()
        _print_cells(found.settings_table())


def _print_cells(cells: "Cells") -> None:
    table = Table(box=None, header_style="dim")
    for number, name in enumerate(cells.header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in cells.rows:
        table.add_row(*row)
    out.print(table)
