"""The report of a version: what went in, what it cost and how good it is, as one HTML file and the same as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cbir.evaluation.gallery import Gallery, QueryCase
from cbir.evaluation.metrics import Quality
from cbir.evaluation.page import data_uri, write_page

__all__ = [
    "ChannelDecision",
    "Counts",
    "IndexChoice",
    "QuarantineRow",
    "Report",
    "SearchFigures",
    "Since",
    "StageRow",
    "TrialRow",
    "write_report",
]


@dataclass(frozen=True)
class Counts:
    """What a version holds; images = indexed + quarantined."""

    images: int
    indexed: int
    quarantined: int
    features: int
    partitions: int
    bytes: int


@dataclass(frozen=True)
class StageRow:
    """What a stage cost. `shares` says how its workers' time divides, 0 to 1 by name: read, decode, device, write."""

    name: str
    tasks: int
    reused: int
    seconds: float
    images_per_s: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QuarantineRow:
    """Why images could not be used, with the keys of a few of them."""

    reason: str
    images: int
    examples: Sequence[str] = ()


@dataclass(frozen=True)
class TrialRow:
    """An index that was tried on a sample: bytes of a code, lists, probes, recall@10, and the bytes of codes that a
    query reads for every indexed vector."""

    index: str
    bytes: int
    lists: int
    probes: int
    recall: float
    cost: float
    chosen: bool


@dataclass(frozen=True)
class IndexChoice:
    """Which index was chosen for a channel and why, and of how many queries and vectors the trials were."""

    channel: str
    summary: str
    queries: int
    vectors: int
    trials: Sequence[TrialRow]


@dataclass(frozen=True)
class ChannelDecision:
    """What a re-index did about the codebooks of a channel, and why; `errors` are the quantiles, in tenths, of squared
    distances to list or word, by which images they are of."""

    channel: str
    choice: str
    reason: str
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Since:
    """What changed since the version before: images by what became of them, and a decision for each channel."""

    version: int
    images: Mapping[str, int]
    decisions: Sequence[ChannelDecision]


@dataclass(frozen=True)
class SearchFigures:
    """What a query costs in milliseconds, and an image in bytes of the index."""

    median_ms: float
    p99_ms: float
    bytes_per_image: float


@dataclass(frozen=True)
class Report:
    """Everything that a report can show; a section without content is left out.

    `configuration` is YAML text, `created` a time in words, `ann_recall` the recall against exact search by depth,
    `recall_by_effort` recall@10 by the values of a setting, by a name for this.
    """

    title: str
    version: int | None = None
    created: str = ""
    configuration: str = ""
    counts: Counts | None = None
    since: Since | None = None
    stages: Sequence[StageRow] = ()
    quarantine: Sequence[QuarantineRow] = ()
    quality: Quality | None = None
    choices: Sequence[IndexChoice] = ()
    ann_recall: Mapping[int, float] = field(default_factory=dict)
    recall_by_effort: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    search: SearchFigures | None = None
    gallery: Gallery | None = None

    def to_json(self) -> dict[str, Any]:
        """The same without pictures."""
        return {
            "title": self.title,
            "version": self.version,
            "created": self.created,
            "configuration": self.configuration,
            "counts": self.counts and asdict(self.counts),
            "since": self.since and asdict(self.since),
            "stages": [{**asdict(row), "shares": dict(row.shares)} for row in self.stages],
            "quarantine": [{**asdict(row), "examples": list(row.examples)} for row in self.quarantine],
            "quality": self.quality and self.quality.to_json(per_query=True),
            "choices": [asdict(choice) for choice in self.choices],
            "ann_recall": {str(depth): recall for depth, recall in self.ann_recall.items()},
            "recall_by_effort": {
                name: {str(effort): recall for effort, recall in curve.items()}
                for name, curve in self.recall_by_effort.items()
            },
            "search": self.search and asdict(self.search),
            "worst": [case.to_json() for case in self.gallery.worst] if self.gallery else [],
            "best": [case.to_json() for case in self.gallery.best] if self.gallery else [],
        }


def write_report(folder: Path, report: Report) -> Path:
    """Write `report.html`, which needs no other file, and `report.json` beside it; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
    page = folder / "report.html"
    write_page(
        page,
        "report.html",
        report=report,
        quality=report.quality and report.quality.to_json(),
        plots=_plots(report.quality) if report.quality else {},
        drifts=_drifts(report.since) if report.since else {},
        cases=_cases(report.gallery) if report.gallery else [],
    )
    return page


def _plots(quality: Quality) -> dict[str, str | None]:
    from cbir.evaluation.plots import quality_plots

    return {caption: data_uri(svg, "image/svg+xml") for caption, svg in quality_plots(quality).items()}


def _drifts(since: Since) -> dict[str, str | None]:
    from cbir.evaluation.plots import drift_plot

    measured = {decision.channel: decision.errors for decision in since.decisions if decision.errors}
    return {channel: data_uri(drift_plot(errors), "image/svg+xml") for channel, errors in measured.items()}


def _cases(gallery: Gallery) -> list[dict[str, Any]]:
    groups = [("Worst queries", gallery.worst), ("Best queries", gallery.best)]
    return [{"name": name, "rows": [_case(case, gallery) for case in cases]} for name, cases in groups if cases]


def _case(case: QueryCase, gallery: Gallery) -> dict[str, Any]:
    results = [
        {
            "key": key,
            "name": key.rpartition("/")[2],
            "relevance": relevance,
            "picture": data_uri(gallery.picture(key)),
        }
        for key, relevance in case.results
    ]
    picture = data_uri(gallery.query_picture(case.quality.query))
    return {"quality": case.quality, "image": case.quality.query.image, "picture": picture, "results": results}
