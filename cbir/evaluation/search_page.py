"""The page of one search: the query, its ranked results, and the verified matches drawn as lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cbir.evaluation.ground_truth import Box
from cbir.evaluation.page import data_uri, write_page
from cbir.types import Floats

__all__ = ["Matches", "SearchRow", "write_search_page"]

PANEL_HEIGHT, PANEL_GAP = 420.0, 24.0
DRAWN_MATCHES = 150


@dataclass(frozen=True)
class Matches:
    """Verified matches: `points` (M, 4) are x, y in the query and x, y in the result.

    All are pixels of the upright original images, whose sizes are (height, width), as in `ImageBatch`.
    """

    points: Floats
    query_size: tuple[int, int]
    result_size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or self.points.shape[1] != 4:
            raise ValueError(f"matches must be (M, 4), found shape {self.points.shape}")


@dataclass(frozen=True)
class SearchRow:
    """One result: its key, its score, a small upright picture, and the score of each channel that found it."""

    key: str
    score: float
    jpeg: bytes | None = None
    channels: Mapping[str, float] = field(default_factory=dict)
    matches: Matches | None = None


def write_search_page(
    path: Path,
    query_jpeg: bytes,
    results: Sequence[SearchRow],
    title: str = "Search",
    details: Mapping[str, str] | None = None,
    box: Box | None = None,
) -> None:
    """Write one HTML file that needs no other.

    `details` are facts to show beside the query, by name; `box` is the region that was asked for, x, y, width and
    height as shares (0 to 1) of the query's width and height.
    """
    write_page(
        path,
        "search.html",
        title=title,
        details=details or {},
        box=box,
        query=data_uri(query_jpeg),
        results=[
            {"row": row, "picture": data_uri(row.jpeg), "panel": row.matches and _panel(row.matches)} for row in results
        ],
    )


def _panel(matches: Matches) -> dict[str, Any]:
    """Both images side by side at one height, and the lines between them, in units of the drawing."""
    (query_height, query_width), (result_height, result_width) = matches.query_size, matches.result_size
    query_scale, result_scale = PANEL_HEIGHT / query_height, PANEL_HEIGHT / result_height
    left = query_width * query_scale + PANEL_GAP
    chosen = np.linspace(0, len(matches.points) - 1, min(len(matches.points), DRAWN_MATCHES)).astype(np.int64)
    scaled = matches.points[chosen] * [query_scale, query_scale, result_scale, result_scale] + [0, 0, left, 0]
    # A hue that follows the height in the query: neighbours have like colours, and a wrong match stands out.
    hues = scaled[:, 1] / PANEL_HEIGHT * 300
    return {
        "height": PANEL_HEIGHT,
        "width": left + result_width * result_scale,
        "query_width": query_width * query_scale,
        "left": left,
        "result_width": result_width * result_scale,
        "lines": [(*map(float, line), float(hue)) for line, hue in zip(scaled.round(1), hues.round(), strict=True)],
        "total": len(matches.points),
    }
