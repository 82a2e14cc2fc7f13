"""The driver of a build: plan, extract, sample, train, build, catalog, merge, evaluate, publish.

It holds no state: all truth lies in the store, so the same command after any interruption goes on from the records
that are there. Tasks of a stage are independent; a stage starts when the stage before it is complete.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from cbir.artifacts import Done, StoredFile, find_done, lease, sha256_of
from cbir.collection import ImageShard, list_shards
from cbir.config import Channel, Config, Pool
from cbir.errors import ArtifactError, CbirError, ConfigError, DataError
from cbir.layout import ChannelLayout, Layout, PartitionLayout, partition_bounds
from cbir.spec import fingerprint
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions, unique_files
from pipelines.executor import Executor, executor_for, pending
from pipelines.extract import ExtractTask
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
from pipelines.work import Asset, ChannelWork, Report, Task

__all__ = ["Progress", "Silent", "index", "plan"]

T = TypeVar("T", bound=Task)

_PART_FEATURES = 200_000
"""Features of the sample that a worker adds up at a time, for a round of a codebook."""

_Part = tuple[int, str, str, int]
"""A file of a partition: the partition's least id, the channel, the role, and its number among those of this role."""


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
    progress = progress or Silent()
    store = open_store(config.store)
    progress.stage("plan", None)
    check_ground_truth(config)
    store.probe()
    shards = plan(config)
    works = [_channel_work(store, config, name) for name in config.channels]
    progress.stage("workers", None)
    with lease(store, "cbir index"), contextlib.closing(executor_for(config)) as executor:
        run = _Run(config, store, executor, progress)
        built = run.build(shards, works)
        candidate = run.evaluate(built)
        progress.stage("publish", None)
        return Versions(store).publish(candidate)


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


def _channel_work(store: Store, config: Config, name: str) -> ChannelWork:
    channel = config.channels[name]
    return ChannelWork(name, channel, _stored_assets(store, channel, f"channels.{name}"))


def _stored_assets(store: Store, channel: Channel, path: str) -> dict[str, Asset]:
    """Copy the files of a channel into the store, so that a version needs nothing from outside."""
    assets = {}
    for name, suffix, data in read_assets(channel, path):
        digest = sha256_of(data)
        key = f"assets/{digest}{suffix}"
        store.create(key, data)
        assets[name] = Asset(key, digest)
    return assets


def read_assets(channel: Channel, path: str) -> Iterator[tuple[str, str, bytes]]:
    """Name (as by `Channel.assets`), file extension and content of the files of the channel at this YAML path."""
    for name, uri in channel.assets.items():
        yield name, Path(uri).suffix, _read_asset(uri, f"{path}.{name if '.' in name else f'extractor.{name}'}")


def _read_asset(uri: str, path: str) -> bytes:
    """A file that the configuration names, from a local path or a store."""
    folder, _, name = uri.rpartition("/")
    try:
        return open_store(folder or ".").read(name)
    except (CbirError, OSError) as error:
        raise ConfigError(f"{path}: cannot read {uri}: {error}") from None


@dataclass(frozen=True)
class _Built:
    """All parts of a candidate version."""

    layout: Layout
    records: Sequence[Done]
    works: Sequence[ChannelWork]
    counts: Mapping[str, int]
    builds: Mapping[str, Sequence[Done]]
    trains: Mapping[str, Done]


@dataclass
class _Run:
    """One run of the driver: what every stage needs."""

    config: Config
    store: Store
    executor: Executor
    progress: Progress

    def build(self, shards: Sequence[ImageShard], works: Sequence[ChannelWork]) -> _Built:
        """Every stage from `extract` to `merge`."""
        config = self.config
        tasks = [ExtractTask.of(shard, work, config) for work in works for shard in shards]
        dones = self._stage("extract", tasks, config.pools.extract, check=self._check_quarantine)
        self._check_quarantine(dones, least=1)
        extracted = {
            work.name: [
                Extracted(task.shard.name, work.name, done)
                for task, done in zip(tasks, dones, strict=True)
                if task.work.name == work.name
            ]
            for work in works
        }
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
        counts = _counts(extracted[works[0].name], catalogs)
        layout = Layout(
            {work.name: _channel_layout(work, trains[work.name], backgrounds.get(work.name)) for work in works},
            tuple(_partition(b, c, merges) for b, c in zip(bounds, catalogs, strict=True)),
        )
        records = [*dones, *trains.values(), *catalogs, *(done for parts in builds.values() for done in parts)]
        records += [*totals.values(), *merges.values(), *backgrounds.values()]
        return _Built(layout, records, works, counts, builds, trains)

    def _trains(self, works: Sequence[ChannelWork], extracted: Mapping[str, Sequence[Extracted]]) -> dict[str, Done]:
        """Trained channels; a sample is drawn only for those that are not trained yet."""
        config = self.config
        drawn = {work.name: self._sample_tasks(extracted[work.name]) for work in works}

        def task(work: ChannelWork, samples: Sequence[Done], codebook: Done | None = None) -> TrainTask:
            seed, probes = config.sample.seed, config.evaluate.probes
            return TrainTask.of(work, drawn[work.name], samples, seed, probes, codebook)

        untrained = [work for work in works if find_done(self.store, "train", task(work, ()).fingerprint) is None]
        samples = self._stage_by_channel("sample", {work.name: drawn[work.name] for work in untrained})
        books = self._codebooks([work for work in untrained if work.channel.index.has_codebook], drawn, samples)
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
    ) -> dict[_Part, Done]:
        tasks: dict[_Part, Task] = {}
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

    def evaluate(self, built: _Built) -> Manifest:
        """The gate: open the candidate from its files in a fresh worker, check it, measure it, hold it to the floor."""
        config = self.config
        files = {
            file.key: file for done in built.records for file in done.files if file.key in _published(built.layout)
        }
        for work in built.works:
            for asset in work.assets.values():
                files[asset.key] = StoredFile("asset", asset.key, self.store.stat(asset.key).size, asset.sha256)
        semantic = config.model_dump(mode="json", exclude={"workers", "pools", "ray", "store"})
        ranking = [spec.identity() for spec in (config.search.fuse, *config.search.rerank) if spec is not None]
        manifest = Manifest(
            version=0,
            content=fingerprint(built.layout.to_json(), semantic, ranking),
            config=config.model_dump(mode="json"),
            files=unique_files(files.values()),
            layout=built.layout.to_json(),
            counts=built.counts,
            work=tuple(sorted({f"stages/{done.stage}/{done.fingerprint}/" for done in built.records})),
        )
        task = EvaluateTask.of(manifest, built.builds, built.trains)
        done = self._stage("evaluate", [task], config.pools.build)[0]
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


def _published(layout: Layout) -> set[str]:
    keys = {key for channel in layout.channels.values() for key in (*channel.encoders, channel.index)}
    return keys.union(*(part.keys for part in layout.partitions))


def _channel_layout(work: ChannelWork, train: Done, background: Done | None) -> ChannelLayout:
    encoders = tuple(train.file(f"encoder-{number}").key for number in range(len(work.channel.encoders)))
    assets = {name: asset.key for name, asset in work.assets.items()}
    value = float(background.facts["background"]) if background else None
    return ChannelLayout(encoders, train.file("index").key, assets, value)


def _partition(bound: tuple[int, int], catalog: Done, merges: Mapping[_Part, Done]) -> PartitionLayout:
    files: dict[str, dict[str, list[str]]] = {"index": {}, "features": {}, "signatures": {}}
    for (low, name, role, _), done in merges.items():
        if low == bound[0]:
            files[role].setdefault(name, []).append(done.file(role).key)
    return PartitionLayout(
        *bound,
        num_images=catalog.counts["indexed"],
        ids=catalog.file("ids").key,
        quarantine=catalog.file("quarantine").key,
        indexes={name: tuple(keys) for name, keys in files["index"].items()},
        features={name: keys[0] for name, keys in files["features"].items()},
        signatures={name: keys[0] for name, keys in files["signatures"].items()},
    )


def _counts(extracted: Sequence[Extracted], catalogs: Sequence[Done]) -> dict[str, int]:
    """images = indexed + quarantined, or an ArtifactError: the law that nothing is lost."""
    counts = {
        "images": sum(part.done.counts["images"] for part in extracted),
        "indexed": sum(done.counts["indexed"] for done in catalogs),
        "quarantined": sum(done.counts["quarantined"] for done in catalogs),
        "features": sum(part.done.counts["features"] for part in extracted),
        "bytes": sum(part.done.counts["bytes"] for part in extracted),
        "shards": len(extracted),
        "partitions": len(catalogs),
    }
    if counts["images"] != counts["indexed"] + counts["quarantined"]:
        raise ArtifactError(
            f"{counts['images']} images were read, but {counts['indexed']} are indexed and {counts['quarantined']} "
            "quarantined; please report this with the store's stages/ folder"
        )
    return counts
