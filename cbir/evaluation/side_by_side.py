"""Two versions of an index beside each other, before a switch: what they find, how far they agree, what they cost."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cbir.evaluation.comparison import Table
from cbir.evaluation.ground_truth import Box
from cbir.evaluation.page import data_uri, write_page

__all__ = ["Asked", "Setting", "Side", "SideBySide", "differing_settings", "overlap_at", "write_side_by_side"]

OVERLAP_DEPTHS = (1, 5, 10)
SHOWN_RESULTS = 10
_NONE = "–"


def overlap_at(first: Sequence[str], second: Sequence[str], k: int) -> float:
    """The share of the first k results that two rankings have in common; of the longer one, if both are shorter."""
    one, other = set(first[:k]), set(second[:k])
    return len(one & other) / max(len(one), len(other), 1) if one or other else 1.0


@dataclass(frozen=True)
class Setting:
    """A key of the configuration in which two versions differ; None where a version has no such key."""

    path: str
    values: tuple[str | None, str | None]


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Setting, ...]:
    """The keys that differ, as paths with dots, sorted, with their values as JSON."""
    one, other = dict(_flat(first)), dict(_flat(second))
    paths = sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))
    return tuple(Setting(path, (one.get(path), other.get(path))) for path in paths)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    nested = [(f"{path}.{key}" if path else str(key), part) for key, part in items]
    if not nested:
        yield path, json.dumps(value)
    for where, part in nested:
        yield from _flat(part, where)


@dataclass(frozen=True)
class Side:
    """One of the two versions.

    `quality` is what the ground truth says of its answers, empty without one; `recorded` what its build measured.
    `finds_itself` is the share of indexed images that are their own first result, where such were asked.
    """

    name: str
    version: int
    created: str
    counts: Mapping[str, int]
    num_bytes: int
    median_ms: float
    quality: Mapping[str, float]
    recorded: Mapping[str, float]
    finds_itself: float | None = None


@dataclass(frozen=True)
class Asked:
    """One query and the first results of both, without the query itself.

    With ground truth, also its average precisions, and which of these results are `right`.
    """

    name: str
    image: int | None
    box: Box | None
    results: tuple[tuple[str, ...], tuple[str, ...]]
    average_precision: tuple[float, float] | None = None
    right: tuple[str, ...] = ()

    @property
    def overlap(self) -> float:
        """Of the results that are shown."""
        return overlap_at(*self.results, SHOWN_RESULTS)

    @property
    def difference(self) -> tuple[float, float]:
        """How much the answers differ: in precision where that is known, then in what they hold."""
        first, second = self.average_precision or (0.0, 0.0)
        return abs(first - second), 1 - self.overlap


@dataclass(frozen=True)
class SideBySide:
    """Both sides and what they were asked; `images_in_both` are indexed in both.

    `unreadable` images were drawn as queries and could not be read from the collection again.
    """

    sides: tuple[Side, Side]
    asked: tuple[Asked, ...]
    settings: tuple[Setting, ...]
    images_in_both: int
    ground_truth: str | None = None
    unreadable: int = 0

    @cached_property
    def overlap(self) -> dict[int, float]:
        """The mean overlap@k of the answers, by k."""
        return {k: float(np.mean([overlap_at(*asked.results, k) for asked in self.asked])) for k in OVERLAP_DEPTHS}

    def most_different(self, count: int = 6) -> tuple[Asked, ...]:
        """The queries whose answers differ most; without those with the same results in the same order."""
        changed = [asked for asked in self.asked if asked.results[0] != asked.results[1]]
        return tuple(sorted(changed, key=lambda asked: asked.difference, reverse=True)[:count])

    def table(self) -> Table:
        """A line per figure: its name, both values, and the change."""
        rows = [row for name, values in self._figures() if (row := _row(name, *values)) is not None]
        return Table(("figure", *(side.name for side in self.sides), "change"), tuple(rows))

    def settings_table(self) -> Table:
        """A line per key that differs."""
        rows = tuple((setting.path, *(value or _NONE for value in setting.values)) for setting in self.settings)
        return Table(("setting", *(side.name for side in self.sides)), rows)

    def _figures(self) -> Iterator[tuple[str, tuple[float | None, float | None]]]:
        first, second = self.sides
        for name in ("indexed", "quarantined", "features"):
            yield f"images {name}" if name != "features" else name, (first.counts.get(name), second.counts.get(name))
        yield "bytes", (first.num_bytes, second.num_bytes)
        per_image = [side.num_bytes / max(side.counts.get("indexed", 0), 1) for side in self.sides]
        yield "bytes per image", (per_image[0], per_image[1])
        yield "ms per query (median)", (first.median_ms, second.median_ms)
        yield "finds itself first", (first.finds_itself, second.finds_itself)
        for name in dict.fromkeys([*first.quality, *second.quality]):
            yield name, (first.quality.get(name), second.quality.get(name))
        for name in dict.fromkeys([*first.recorded, *second.recorded]):
            yield f"{name}, as built", (first.recorded.get(name), second.recorded.get(name))

    def to_json(self) -> dict[str, Any]:
        """All figures, every query, and the settings that differ."""
        return {
            "sides": [asdict(side) for side in self.sides],
            "ground_truth": self.ground_truth,
            "images_in_both": self.images_in_both,
            "queries": len(self.asked),
            "unreadable": self.unreadable,
            "overlap": {str(k): share for k, share in self.overlap.items()},
            "settings": {setting.path: list(setting.values) for setting in self.settings},
            "asked": [{**asdict(asked), "overlap": asked.overlap} for asked in self.asked],
        }


def _row(name: str, first: float | None, second: float | None) -> tuple[str, ...] | None:
    """None where neither side has the figure; the change is relative for what grows without bound."""
    if first is None and second is None:
        return None
    is_share = all(value is None or (isinstance(value, float) and value <= 1) for value in (first, second))
    cells = [_NONE if value is None else f"{value:.3f}" if is_share else _number(value) for value in (first, second)]
    if first is None or second is None:
        return name, *cells, ""
    if is_share:
        return name, *cells, f"{second - first:+.3f}" if second != first else ""
    return name, *cells, f"{second / first - 1:+.1%}" if first and second != first else ""


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


def write_side_by_side(
    path: Path,
    found: SideBySide,
    picture: Callable[[str], bytes | None],
    query_picture: Callable[[Asked], bytes | None],
) -> None:
    """Write one HTML file that needs no other; pictures are JPEG bytes of small, upright pictures, None without one."""
    cases = [
        {
            "asked": asked,
            "query": data_uri(query_picture(asked)),
            "rows": [
                {"side": side, "results": [_shown(key, other, asked.right, picture) for key in keys]}
                for side, keys, other in zip(found.sides, asked.results, reversed(asked.results), strict=True)
            ],
        }
        for asked in found.most_different()
    ]
    write_page(path, "side_by_side.html", found=found, cases=cases)


def _shown(
    key: str, other: Sequence[str], right: Sequence[str], picture: Callable[[str], bytes | None]
) -> dict[str, Any]:
    """A result, whether it is right, and whether the other side has it too."""
    kinds = [kind for kind, holds in (("positive", key in right), ("only", key not in other)) if holds]
    return {"key": key, "picture": data_uri(picture(key)), "kind": " ".join(kinds)}
