"""Stage `evaluate`: the gate that a candidate passes before it is published."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cbir.artifacts import Done, sha256_of
from cbir.config import Config, parse_config
from cbir.errors import ArtifactError, ConfigError
from cbir.evaluation.ground_truth import read_ground_truth
from cbir.index.choice import Choice
from cbir.index.index import IndexSpec, SearchIndex
from cbir.layout import Layout
from cbir.partition import LocalFiles
from cbir.search import Searcher, searcher_of
from cbir.spec import fingerprint
from cbir.storage import Store
from cbir.types import FeatureBatch
from cbir.verification import check_counts, check_files
from cbir.versions import Manifest
from pipelines.build import probe_hits
from pipelines.quality import judge
from pipelines.recall import index_recalls, recalls_by_effort
from pipelines.tables import open_parquet
from pipelines.work import Task, Worker

__all__ = ["EvaluateTask", "check_ground_truth"]


@dataclass(frozen=True)
class EvaluateTask(Task):
    """Open a candidate from its manifest alone, check its files and counts, and measure it."""

    stage: ClassVar[str] = "evaluate"
    manifest: Manifest
    builds: Mapping[str, Sequence[Done]]
    trains: Mapping[str, Done]

    @classmethod
    def of(cls, manifest: Manifest, builds: Mapping[str, Sequence[Done]], trains: Mapping[str, Done]) -> "EvaluateTask":
        """The task of a candidate; the content of the ground truth is part of its fingerprint."""
        truth = manifest.config["evaluate"]["ground_truth"]
        digest = _digest(truth) if truth else ""
        return cls("candidate", fingerprint("evaluate", manifest.content, digest), manifest, builds, trains)

    def run(self, worker: Worker) -> Done:
        """Verify, search, judge; figures that depend on the machine are left to `cbir evaluate`."""
        with worker.timer.phase("read"):
            check_files(worker.store, self.manifest)
        searcher = searcher_of(worker.store, self.manifest, worker.device)
        check_counts(searcher, self.manifest)
        with worker.timer.phase("device"):
            quality = self._recalls(worker, searcher.config) | self._choices() | self._truth(searcher)
        text = json.dumps(quality, indent=1, sort_keys=True).encode()
        return self.finish(worker, [self.put(worker, "quality", text, "json")], {}, quality)

    def _recalls(self, worker: Worker, config: Config) -> dict[str, dict[str, dict[str, float]]]:
        """Against exact search, by channel: recall@k by k, and recall@10 by effort."""
        recalls: dict[str, dict[str, float]] = {}
        by_effort: dict[str, dict[str, float]] = {}
        for name, train in self.trains.items():
            spec = config.channels[name].index
            if spec.local:
                continue  # an inverted file compares exactly what it holds
            spec = Choice.from_json(train.facts["choice"]).spec if "choice" in train.facts else spec
            opened = functools.partial(self._opened, LocalFiles(worker.store, self.manifest), name)
            probes = FeatureBatch.from_arrow(open_parquet(worker.store, train.file("probes")).read())
            exact = probe_hits(worker, self.builds[name], len(probes))
            recalls[name] = {str(k): value for k, value in index_recalls(opened(spec), probes, exact).items()}
            curve = recalls_by_effort(spec, opened, probes, exact)
            by_effort |= {name: {str(effort): value for effort, value in curve.items()}} if curve else {}
        return {"ann_recall": recalls, "recall_by_effort": by_effort}

    def _opened(self, files: LocalFiles, channel: str, spec: IndexSpec) -> list[SearchIndex]:
        """The partitions of a channel's index."""
        partitions = Layout.from_json(self.manifest.layout).partitions
        return [spec.load(*map(files.path, part.indexes[channel])) for part in partitions]

    def _choices(self) -> dict[str, dict[str, Any]]:
        """Which index was chosen and why, by channel, where one was."""
        choices = {name: train.facts["choice"] for name, train in self.trains.items() if "choice" in train.facts}
        return {"index_choice": choices} if choices else {}

    def _truth(self, searcher: Searcher) -> dict[str, Any]:
        config = searcher.config.evaluate
        if config.ground_truth is None:
            return {}
        return judge(searcher, config.ground_truth, config.protocol).quality.to_json()

    def accepted(self, store: Store, done: Done) -> Manifest:
        """The manifest with its quality; ArtifactError, and the candidate kept for inspection, if below the floor."""
        quality = dict(done.facts)
        manifest = replace(self.manifest, quality=quality, work=(*self.manifest.work, self.prefix))
        config = parse_config(manifest.config, "the candidate")
        below = [*_below_floor(config, quality), *_too_few(config, manifest.counts)]
        if below:
            key = f"candidates/{manifest.content}.json"
            store.write(key, manifest.to_json())
            raise ArtifactError(
                f"the gate refuses this version: {'; '.join(below)}. Nothing was published; the candidate is kept at "
                f"{store.uri}/{key}. Improve the index, or change evaluate.floor"
            )
        return manifest


def check_ground_truth(config: Config) -> None:
    """Read the ground truth before the work begins, not first after it; ConfigError or DataError if that fails."""
    if (path := config.evaluate.ground_truth) is not None:
        _digest(path)
        read_ground_truth(path, config.evaluate.protocol)


def _digest(path: str) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise ConfigError(f"evaluate.ground_truth: cannot read {path}: {error.strerror}") from None


def _below_floor(config: Config, quality: Mapping[str, Any]) -> list[str]:
    floor = config.evaluate.floor
    measured: list[tuple[str, float | None, float | None]] = [
        ("map", floor.map, quality.get("map")),
        ("recall_at_1", floor.recall_at_1, quality.get("recall_at_1")),
    ]
    for channel, recalls in quality["ann_recall"].items():
        deepest = recalls.get("10", next(iter(recalls.values()), None))
        measured.append((f"ann_recall of {channel}", floor.ann_recall, deepest))
    return [
        f"{name} {'was not measured' if found is None else f'is {found:.4f}'}, the floor is {least:g}"
        for name, least, found in measured
        if least is not None and (found is None or found < least)
    ]


def _too_few(config: Config, counts: Mapping[str, int]) -> list[str]:
    floor, share = config.evaluate.floor, counts["quarantined"] / max(counts["images"], 1)
    found = []
    if floor.images is not None and counts["indexed"] < floor.images:
        found.append(f"images is {counts['indexed']:,}, the floor is {floor.images:,}")
    if floor.quarantined is not None and share > floor.quarantined:
        found.append(f"quarantined is {share:.4f} of {counts['images']:,} images, the most is {floor.quarantined:g}")
    return found
