"""The plots of the report, drawn by matplotlib without a display and returned as SVG; imported when one is written."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbir.evaluation.comparison import Row
from cbir.evaluation.metrics import Quality

__all__ = ["drift_plot", "quality_plots", "size_plot"]

T = TypeVar("T")

ACCENT, INK, GRID = "#2456c5", "#4a5261", "#e6e8ec"
RECALL_DEPTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    # Element names would otherwise be drawn at random, and the same report would have other bytes.
    "svg.hashsalt": "cbir",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.2,
}


def quality_plots(quality: Quality) -> dict[str, bytes]:
    """Caption -> SVG: precision against recall, recall@k, average precisions and first hits of the queries."""
    drawings = {
        "Precision and recall, averaged over the queries": _precision_recall,
        "Queries with a right answer among the first k": _recall_at_k,
        "Average precision of the queries": _average_precisions,
        "Rank of the first right answer": _first_hits,
    }
    with mpl.rc_context(STYLE):
        return {caption: _svg(draw, quality) for caption, draw in drawings.items()}


def size_plot(methods: Sequence[Row]) -> bytes:
    """SVG: mAP by bytes of an image in the index, with a line through the methods that no smaller one equals."""
    with mpl.rc_context(STYLE):
        return _svg(_sizes, methods, (9.2, 5.2))


def drift_plot(errors: Mapping[str, Sequence[float]]) -> bytes:
    """SVG: quantiles of squared distances to the nearest list or word, a line for each name."""
    with mpl.rc_context(STYLE):
        return _svg(_drift, errors)


def _svg(draw: Callable[[Axes, T], None], shown: T, size: tuple[float, float] = (4.6, 2.9)) -> bytes:
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(), shown)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _precision_recall(axes: Axes, quality: Quality) -> None:
    levels = np.linspace(0, 1, 101)
    precision = quality.precision_recall(levels)
    axes.fill_between(levels, precision, color=ACCENT, alpha=0.12, linewidth=0)
    axes.plot(levels, precision, color=ACCENT)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.03))


def _recall_at_k(axes: Axes, quality: Quality) -> None:
    depths = [k for k in RECALL_DEPTHS if k <= max(quality.depth, 1)]
    recall = [quality.recall_at(k) for k in depths]
    axes.plot(depths, recall, color=ACCENT, marker="o", markersize=5)
    axes.set_xscale("log")
    axes.set_xticks(depths, [str(k) for k in depths])
    axes.minorticks_off()
    axes.set(xlabel="k", ylabel="recall@k", ylim=(0, 1.03))


def _average_precisions(axes: Axes, quality: Quality) -> None:
    values = [query.average_precision for query in quality.queries]
    axes.hist(values, bins=20, range=(0, 1), color=ACCENT, rwidth=0.88)
    axes.axvline(float(np.mean(values)), color=INK, linestyle=":", linewidth=1.4)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="average precision (dotted: mean)", ylabel="queries", xlim=(0, 1))


def _first_hits(axes: Axes, quality: Quality) -> None:
    """One bar per range of ranks, doubling; the last bar are the queries that found nothing."""
    edges = [1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025]
    edges = [edge for edge in edges if edge <= quality.depth] + [quality.depth + 1]
    ranks = [query.first_hit_rank for query in quality.queries]
    counts = [*np.histogram([r for r in ranks if r <= quality.depth], edges)[0]] if quality.depth else []
    names = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in itertools.pairwise(edges)]
    misses = sum(not query.ranks for query in quality.queries)
    bars = axes.bar([*names, "none"], [*counts, misses], color=[ACCENT] * len(names) + ["#c2410c"], width=0.86)
    axes.bar_label(bars, padding=2, color=INK, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", labelsize=8, rotation=35 if len(names) > 6 else 0)
    axes.margins(y=0.15)
    axes.set(xlabel="rank of the first positive", ylabel="queries")


def _drift(axes: Axes, errors: Mapping[str, Sequence[float]]) -> None:
    for (name, values), colour in zip(errors.items(), itertools.cycle((INK, ACCENT)), strict=False):
        shares = np.linspace(0, 1, len(values))
        axes.plot(values, shares, color=colour, label=name)
    axes.legend(frameon=False, loc="lower right")
    axes.set(xlabel="squared distance to list or word", ylabel="share of the features", ylim=(0, 1.03))


def _sizes(axes: Axes, methods: Sequence[Row]) -> None:
    axes.set_xscale("log")
    best = 0.0
    front: list[tuple[float, float]] = []
    for method in sorted(methods, key=lambda method: (method.index_bytes or 0.0, method.name)):
        size, precision = method.index_bytes or 0.0, method.figures.map if method.figures else 0.0
        axes.plot([size], [precision], color=ACCENT, marker="o", markersize=5)
        axes.annotate(method.name, (size, precision), (5, 3), textcoords="offset points", fontsize=7)
        if method.before is not None:
            axes.plot([size], [method.before.map], color=ACCENT, marker="o", markersize=5, fillstyle="none")
        if precision > best:
            front, best = [*front, (size, precision)], precision
    axes.plot(*zip(*front, strict=True), color=ACCENT, alpha=0.3)
    axes.set(xlabel="bytes of an image in the index", ylabel="mAP")
