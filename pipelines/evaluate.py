"""The command that measures: one index with a page of its answers, or several side by side in one table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from cbir.errors import ConfigError
from pipelines.terminal import CONFIG_SUFFIXES, VersionOption, err, fail, open_searcher, out, store_of

if TYPE_CHECKING:
    from cbir.evaluation.comparison import Table as Cells
    from cbir.versions import Manifest
    from pipelines.comparison import Measurement
    from pipelines.quality import Judged

__all__ = ["evaluate"]

Indexes = Annotated[
    list[str],
    typer.Argument(
        metavar="INDEX",
        help="A store (folder or s3:// URI), the YAML that names it, or a folder of YAMLs; several make a table.",
        show_default=False,
    ),
]
Protocol = Literal["easy", "medium", "hard"]


def evaluate(
    indexes: Indexes,
    ground_truth: Annotated[
        str | None, typer.Option("--ground-truth", help="CSV or Oxford-style JSON; default: the YAML's.")
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option("--protocol", help="For graded labels of a JSON; default: the YAML's.")
    ] = None,
    before_reranking: Annotated[
        bool, typer.Option("--before-reranking", help="Judge the rankings before re-ranking too, in one pass.")
    ] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
    report: Annotated[
        Path, typer.Option("--report", help="Folder for report.html and report.json, or comparison.html and .json.")
    ] = Path("report"),
    version: VersionOption = None,
) -> None:
    """Measure a version against ground truth: mAP, mP@k, recall@k, time per query; with a page of pictures.

    Several indexes, or a folder of configurations, make one table, sorted as given. One that cannot be measured is
    named in it with its error; the others go on, and the exit code is 1.

    Example: `cbir evaluate my-index --ground-truth queries.csv --json figures.json`

    Example: `cbir evaluate configs/ --ground-truth queries.csv --before-reranking`
    """
    from pipelines.comparison import Measurement, is_folder_of_configurations

    measurement = Measurement(ground_truth, protocol, before_reranking)
    if len(indexes) > 1 or is_folder_of_configurations(indexes[0]):
        if version is not None:
            raise ConfigError("--version chooses a version of one index, but several are compared")
        _compare(indexes, measurement, as_json, report)
    else:
        _evaluate_one(indexes[0], measurement, as_json, report, version)


def _evaluate_one(
    index: str, measurement: "Measurement", as_json: Path | None, report: Path, version: int | None
) -> None:
    from pipelines.quality import judge
    from pipelines.reporting import search_figures, write_evaluation

    store = store_of(index)
    searcher = open_searcher(store, version)
    settings = searcher.config.evaluate
    if index.endswith(CONFIG_SUFFIXES):
        from cbir.config import load_config

        settings = load_config(index).evaluate
    with err.status("searching") as status:
        judged = judge(
            searcher,
            measurement.truth(settings),
            measurement.protocol or settings.protocol,
            lambda done, total: status.update(f"{done}/{total} queries"),
        )
    figures = _figures(judged, searcher.manifest)
    before = judged.before_reranking if measurement.before_reranking else None
    if before is not None:
        figures["before_reranking"] = before.quality.to_json() | asdict(search_figures(searcher.manifest, before))
    _print_figures(figures)
    page = write_evaluation(report, store, searcher, judged)
    if as_json is not None:
        as_json.write_text(json.dumps(figures, indent=2) + "\n")
    out.print(str(page), soft_wrap=True)


def _figures(judged: "Judged", manifest: "Manifest") -> dict[str, Any]:
    from pipelines.reporting import search_figures

    return {
        **judged.quality.to_json(),
        **asdict(search_figures(manifest, judged)),
        "ann_recall": manifest.quality.get("ann_recall", {}),
        "version": manifest.version,
        **({"backgrounds": dict(judged.backgrounds)} if judged.backgrounds else {}),
    }


def _print_figures(figures: Mapping[str, Any]) -> None:
    """Name and value, and the value before re-ranking where it is known."""
    before = figures.get("before_reranking", {})
    table = Table("figure", "value", *(["before re-ranking"] if before else []), box=None, header_style="dim")
    for name, value in figures.items():
        if name != "before_reranking":
            table.add_row(name, _text(value), *([_text(before.get(name, ""))] if before else []))
    out.print(table)


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _compare(indexes: Sequence[str], measurement: "Measurement", as_json: Path | None, report: Path) -> None:
    from cbir.evaluation.comparison import write_comparison
    from pipelines.comparison import candidates, compare

    with err.status("searching") as status:
        comparison = compare(
            candidates(indexes),
            measurement,
            lambda name, done, total: status.update(f"{name}: {done}/{total} queries"),
        )
    for cells in comparison.tables:
        _print_cells(cells)
    page = write_comparison(report, comparison)
    if as_json is not None:
        as_json.write_text(json.dumps(comparison.to_json(), indent=2) + "\n")
    out.print(str(page), soft_wrap=True)
    if comparison.failed:
        fail(f"{len(comparison.failed)} of {len(comparison.rows)} could not be measured", 1)


def _print_cells(cells: "Cells") -> None:
    table = Table(box=None, header_style="dim")
    for number, name in enumerate(cells.header):
        is_text = number == 0 or name in cells.text_columns
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in cells.rows:
        table.add_row(*row)
    out.print(table)
