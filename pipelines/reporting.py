"""The pages that the command line writes: the report of an evaluation, and the page of one search."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

from cbir.errors import CbirError
from cbir.evaluation.gallery import Gallery, choose_cases
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery
from cbir.evaluation.report import (
    ChannelDecision,
    Counts,
    IndexChoice,
    QuarantineRow,
    Report,
    SearchFigures,
    Since,
    StageRow,
    TrialRow,
    write_report,
)
from cbir.evaluation.search_page import Matches, SearchRow, write_search_page
from cbir.images import BadImage, View, decode
from cbir.index.choice import Choice
from cbir.index.index import IndexSpec
from cbir.layout import Layout
from cbir.queries import Box
from cbir.rerank.fits import Verifier
from cbir.search import Answer, Searcher
from cbir.storage import Store
from cbir.types import image_id
from cbir.versions import Manifest
from pipelines.progress import StageFigures
from pipelines.quality import Judged

__all__ = ["ledger", "search_figures", "write_evaluation", "write_search"]

THUMBNAIL_PX = 320
EXAMPLES = 5


def ledger(store: Store, manifest: Manifest) -> list[QuarantineRow]:
    """The quarantine of a version by reason: how many images, and the first keys of each."""
    keys: dict[str, int] = defaultdict(int)
    examples: dict[str, list[str]] = defaultdict(list)
    for part in Layout.from_json(manifest.layout).partitions:
        with store.open(part.quarantine) as file:
            rows = pq.read_table(file, columns=["reason", "key"])
        # An image that several channels could not use has a row for each.
        for row in rows.group_by("reason").aggregate([("key", "count_distinct"), ("key", "distinct")]).to_pylist():
            keys[row["reason"]] += row["key_count_distinct"]
            examples[row["reason"]] = sorted([*examples[row["reason"]], *row["key_distinct"]])[:EXAMPLES]
    return [QuarantineRow(reason, keys[reason], examples[reason]) for reason in sorted(keys)]


def write_evaluation(
    folder: Path, store: Store, searcher: Searcher, judged: Judged | None, stages: Sequence[StageFigures] = ()
) -> Path:
    """Write report.html and report.json of a version, and of its answers to a ground truth if there are any."""
    manifest = searcher.manifest
    report = Report(
        title=f"Version {manifest.version} of {store.uri}",
        version=manifest.version,
        created=manifest.created,
        configuration=yaml.safe_dump(dict(manifest.config), sort_keys=False),
        counts=_counts(manifest),
        since=_since(manifest),
        stages=[_stage_row(stage) for stage in stages],
        quarantine=ledger(store, manifest),
        quality=judged.quality if judged else None,
        choices=[_index_choice(name, choice) for name, choice in _choices(manifest).items()],
        ann_recall=_ann_recall(manifest),
        recall_by_effort=_recall_by_effort(searcher),
        search=search_figures(manifest, judged) if judged else None,
        gallery=_gallery(searcher, judged) if judged else None,
    )
    return write_report(folder, report)


def _counts(manifest: Manifest) -> Counts:
    counts = manifest.counts
    return Counts(
        images=counts["images"],
        indexed=counts["indexed"],
        quarantined=counts["quarantined"],
        features=counts["features"],
        partitions=counts["partitions"],
        bytes=sum(file.num_bytes for file in manifest.files),
    )


def _since(manifest: Manifest) -> Since | None:
    """What a re-index found and decided, if one made this version."""
    told = manifest.quality.get("reindex")
    return (
        Since(told["from"], told["images"], [_decision(*item) for item in told["channels"].items()]) if told else None
    )


def _decision(channel: str, told: Mapping[str, Any]) -> ChannelDecision:
    named = {"trained on": told["base"], "new": told["new"]}
    errors = {name: fit["errors"] for name, fit in named.items() if fit is not None}
    return ChannelDecision(channel, told["choice"], told["reason"], errors)


def _stage_row(stage: StageFigures) -> StageRow:
    rate = stage.images_per_s if stage.images else None
    return StageRow(stage.name, stage.done, stage.reused, stage.wall_s, rate, stage.shares)


def _ann_recall(manifest: Manifest) -> dict[int, float]:
    """Of the channel whose index finds least."""
    tables = [recalls for recalls in manifest.quality.get("ann_recall", {}).values() if recalls]
    worst: dict[str, float] = min(tables, key=lambda recalls: float(np.mean(list(recalls.values()))), default={})
    return {int(depth): recall for depth, recall in worst.items()}


def _recall_by_effort(searcher: Searcher) -> dict[str, dict[int, float]]:
    curves = searcher.manifest.quality.get("recall_by_effort", {})
    specs: dict[str, IndexSpec] = {name: channel.index for name, channel in searcher.config.channels.items()}
    specs |= {name: choice.spec for name, choice in _choices(searcher.manifest).items()}
    return {
        f"{specs[name].effort} of {name}": {int(value): recall for value, recall in curve.items()}
        for name, curve in curves.items()
    }


def _choices(manifest: Manifest) -> dict[str, Choice]:
    """Which index was chosen and why, by channel, where one was."""
    return {name: Choice.from_json(choice) for name, choice in manifest.quality.get("index_choice", {}).items()}


def _index_choice(channel: str, choice: Choice) -> IndexChoice:
    rows = [TrialRow(**asdict(trial)) for trial in choice.trials]
    return IndexChoice(channel, choice.summary, choice.queries, choice.vectors, rows)


def search_figures(manifest: Manifest, judged: Judged) -> SearchFigures:
    """What the judged queries cost, and an image in the files of the version."""
    milliseconds = 1000 * np.array(judged.query_seconds)
    median, p99 = np.percentile(milliseconds, [50, 99])
    per_image = sum(file.num_bytes for file in manifest.files) / max(manifest.counts["indexed"], 1)
    return SearchFigures(float(median), float(p99), per_image)


def _gallery(searcher: Searcher, judged: Judged) -> Gallery:
    worst, best = choose_cases(judged.quality, judged.rankings, judged.truth)
    return Gallery(
        worst,
        best,
        picture=lambda key: _indexed_thumbnail(searcher, image_id(key)),
        query_picture=lambda query: _query_thumbnail(searcher, judged.truth, query),
    )


def _indexed_thumbnail(searcher: Searcher, image: int, box: Box | None = None) -> bytes | None:
    """None where the collection cannot be read any more: a page without a picture is better than no page."""
    try:
        return thumbnail(searcher.picture(image), searcher, box)
    except (CbirError, OSError):
        return None


def _query_thumbnail(searcher: Searcher, truth: GroundTruth, query: GroundTruthQuery) -> bytes | None:
    try:
        return thumbnail(truth.picture(query).read_bytes(), searcher, query.box)
    except CbirError:
        return _indexed_thumbnail(searcher, image_id(query.image), query.box)


def thumbnail(picture: bytes, searcher: Searcher, box: Box | None = None, size: int = THUMBNAIL_PX) -> bytes | None:
    """A small upright JPEG of a picture, or of a box in it; None if it cannot be decoded."""
    decoded = decode(picture, View(size=size if box is None else 1 << 20), searcher.config.limits)
    if isinstance(decoded, BadImage):
        return None
    image = Image.fromarray(decoded.pixels)
    if box is not None:
        x, y, width, height = box
        image = image.crop((round(x), round(y), round(x + width), round(y + height)))
        image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def write_search(path: Path, searcher: Searcher, picture: bytes, answer: Answer, box: Box | None, name: str) -> None:
    """Write the page of the first query of an answer, with verified matches as lines where a reranker has them."""
    decoded, jpeg = decode(picture, View(size=64), searcher.config.limits), thumbnail(picture, searcher, size=640)
    assert not isinstance(decoded, BadImage), "the query was searched, so it can be decoded"
    assert jpeg is not None
    height, width = decoded.size
    rows = [
        SearchRow(
            result.key,
            result.score,
            _indexed_thumbnail(searcher, result.image_id),
            result.channels,
            _matches(searcher, answer, result.image_id, (height, width), (result.height, result.width), box),
        )
        for result in answer.results(0)
    ]
    shares = (box[0] / width, box[1] / height, box[2] / width, box[3] / height) if box else None
    manifest = searcher.manifest
    details = {
        "index": searcher.config.store,
        "version": str(manifest.version),
        "images": f"{manifest.counts['indexed']:,}",
    }
    write_search_page(path, jpeg, rows, title=f"Search for {name}", details=details, box=shares)


def _matches(
    searcher: Searcher, answer: Answer, image: int, query_size: tuple[int, int], size: tuple[int, int], box: Box | None
) -> Matches | None:
    """The verified matches of the first reranker that has any."""
    for spec in searcher.config.search.rerank:
        reranker = spec.build()
        if isinstance(reranker, Verifier) and spec.channel is not None:
            break
    else:
        return None
    query, wanted = answer.query_features[spec.channel].take(np.zeros(1, np.int64)), np.array([image], np.int64)
    if spec.reads == "signatures":
        query, stored = (
            searcher.encoder.signatures(spec.channel, query),
            searcher.signatures(spec.channel, wanted),
        )
    else:
        stored = searcher.features(spec.channel, wanted)
    points = reranker.matches(query, stored)
    if not len(points):
        return None
    if box is not None:
        # The query's features were found in the cropped picture; the page shows the whole.
        points = points + np.array([max(round(box[0]), 0), max(round(box[1]), 0), 0, 0], np.float32)
    return Matches(points, query_size, size)
