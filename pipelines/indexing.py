"""The driver of a build: plan, extract, sample, train, build, catalog, merge, evaluate, publish.

It holds no state: all truth lies in the store, so the same command after any interruption goes on from the records
that are there. Tasks of a stage are independent; a stage starts when the stage before it is complete.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cbir.artifacts import Done, find_done, lease
from cbir.collection import ImageShard, list_shards
from cbir.config import Config, Pool
from cbir.errors import DataError
from cbir.layout import Layout, partition_bounds
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions
from pipelines.assembly import Built, Part, channel_layout, checked_counts, manifest_of, partition
from pipelines.assets import channel_work
from pipelines.executor import Executor, executor_for, pending
from pipelines.extract import ExtractTask
from pipelines.extract_vectors import VectorsTask
from pipelines.gate import EvaluateTask, check_ground_truth
from pipelines.stages import BuildTask, CatalogTask, Extracted, MergeTask, PublishFeaturesTask, TotalsTask
from pipelines.training import (
    BackgroundTask,
    CodebookRoundTask,
    CodebookSumsTask,
    CodebookTask,
    SampleTask,
    TrainTask,
)
from pipelines.work import ChannelWork, Report, Task

__all__ = ["Progress", "Silent", "extract", "index", "plan"]

T = TypeVar("T", bound=Task)

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


def index(config: Config, progress: Progress | None = None) -> Manifest:
    """Build what is missing, gate it, publish it. Returns the published manifest, which may be the one before."""
    check_ground_truth(config)
    with _begun(config, "cbir index", progress or Silent()) as (run, shards, works):
        candidate = run.evaluate(run.build(shards, works))
        run.progress.stage("publish", None)
        return Versions(run.store).publish(candidate)


def extract(config: Config, progress: Progress | None = None) -> dict[str, list[Extracted]]:
    """The features of all shards by channel, extracted where they are missing; nothing is trained or published."""
    with _begun(config, "cbir extract", progress or Silent()) as (run, shards, works):
        return run.extract(shards, works)


@contextlib.contextmanager
def _begun(
    config: Config, owner: str, progress: Progress
) -> Iterator[tuple["_Run", list[ImageShard], list[ChannelWork]]]:
    """A run with its workers and its lease, its shards and its channels."""
    store = open_store(config.store)
    progress.stage("plan", None)
    store.probe()
    shards = plan(config)
    works = [channel_work(store, config, name) for name in config.channels]
    progress.stage("workers", None)
    with lease(store, owner), contextlib.closing(executor_for(config)) as executor:
        yield _Run(config, store, executor, progress), shards, works


def plan(config: Config) -> list[ImageShard]:
    """The image shards of the collection; DataError if two have one name or there are none."""
    shards = list(list_shards(config.images, config.input))
    names: dict[str, str] = {}
    for shard in shards:
        if names.setdefault(f"{shard.source} {shard.name}", shard.source) != shard.source:
            raise DataError(f"two shards are called {shard.name!r}")
    if not shards:
        raise DataError(f"no images under {', '.join(config.images)}")
    return shards


@dataclass
class _Run:
    """One run of the driver: what every stage needs."""

    config: Config
    store: Store
    executor: Executor
    progress: Progress

    def build(self, shards: Sequence[ImageShard], works: Sequence[ChannelWork]) -> Built:
        """Every stage from `extract` to `merge`."""
        config, extracted = self.config, self.extract(shards, works)
        trains = self._trains(works, extracted)
        builds = self._builds(works, extracted, trains)
        totals = self._totals(works, builds)
        bounds = partition_bounds(self._num_partitions(works, extracted, builds))
        everything = [part for parts in extracted.values() for part in parts]
        catalogs = self._stage(
            "catalog", [CatalogTask.of(bound, everything, config.images) for bound in bounds], config.pools.build
        )
        merges = self._merges(works, extracted, trains, builds, totals, bounds)
        backgrounds = self._backgrounds(works, extracted, trains)
        counts = checked_counts(extracted[works[0].name], catalogs)
        channels = {work.name: channel_layout(work, trains[work.name], backgrounds.get(work.name)) for work in works}
        partitions = tuple(partition(b, c, merges) for b, c in zip(bounds, catalogs, strict=True))
        records = [*(part.done for part in everything), *trains.values(), *catalogs, *itertools.chain(*builds.values())]
        records += [*totals.values(), *merges.values(), *backgrounds.values()]
        return Built(Layout(channels, partitions), records, works, counts, builds, trains)

    def extract(self, shards: Sequence[ImageShard], works: Sequence[ChannelWork]) -> dict[str, list[Extracted]]:
        """The features of every shard, by channel; DataError if too many images have none."""
        kind = VectorsTask if self.config.input.format == "vectors" else ExtractTask
        tasks = [kind.of(shard, work, self.config) for work in works for shard in shards]
        dones = self._stage("extract", tasks, self.config.pools.extract, check=self._check_quarantine)
        self._check_quarantine(dones, least=1)
        return {
            work.name: [
                Extracted(task.shard.name, work.name, done)
                for task, done in zip(tasks, dones, strict=True)
                if task.work.name == work.name
            ]
            for work in works
        }

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
        dones = self._stage("train", tasks, config.pools.build)
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
        seed, pool = self.config.sample.seed, self.config.pools.build
        tasks = [CodebookTask.of(work, drawn[work.name], samples[work.name], seed) for work in works]
        begun = dict(zip((work.name for work in works), self._stage("codebook", tasks, pool), strict=True))
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
            books |= dict(zip((work.name for work in some), self._stage(title, ends, pool), strict=True))
        return books

    def _backgrounds(
        self, works: Sequence[ChannelWork], extracted: Mapping[str, Sequence[Extracted]], trains: Mapping[str, Done]
    ) -> dict[str, Done]:
        """The scores of irrelevant images in every channel, if the fusion needs to know them."""
        fuse = self.config.search.fuse
        if fuse is None or not fuse.needs_backgrounds:
            return {}
        drawn = {work.name: self._sample_tasks(extracted[work.name]) for work in works}
        samples, seed = self._stage_by_channel("sample", drawn), self.config.sample.seed
        tasks = [BackgroundTask.of(work, trains[work.name], samples[work.name], seed) for work in works]
        dones = self._stage("background", tasks, self.config.pools.build)
        return {work.name: done for work, done in zip(works, dones, strict=True)}

    def _sample_tasks(self, extracted: Sequence[Extracted]) -> list[SampleTask]:
        """A share of images that is within both limits, of every shard."""
        sample = self.config.sample
        images = sum(part.done.counts["indexed"] for part in extracted)
        features = sum(part.done.counts["features"] for part in extracted)
        share = min(1.0, sample.images / max(images, 1), sample.features / max(features, 1))
        return [SampleTask.of(part.done, share, sample.seed) for part in extracted]

    def _builds(
        self,
        works: Sequence[ChannelWork],
        extracted: Mapping[str, Sequence[Extracted]],
        trains: Mapping[str, Done],
    ) -> dict[str, list[Done]]:
        tasks = {
            work.name: [BuildTask.of(work, part.done, trains[work.name]) for part in extracted[work.name]]
            for work in works
        }
        return self._stage_by_channel("build", tasks)

    def _totals(self, works: Sequence[ChannelWork], builds: Mapping[str, Sequence[Done]]) -> dict[str, Done]:
        """The statistics over the whole collection, of the channels whose index needs them."""
        tasks = {w.name: TotalsTask.of(w, builds[w.name]) for w in works if w.channel.index.has_statistics}
        if not tasks:
            return {}
        return dict(zip(tasks, self._stage("totals", list(tasks.values()), self.config.pools.build), strict=True))

    def _merges(
        self,
        works: Sequence[ChannelWork],
        extracted: Mapping[str, Sequence[Extracted]],
        trains: Mapping[str, Done],
        builds: Mapping[str, Sequence[Done]],
        totals: Mapping[str, Done],
        bounds: Sequence[tuple[int, int]],
    ) -> dict[Part, Done]:
        tasks: dict[Part, Task] = {}
        for work, bound in itertools.product(works, bounds):
            made, channel = builds[work.name], work.channel
            for piece in range(channel.index.pieces):
                task = MergeTask.of(bound, piece, work, trains[work.name], made, totals.get(work.name))
                tasks[bound[0], work.name, "index", piece] = task
            if channel.keep_features:
                features = [part.done for part in extracted[work.name]]
                tasks[bound[0], work.name, "features", 0] = PublishFeaturesTask.of(bound, work, "features", features)
            if channel.keep_signatures:
                tasks[bound[0], work.name, "signatures", 0] = PublishFeaturesTask.of(bound, work, "signatures", made)
        dones = self._stage("merge", list(tasks.values()), self.config.pools.build)
        return dict(zip(tasks, dones, strict=True))

    def _num_partitions(
        self,
        works: Sequence[ChannelWork],
        extracted: Mapping[str, Sequence[Extracted]],
        builds: Mapping[str, Sequence[Done]],
    ) -> int:
        """So many that the published files of one partition are about `partition_megabytes`."""
        total = 0
        for work in works:
            total += sum(done.facts["entry_bytes"] for done in builds[work.name])
            if work.channel.keep_features:
                total += sum(part.done.facts["feature_bytes"] for part in extracted[work.name])
            if work.channel.keep_signatures:
                total += sum(done.facts["signature_bytes"] for done in builds[work.name])
        return max(1, math.ceil(total / (self.config.partition_megabytes * 1e6)))

    def _stage_by_channel(
        self, name: str, tasks: Mapping[str, Sequence[Task]], title: str = ""
    ) -> dict[str, list[Done]]:
        dones = iter(
            self._stage(title or name, [task for some in tasks.values() for task in some], self.config.pools.build)
        )
        return {channel: [next(dones) for _ in some] for channel, some in tasks.items()}

    def _stage(
        self,
        name: str,
        tasks: Sequence[Task],
        pool: Pool,
        check: Callable[[Sequence[Done]], None] | None = None,
    ) -> list[Done]:
        """Do what is missing of a stage; the records come in the order of the tasks."""
        self.progress.stage(name, len(tasks))
        found: dict[str, Done] = {}

        def on_report(task: Task, report: Report, reused: bool = False) -> None:
            found[task.fingerprint] = report.done
            self.progress.report(task, report, reused=reused)
            if check is not None:
                check(list(found.values()))

        missing = list(pending(self.store, tasks, lambda task, report: on_report(task, report, reused=True)))
        distinct = list({task.fingerprint: task for task in missing}.values())
        self.executor.run(distinct, pool, on_report, self.progress.tick)
        return [found[task.fingerprint] for task in tasks]

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
        done = self._stage("evaluate", [task], self.config.pools.build)[0]
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
