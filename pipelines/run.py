"""One run of the driver: extract, sample, train, build, catalog, merge, evaluate.

It holds no state: all truth lies in the store, so the same command after any interruption goes on from the records
that are there. Tasks of a stage are independent; a stage starts when the stage before it is complete.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cbir.artifacts import Done, find_done
from cbir.collection import ImageShard
from cbir.config import Config, Pool
from cbir.errors import DataError
from cbir.hidden import Hidden
from cbir.layout import ID_BYTES, Layout, partition_bounds
from cbir.lease import Lease
from cbir.spec import fingerprint
from cbir.storage import Store
from cbir.versions import Manifest
from pipelines.assembly import Built, Part, channel_layout, checked_counts, hiding, manifest_of, partition
from pipelines.before import Before
from pipelines.build import BuildTask
from pipelines.executor import Executor, pending
from pipelines.extract import ExtractTask, described_by
from pipelines.extract_vectors import VectorsTask
from pipelines.gate import EvaluateTask
from pipelines.hiding import hidden_in, store_hidden
from pipelines.plans import store_plan
from pipelines.stages import CatalogTask, Extracted, MergeTask, PublishFeaturesTask, TotalsTask
from pipelines.training import (
    BackgroundTask,
    CodebookRoundTask,
    CodebookSumsTask,
    CodebookTask,
    SampleTask,
    TrainTask,
)
from pipelines.work import Asset, ChannelWork, Report, Task

__all__ = ["Progress", "Run", "Silent"]

_PART_FEATURES = 200_000
"""Features of the sample that a worker adds up at a time, for a round of a codebook."""


class Progress(Protocol):
    """Who watches a run."""

    def stage(self, name: str, num_tasks: int | None) -> None:
        """A stage begins."""
        ...

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        """A task has ended, or was found done."""
        ...

    def tick(self) -> None:
        """About a second has passed."""
        ...

    def say(self, text: str) -> None:
        """Something worth a line."""
        ...


class Silent:
    """Nobody watches."""

    def stage(self, name: str, num_tasks: int | None) -> None:
        """Nothing."""

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        """Nothing."""

    def tick(self) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


@dataclass
class Run:
    """What every stage needs: the settings, the store, the workers, the shards, the channels, the version before, and
    the right to publish."""

    config: Config
    store: Store
    executor: Executor
    progress: Progress
    shards: Sequence[ImageShard]
    works: Sequence[ChannelWork]
    before: Before | None
    held: Lease

    def build(self, extracted: Mapping[str, Sequence[Extracted]], kept: Mapping[str, Done]) -> Built:
        """Every stage from `sample` to `merge`; channels that are `kept` are not trained, but as in these records."""
        config, works = self.config, self.works
        trains = {**self._trains([work for work in works if work.name not in kept], extracted), **kept}
        builds = self._builds(extracted, trains)
        totals = self._totals(builds)
        bounds = partition_bounds(self._num_partitions(extracted, builds))
        everything = [part for parts in extracted.values() for part in parts]
        catalogs = self.stage("catalog", [CatalogTask.of(bound, everything, config.images) for bound in bounds])
        merges = self._merges(extracted, trains, builds, totals, dict(zip(bounds, catalogs, strict=True)))
        backgrounds = self._backgrounds(extracted, trains, kept)
        counts, planned = checked_counts(extracted[works[0].name], catalogs), store_plan(self.store, self.shards)
        channels = {work.name: channel_layout(work, trains[work.name], backgrounds.get(work.name)) for work in works}
        partitions = tuple(partition(b, c, merges) for b, c in zip(bounds, catalogs, strict=True))
        records = [planned, *(part.done for part in everything), *trains.values(), *catalogs]
        records += [*itertools.chain(*builds.values()), *totals.values(), *merges.values()]
        hidden = store_hidden(self.store, Hidden.of(self._asked_to_hide()))
        layout = hiding(Layout(channels, partitions), hidden)
        return Built(layout, records, works, counts, builds, trains, planned.file("plan").key, hidden)

    def _asked_to_hide(self) -> Sequence[str]:
        return () if self.before is None else hidden_in(self.store, self.before.manifest).asked

    def extract(self) -> dict[str, list[Extracted]]:
        """The features of every shard, by channel; DataError if too many images have none."""
        kind, works = VectorsTask if self.config.input.format == "vectors" else ExtractTask, self.works
        tasks = [
            replace(kind.of(shard, work, self.config), earlier=earlier)
            for work, earlier in zip(works, map(self.earlier, works), strict=True)
            for shard in self.shards
        ]
        dones = self.stage("extract", tasks, self.config.pools.extract, check=self._check_quarantine)
        self._check_quarantine(dones, least=1)
        return {
            work.name: [
                Extracted(task.shard.name, work.name, done)
                for task, done in zip(tasks, dones, strict=True)
                if task.work.name == work.name
            ]
            for work in works
        }

    def earlier(self, work: ChannelWork, train: Done | None = None) -> Asset | None:
        """What is known of images that changed their shard, or whose shard changed; with `train`, of their entries."""
        return None if self.before is None else self.before.knowledge(self.shards, work, self.config, train)

    def _trains(self, works: Sequence[ChannelWork], extracted: Mapping[str, Sequence[Extracted]]) -> dict[str, Done]:
        """Trained channels; a sample is drawn only for those that are not trained yet."""
        config = self.config
        drawn = {work.name: self._sample_tasks(extracted[work.name]) for work in works}

        def task(work: ChannelWork, samples: Sequence[Done], codebook: Done | None = None) -> TrainTask:
            seed, probes = config.sample.seed, config.evaluate.probes
            return TrainTask.of(work, drawn[work.name], samples, seed, probes, codebook)

        untrained = [work for work in works if find_done(self.store, "train", task(work, ()).fingerprint) is None]
        samples = self._stage_by_channel("sample", {work.name: drawn[work.name] for work in untrained})
        begun = [work for work in untrained if work.channel.index.has_codebook and not work.states]
        books = self._codebooks(begun, drawn, samples)
        tasks = [task(work, samples.get(work.name, ()), books.get(work.name)) for work in works]
        dones = self.stage("train", tasks)
        return {work.name: done for work, done in zip(works, dones, strict=True)}

    def _codebooks(
        self,
        works: Sequence[ChannelWork],
        drawn: Mapping[str, Sequence[SampleTask]],
        samples: Mapping[str, Sequence[Done]],
    ) -> dict[str, Done]:
        """The codebooks of these channels: large ones are begun by one worker and take rounds over all workers."""
        if not works:
            return {}
        seed = self.config.sample.seed
        tasks = [CodebookTask.of(work, drawn[work.name], samples[work.name], seed) for work in works]
        begun = dict(zip((work.name for work in works), self.stage("codebook", tasks), strict=True))
        books = dict(begun)
        rounds = {work.name: work.channel.index.codebook_rounds for work in works}
        for number in range(1, max(rounds.values()) + 1):
            title = f"codebook, round {number} of {max(rounds.values())}"
            some = [work for work in works if number <= rounds[work.name]]
            parts = {
                work.name: [
                    CodebookSumsTask.of(work, begun[work.name], books[work.name], part)
                    for part in _in_parts(samples[work.name])
                ]
                for work in some
            }
            sums = self._stage_by_channel("codebook", parts, title)
            ends = [CodebookRoundTask.of(w, books[w.name], sums[w.name], last=number == rounds[w.name]) for w in some]
            books |= dict(zip((work.name for work in some), self.stage(title, ends), strict=True))
        return books

    def _backgrounds(
        self, extracted: Mapping[str, Sequence[Extracted]], trains: Mapping[str, Done], kept: Mapping[str, Done]
    ) -> dict[str, float]:
        """The scores of irrelevant images in every channel, if the fusion needs to know them."""
        fuse = self.config.search.fuse
        if fuse is None or not fuse.needs_backgrounds:
            return {}
        known = self.before.backgrounds() if self.before is not None else {}
        found = {name: known[name] for name in kept if name in known}
        works = [work for work in self.works if work.name not in found]
        drawn = {work.name: self._sample_tasks(extracted[work.name]) for work in works}
        samples, seed = self._stage_by_channel("sample", drawn), self.config.sample.seed
        tasks = [BackgroundTask.of(work, trains[work.name], samples[work.name], seed) for work in works]
        dones = self.stage("background", tasks)
        measured = {work.name: float(done.facts["background"]) for work, done in zip(works, dones, strict=True)}
        return found | measured

    def _sample_tasks(self, extracted: Sequence[Extracted]) -> list[SampleTask]:
        """A share of images that is within both limits, of every shard."""
        sample = self.config.sample
        images = sum(part.done.counts["indexed"] for part in extracted)
        features = sum(part.done.counts["features"] for part in extracted)
        share = min(1.0, sample.images / max(images, 1), sample.features / max(features, 1))
        return [SampleTask.of(part.done, share, sample.seed) for part in extracted]

    def _builds(
        self, extracted: Mapping[str, Sequence[Extracted]], trains: Mapping[str, Done]
    ) -> dict[str, list[Done]]:
        tasks: dict[str, list[BuildTask]] = {}
        for work in self.works:
            train = trains[work.name]
            earlier = self.earlier(work, train)
            tasks[work.name] = [BuildTask.of(work, part.done, train, earlier) for part in extracted[work.name]]
        return self._stage_by_channel("build", tasks)

    def _totals(self, builds: Mapping[str, Sequence[Done]]) -> dict[str, Done]:
        """The statistics over the whole collection, of the channels whose index needs them."""
        tasks = {w.name: TotalsTask.of(w, builds[w.name]) for w in self.works if w.channel.index.has_statistics}
        if not tasks:
            return {}
        return dict(zip(tasks, self.stage("totals", list(tasks.values())), strict=True))

    def _merges(
        self,
        extracted: Mapping[str, Sequence[Extracted]],
        trains: Mapping[str, Done],
        builds: Mapping[str, Sequence[Done]],
        totals: Mapping[str, Done],
        catalogs: Mapping[tuple[int, int], Done],
    ) -> dict[Part, Done]:
        tasks: dict[Part, Task] = {}
        for work, (bound, catalog) in itertools.product(self.works, catalogs.items()):
            made, channel, train = builds[work.name], work.channel, trains[work.name]
            content = fingerprint(described_by(work, self.config), catalog.facts["contents"][work.name])
            for piece in range(channel.index.pieces):
                merge = MergeTask.of(bound, piece, work, train, made, totals.get(work.name), content)
                tasks[bound[0], work.name, "index", piece] = merge
            if channel.keep_features:
                features = [part.done for part in extracted[work.name]]
                published = PublishFeaturesTask.of(bound, work, "features", features, content)
                tasks[bound[0], work.name, "features", 0] = published
            if channel.keep_signatures:
                signed = fingerprint(content, train.fingerprint)
                published = PublishFeaturesTask.of(bound, work, "signatures", made, signed)
                tasks[bound[0], work.name, "signatures", 0] = published
        dones = self.stage("merge", list(tasks.values()))
        return dict(zip(tasks, dones, strict=True))

    def _num_partitions(
        self, extracted: Mapping[str, Sequence[Extracted]], builds: Mapping[str, Sequence[Done]]
    ) -> int:
        """So many that the published files of one partition are about `partition_megabytes`."""
        total = ID_BYTES * sum(part.done.counts["indexed"] for part in extracted[self.works[0].name])
        for work in self.works:
            total += sum(done.facts["entry_bytes"] for done in builds[work.name])
            if work.channel.keep_features:
                total += sum(part.done.facts["feature_bytes"] for part in extracted[work.name])
            if work.channel.keep_signatures:
                total += sum(done.facts["signature_bytes"] for done in builds[work.name])
        return max(1, math.ceil(total / (self.config.partition_megabytes * 1e6)))

    def _stage_by_channel(
        self, name: str, tasks: Mapping[str, Sequence[Task]], title: str = ""
    ) -> dict[str, list[Done]]:
        dones = iter(self.stage(title or name, [task for some in tasks.values() for task in some]))
        return {channel: [next(dones) for _ in some] for channel, some in tasks.items()}

    def stage(
        self,
        name: str,
        tasks: Sequence[Task],
        pool: Pool | None = None,
        check: Callable[[Sequence[Done]], None] | None = None,
    ) -> list[Done]:
        """Do what is missing of a stage, by the `build` pool if no other is given; the records come in the order of the
        tasks."""
        if not self.executor.is_ready:
            self._start_workers(tasks)
        self.progress.stage(name, len(tasks))
        self.held.renew()
        found: dict[str, Done] = {}

        def on_report(task: Task, report: Report, reused: bool = False) -> None:
            found[task.fingerprint] = report.done
            self.progress.report(task, report, reused=reused)
            if check is not None:
                check(list(found.values()))

        missing = list(pending(self.store, tasks, lambda task, report: on_report(task, report, reused=True)))
        distinct = list({task.fingerprint: task for task in missing}.values())
        self.executor.run(distinct, pool or self.config.pools.build, on_report, self.progress.tick)
        return [found[task.fingerprint] for task in tasks]

    def _start_workers(self, tasks: Sequence[Task]) -> None:
        """If some of these tasks are not done yet."""
        if any(pending(self.store, tasks, lambda *_: None)):
            self.progress.stage("workers", None)
            self.executor.start()

    def _check_quarantine(self, dones: Sequence[Done], least: int = 200) -> None:
        """Stop a run that loses too many images, once it has seen enough of them to know."""
        images = sum(done.counts["images"] for done in dones)
        bad = sum(done.counts["quarantined"] for done in dones)
        if images >= least and bad > self.config.max_bad * images:
            raise DataError(
                f"{bad} of {images} images could not be used, more than max_bad = {self.config.max_bad:g}; "
                f"see the quarantine files under {self.store.uri}/stages/extract, or raise max_bad"
            )

    def evaluate(self, built: Built) -> Manifest:
        """The gate: open the candidate from its files in a fresh worker, check it, measure it, hold it to the floor."""
        task = EvaluateTask.of(manifest_of(self.config, self.store, built), built.builds, built.trains)
        done = self.stage("evaluate", [task])[0]
        return task.accepted(self.store, done)


def _in_parts(samples: Sequence[Done]) -> list[list[Done]]:
    """Shards of the sample in parts of about `_PART_FEATURES`."""
    parts: list[list[Done]] = []
    held = _PART_FEATURES
    for done in (sample for sample in samples if sample.counts["images"]):
        if held >= _PART_FEATURES:
            parts.append([])
            held = 0
        parts[-1].append(done)
        held += done.counts["features"]
    return parts
