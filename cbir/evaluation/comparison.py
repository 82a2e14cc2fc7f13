"""Several configurations side by side: what each one finds, what it costs, and what re-ranking adds."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cbir.evaluation.metrics import Quality
from cbir.evaluation.page import data_uri, write_page

__all__ = ["Comparison", "Figures", "Row", "Table", "write_comparison"]


@dataclass(frozen=True)
class Figures:
    """How good the rankings of one configuration are, and the milliseconds that a query took in the median."""

    map: float
    mp_at_10: float
    recall_at_1: float
    median_ms: float

    @classmethod
    def of(cls, quality: Quality, query_seconds: Sequence[float]) -> "Figures":
        """Of all queries of one ground truth."""
        median_ms = 1000 * float(np.median(query_seconds))
        return cls(quality.mean_average_precision(), quality.mean_precision_at(10), quality.recall_at(1), median_ms)

    @classmethod
    def mean(cls, some: Sequence["Figures | None"]) -> "Figures | None":
        """Of several ground truths; None where one of them has none."""
        held = [astuple(figures) for figures in some if figures is not None]
        return cls(*map(float, np.mean(held, axis=0))) if held and len(held) == len(some) else None

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of `FIGURE_NAMES`."""
        return f"{self.map:.3f}", f"{self.mp_at_10:.3f}", f"{self.recall_at_1:.3f}", f"{self.median_ms:,.1f}"


FIGURE_NAMES = ("mAP", "mP@10", "recall@1", "ms/query")
SIZES = ("index bytes/image", "feature bytes/image")


@dataclass(frozen=True)
class Row:
    """One configuration: its figures, or the error that kept it from having any.

    `before` are the figures before re-ranking, if they were asked for and it re-ranks. The bytes are those of a whole
    version's index, and of the features that it keeps, by image.
    """

    name: str
    ground_truth: str = ""
    figures: Figures | None = None
    before: Figures | None = None
    version: int | None = None
    images: int | None = None
    queries: int | None = None
    index_bytes: float | None = None
    feature_bytes: float | None = None
    error: str = ""

    @property
    def method(self) -> str:
        """The name without its folder: configurations of several collections have it in common."""
        return self.name.rpartition("/")[2]

    @property
    def precision(self) -> str:
        """mAP, and what it was before re-ranking where that is known."""
        if self.figures is None:
            return "failed"
        return f"{self.before.map:.3f} → {self.figures.map:.3f}" if self.before else f"{self.figures.map:.3f}"

    @property
    def milliseconds(self) -> str:
        """Of a query, and without re-ranking where that is known."""
        if self.figures is None:
            return ""
        after = f"{self.figures.median_ms:,.1f}"
        return f"{self.before.median_ms:,.1f} → {after}" if self.before else after

    @property
    def sizes(self) -> tuple[str, str]:
        """Bytes by image, empty where there are none."""
        return _count(self.index_bytes), _count(self.feature_bytes)


def _count(number: float | None) -> str:
    return f"{number:,.0f}" if number else ""


@dataclass(frozen=True)
class Table:
    """A table as it is printed: on a terminal, on a page and as Markdown. The first column is a name."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: ClassVar[Collection[str]] = ("ground truth", "error")

    def markdown(self) -> str:
        """With one line per row."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


@dataclass(frozen=True)
class Comparison:
    """The rows in the order in which the configurations were given."""

    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """Those that could not be measured."""
        return tuple(row for row in self.rows if row.error)

    @cached_property
    def ground_truths(self) -> tuple[str, ...]:
        """The names of the ground truths, in the order of the rows."""
        return tuple(dict.fromkeys(row.ground_truth for row in self.rows if row.ground_truth))

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {"configurations": [asdict(row) for row in self.rows]}

    @property
    def tables(self) -> tuple[Table, ...]:
        """mAP by ground truth, if there are several, and all figures."""
        return tuple(table for table in (self.by_ground_truth(), self.table()) if table is not None)

    def table(self) -> Table:
        """One line per configuration; columns that would be empty are left out."""
        columns = list(zip(*map(_cells, self.rows), strict=True))
        held = [
            number
            for number, column in enumerate(columns)
            if number == 0 or (any(column) and (COLUMNS[number] != "ground truth" or len(self.ground_truths) > 1))
        ]
        rows = zip(*(columns[number] for number in held), strict=True)
        return Table(tuple(COLUMNS[number] for number in held), tuple(rows))

    def by_ground_truth(self) -> Table | None:
        """One line per method: mAP on each ground truth, and the means; None where no method has several of them."""
        methods = tuple(dict.fromkeys(row.method for row in self.rows))
        if len(self.ground_truths) < 2 or len(methods) == len(self.rows):
            return None
        rows = tuple(self._overview(method) for method in methods)
        return Table(("mAP", *self.ground_truths, "mean", *SIZES, "ms/query"), rows)

    def _overview(self, method: str) -> tuple[str, ...]:
        """The means are those of complete lines only: a mean over other sets would mislead."""
        found = {row.ground_truth: row for row in self.rows if row.method == method}
        precisions = (found[truth].precision if truth in found else "" for truth in self.ground_truths)
        if (mean := self._mean(method)) is None:
            return method, *precisions, "", "", "", ""
        return method, *precisions, mean.precision, *mean.sizes, mean.milliseconds

    @property
    def means(self) -> tuple[Row, ...]:
        """The mean of every method over all ground truths; without those that lack one."""
        means = map(self._mean, dict.fromkeys(row.method for row in self.rows))
        return tuple(mean for mean in means if mean is not None)

    def _mean(self, method: str) -> Row | None:
        held = [row for row in self.rows if row.method == method and row.figures is not None]
        if len({row.ground_truth for row in held}) < max(len(self.ground_truths), 1):
            return None
        return Row(
            method,
            figures=Figures.mean([row.figures for row in held]),
            before=Figures.mean([row.before for row in held]),
            index_bytes=float(np.mean([row.index_bytes or 0 for row in held])),
            feature_bytes=float(np.mean([row.feature_bytes or 0 for row in held])),
        )


COLUMNS = (
    "configuration",
    "ground truth",
    *SIZES,
    *(f"{name} before" for name in FIGURE_NAMES),
    *FIGURE_NAMES,
    "error",
)


def _cells(row: Row) -> tuple[str, ...]:
    none = ("",) * len(FIGURE_NAMES)
    before, after = (figures.cells if figures else none for figures in (row.before, row.figures))
    return row.name, row.ground_truth, *row.sizes, *before, *after, row.error


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write `comparison.html`, which needs no other file, and `comparison.json` beside it; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(comparison.to_json(), indent=2) + "\n")
    page = folder / "comparison.html"
    write_page(page, "comparison.html", comparison=comparison, curve=_curve(comparison))
    return page


def _curve(comparison: Comparison) -> str | None:
    """mAP by bytes as a picture, if there are at least two methods to compare."""
    from cbir.evaluation.plots import size_plot

    sized = [row for row in comparison.means if row.index_bytes]
    return data_uri(size_plot(sized), "image/svg+xml") if len(sized) > 1 else None
