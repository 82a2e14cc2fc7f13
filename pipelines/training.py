"""Training: sample, codebook, train and background, each a task over plain files of the store."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from cbir.artifacts import Done, StoredFile, read_part
from cbir.config import assets_of
from cbir.encoding.encoder import Encoder, EncoderSpec
from cbir.errors import DataError
from cbir.index.auto import AutoIndex
from cbir.index.index import Index, IndexSpec
from cbir.queries import encode_all, encode_queries
from cbir.rerank.adaptive import background
from cbir.spec import fingerprint
from cbir.types import FEATURES_SCHEMA, FeatureBatch, Int64s, State
from pipelines.tables import open_parquet, write_parquet
from pipelines.work import ChannelWork, Task, Worker

__all__ = [
    "BackgroundTask",
    "CodebookRoundTask",
    "CodebookSumsTask",
    "CodebookTask",
    "SampleTask",
    "TrainTask",
    "Trained",
    "added_up",
    "packed",
    "seeded_uniform",
]

BACKGROUND_IMAGES, BACKGROUND_QUERIES = 224, 32


def seeded_uniform(image_ids: Int64s, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A number in [0, 1) per image that depends on its id and the seed alone (SplitMix64, Steele et al. 2014)."""
    x = image_ids.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


@dataclass(frozen=True)
class SampleTask(Task):
    """The part of one shard that the codebook sample takes: whole images, chosen by a seeded hash of their ids."""

    stage: ClassVar[str] = "sample"
    features: Done
    share: float
    seed: int

    @classmethod
    def of(cls, features: Done, share: float, seed: int) -> "SampleTask":
        """The task for the features of one shard."""
        return cls("sample", fingerprint("sample", features.fingerprint, share, seed), features, share, seed)

    def run(self, worker: Worker) -> Done:
        """Read the ids, then only the row groups with a chosen image; the sample of all is the features' own file."""
        features = self.features.file("features")
        if self.share >= 1.0:
            counts = {"images": self.features.counts["indexed"], "features": self.features.counts["features"]}
            return self.finish(worker, [replace(features, role="sample")], counts)
        with worker.timer.phase("read"):
            parts = list(self._chosen(worker, features))
        path = worker.scratch("sample.parquet")
        sample = FeatureBatch.concatenate(parts) if parts else None
        table = pa.Table.from_batches([sample.to_arrow()]) if sample else FEATURES_SCHEMA.empty_table()
        write_parquet(path, table, row_bytes=max(table.nbytes // max(table.num_rows, 1), 1))
        counts = {"images": len(sample) if sample else 0, "features": len(sample.descriptors) if sample else 0}
        return self.finish(worker, [self.put(worker, "sample", path, "parquet")], counts)

    def _chosen(self, worker: Worker, features: StoredFile) -> Iterator[FeatureBatch]:
        parquet = open_parquet(worker.store, features)
        for group in range(parquet.num_row_groups):
            ids = parquet.read_row_group(group, columns=["image_id"]).column("image_id").to_numpy()
            chosen = np.flatnonzero(seeded_uniform(ids, self.seed) < self.share)
            if len(chosen):
                table = parquet.read_row_group(group, columns=FEATURES_SCHEMA.names)
                yield FeatureBatch.from_arrow(table).take(chosen)


@dataclass(frozen=True)
class CodebookTask(Task):
    """Fit the encoders of one channel on the sample of all shards, sorted by image id, and train the codebook of its
    index, or begin to.

    It depends on few of the index's settings; indexes that differ in others only share it.
    """

    stage: ClassVar[str] = "codebook"
    work: ChannelWork
    samples: tuple[Done, ...]
    seed: int

    @classmethod
    def of(cls, work: ChannelWork, made_of: Sequence[SampleTask], samples: Sequence[Done], seed: int) -> "CodebookTask":
        """The task of one channel; its fingerprint is known before the samples are."""
        encoders = work.training_identity()["encoders"]
        sources = sorted(task.fingerprint for task in made_of)
        identity = fingerprint("codebook", encoders, work.channel.index.codebook_identity(), seed, sources)
        return cls(f"codebook [{work.name}]", identity, work, tuple(samples), seed)

    def run(self, worker: Worker) -> Done:
        """Fit the encoders, encode the sample, train."""
        with worker.timer.phase("read"):
            sample = _whole_sample(worker, self.work, self.samples)
        counts, files = {"images": len(sample), "features": len(sample.descriptors)}, []
        with worker.timer.phase("device"):
            for position in range(len(self.work.channel.encoders)):
                with _at(f"channels.{self.work.name}.encoders.{position}"):
                    encoder = _encoder_spec(worker, self.work, position).fit(sample, self.seed)
                sample = encoder.encode(sample)
                files.append(self.put(worker, f"encoder-{position}", packed(encoder.state()), "safetensors"))
            with _at(f"channels.{self.work.name}.index"):
                state = self.work.channel.index.train_codebook(sample, self.seed)
        return self.finish(worker, [*files, self.put(worker, "codebook", packed(state), "safetensors")], counts)


@dataclass(frozen=True)
class CodebookSumsTask(Task):
    """What a part of the sample adds to the next round of a codebook."""

    stage: ClassVar[str] = "codebook"
    work: ChannelWork
    begun: Done
    codebook: Done
    samples: tuple[Done, ...]

    @classmethod
    def of(cls, work: ChannelWork, begun: Done, codebook: Done, samples: Sequence[Done]) -> "CodebookSumsTask":
        """The task of some shards; `begun` has the encoders, `codebook` is that of the round before."""
        identity = fingerprint("codebook sums", codebook.fingerprint, [done.fingerprint for done in samples])
        return cls(f"part of a round [{work.name}]", identity, work, begun, codebook, tuple(samples))

    @property
    def weight(self) -> int:
        """Features to compare with the words."""
        return sum(done.counts["features"] for done in self.samples)

    def run(self, worker: Worker) -> Done:
        """Sums of integers, which come out the same however the sample is divided."""
        encoders = _restored_encoders(worker, self.work, self.begun)
        codebook = load_safetensors(read_part(worker.store, self.codebook.file("codebook")))
        with worker.timer.phase("read"):
            sample = _whole_sample(worker, self.work, self.samples)
        with worker.timer.phase("device"):
            sums = self.work.channel.index.codebook_sums(codebook, encode_all(encoders, sample))
        return self.finish(worker, [self.put(worker, "sums", packed(sums), "safetensors")], {})


@dataclass(frozen=True)
class CodebookRoundTask(Task):
    """The codebook after a round, from what all parts of the sample add."""

    stage: ClassVar[str] = "codebook"
    work: ChannelWork
    codebook: Done
    sums: tuple[Done, ...]
    last: bool

    @classmethod
    def of(cls, work: ChannelWork, codebook: Done, sums: Sequence[Done], *, last: bool) -> "CodebookRoundTask":
        """The task of one round."""
        identity = fingerprint("codebook round", sorted(done.fingerprint for done in sums), last)
        return cls(f"round [{work.name}]", identity, work, codebook, tuple(sums), last)

    def run(self, worker: Worker) -> Done:
        """Add up, and take the means."""
        codebook = load_safetensors(read_part(worker.store, self.codebook.file("codebook")))
        totals = added_up(worker, [done.file("sums") for done in self.sums])
        state = self.work.channel.index.next_codebook(codebook, totals, last=self.last)
        return self.finish(worker, [self.put(worker, "codebook", packed(state), "safetensors")], {})


def _restored_encoders(worker: Worker, work: ChannelWork, done: Done) -> list[Encoder]:
    """The encoders of a channel from a record that has their states."""
    return [
        spec.restore(load_safetensors(read_part(worker.store, done.file(f"encoder-{number}"))))
        for number, spec in enumerate(work.channel.encoders)
    ]


def _encoder_spec(worker: Worker, work: ChannelWork, position: int) -> EncoderSpec:
    """An encoder of the channel with its files at hand."""
    assets = assets_of(f"encoders.{position}", work.assets)
    files = {field: worker.fetch(asset.key, asset.sha256) for field, asset in assets.items()}
    return work.channel.encoders[position].with_assets(files)


def _whole_sample(worker: Worker, work: ChannelWork, samples: Sequence[Done]) -> FeatureBatch:
    """The sample of all shards by rising image id; DataError if it is empty."""
    found = [done for done in samples if done.counts["images"]]
    if not found:
        raise DataError(
            f"channel {work.name!r} has no image to train on: every image was quarantined "
            "(see quarantine.parquet) or the sample is too small (sample.images)"
        )
    files = [open_parquet(worker.store, done.file("sample")) for done in found]
    tables = (file.read(columns=FEATURES_SCHEMA.names) for file in files)
    sample = FeatureBatch.concatenate([FeatureBatch.from_arrow(table) for table in tables])
    return sample.take(np.argsort(sample.image_ids, kind="stable"))


def added_up(worker: Worker, files: Sequence[StoredFile]) -> State:
    """The sums of the arrays of several safetensors files, by name: of integers, exact in any order."""
    totals: dict[str, Any] = {}
    for file in files:
        with worker.timer.phase("read"):
            found = load_safetensors(read_part(worker.store, file))
        totals = {name: array + totals.get(name, 0) for name, array in found.items()}
    return totals


def packed(state: State) -> bytes:
    """Named arrays as the bytes of a safetensors file."""
    return save_safetensors({name: np.ascontiguousarray(array) for name, array in state.items()})


@dataclass(frozen=True)
class TrainTask(Task):
    """Train the encoders and the index of one channel on the sample of all shards, sorted by image id."""

    stage: ClassVar[str] = "train"
    work: ChannelWork
    samples: tuple[Done, ...]
    seed: int
    probes: int
    codebook: Done | None

    @classmethod
    def of(
        cls,
        work: ChannelWork,
        made_of: Sequence[SampleTask],
        samples: Sequence[Done],
        seed: int,
        probes: int,
        codebook: Done | None = None,
    ) -> "TrainTask":
        """The task of one channel; its fingerprint is known before samples and codebook are, which what is done needs
        not."""
        sources = sorted(task.fingerprint for task in made_of)
        given = [state.sha256 for state in work.states]
        identity = fingerprint("train", work.training_identity(), work.name, seed, probes, sources, given)
        return cls(f"codebooks [{work.name}]", identity, work, tuple(samples), seed, probes, codebook)

    def run(self, worker: Worker) -> Done:
        """Fit each encoder on what the encoders before it make of the sample, then the index; or take what is given."""
        with worker.timer.phase("read"):
            sample = _whole_sample(worker, self.work, self.samples)
        counts = {"images": len(sample), "features": len(sample.descriptors)}
        num = 0 if self.work.channel.index.local else self.probes
        chosen = np.sort(np.argsort(seeded_uniform(sample.image_ids, self.seed + 1), kind="stable")[:num])
        probes = sample.take(chosen)
        channel, files = self.work.channel, []
        fits = channel.index.trained if self.codebook is None else channel.index.fits_sample
        trained = [not self.work.states and fits for fits in (*(spec.trained for spec in channel.encoders), fits)]
        with worker.timer.phase("device"):
            for position, spec in enumerate(channel.encoders):
                with _at(f"channels.{self.work.name}.encoders.{position}"):
                    given = self._given(worker, position)
                    if given is None:
                        encoder = _encoder_spec(worker, self.work, position).fit(sample, self.seed)
                    else:
                        encoder = spec.restore(given)
                probes = encoder.encode(probes)
                # Where nothing after it looks at the sample, the sample need not be encoded any further.
                sample = encoder.encode(sample) if any(trained[position + 1 :]) else probes
                files.append(self._put_state(worker, f"encoder-{position}", encoder))
            with _at(f"channels.{self.work.name}.index"):
                index = self._trained_index(worker, sample)
        files.append(self._put_state(worker, "index", index))
        path = worker.scratch("probes.parquet")
        write_parquet(path, pa.Table.from_batches([probes.to_arrow()]))
        files.append(self.put(worker, "probes", path, "parquet"))
        facts: dict[str, Any] = {"dim": int(probes.descriptors.shape[1])}
        if isinstance(index, AutoIndex):
            facts["choice"] = index.choice.to_json()
        return self.finish(worker, files, counts, facts)

    def _put_state(self, worker: Worker, role: str, trained: Encoder | Index) -> StoredFile:
        return self.put(worker, role, packed(trained.state()), "safetensors")

    def _given(self, worker: Worker, position: int) -> State | None:
        """The state of an encoder, or at -1 of the index, if it is not to be trained."""
        if not self.work.states:
            return None
        asset = self.work.states[position]
        return load_safetensors(worker.store.read(asset.key, sha256=asset.sha256))

    def _trained_index(self, worker: Worker, sample: FeatureBatch) -> Index:
        spec, given = self.work.channel.index, self._given(worker, -1)
        if given is not None:
            return spec.restore(given)
        if self.codebook is None:
            return spec.train(sample, self.seed)
        codebook = load_safetensors(read_part(worker.store, self.codebook.file("codebook")))
        return spec.finish(codebook, sample, self.seed)


@contextlib.contextmanager
def _at(path: str) -> Iterator[None]:
    """Name the place in the YAML whose method cannot be trained."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Trained:
    """The trained state of a channel in a worker."""

    encoders: list[Encoder]
    index: Index
    probes: FeatureBatch
    spec: IndexSpec
    """The settings of the index: those of the channel, or what training chose."""

    @classmethod
    def restore(cls, worker: Worker, work: ChannelWork, train: Done) -> "Trained":
        """From the files of a finished `train`."""
        state = load_safetensors(read_part(worker.store, train.file("index")))
        encoders = _restored_encoders(worker, work, train)
        probes = FeatureBatch.from_arrow(open_parquet(worker.store, train.file("probes")).read())
        index = work.channel.index.restore(state)
        return cls(encoders, index, probes, index.spec if isinstance(index, AutoIndex) else work.channel.index)


@dataclass(frozen=True)
class BackgroundTask(Task):
    """How far above the lowest the scores of irrelevant images lie in a channel, for a fusion that needs to know.

    Some images of the sample are asked for among others of it.
    """

    stage: ClassVar[str] = "background"
    work: ChannelWork
    train: Done
    samples: tuple[Done, ...]
    seed: int

    @classmethod
    def of(cls, work: ChannelWork, train: Done, samples: Sequence[Done], seed: int) -> "BackgroundTask":
        """The task of one channel."""
        sources = sorted(done.fingerprint for done in samples)
        return cls(
            f"background [{work.name}]",
            fingerprint("background", train.fingerprint, seed, sources),
            work,
            train,
            tuple(samples),
            seed,
        )

    def run(self, worker: Worker) -> Done:
        """Index a few images, search for a few others; the figure is a fact of the record, 0 if there are too few."""
        trained = worker.cached(self.train.fingerprint, lambda: Trained.restore(worker, self.work, self.train))
        with worker.timer.phase("read"):
            sample = _whole_sample(worker, self.work, self.samples)
        order = np.argsort(seeded_uniform(sample.image_ids, self.seed + 2), kind="stable")
        asked, others = order[:BACKGROUND_QUERIES], order[BACKGROUND_QUERIES:][:BACKGROUND_IMAGES]
        with worker.timer.phase("device"):
            value = self._measured(trained, sample.take(asked), sample.take(others)) if len(others) else 0.0
        return self.finish(worker, [], {"images": len(others), "queries": len(asked)}, {"background": value})

    def _measured(self, trained: "Trained", asked: FeatureBatch, others: FeatureBatch) -> float:
        partition = trained.index.build(trained.index.entries(encode_all(trained.encoders, others)))
        queries = trained.index.queries(encode_queries(trained.encoders, asked))
        if self.work.channel.index.damps_matches:
            queries = trained.index.damped(queries, partition.matches(queries))
        return background(partition.search(queries, len(others)), len(others))
