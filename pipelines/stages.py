"""The stages after training: build, totals, catalog and merge, each a task over plain files of the store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_safetensors

from cbir.artifacts import Done, StoredFile, read_part
from cbir.collection import Place
from cbir.errors import DataError
from cbir.index.dense import exact_search
from cbir.layout import IDS_SCHEMA, FeatureFile, IdMap
from cbir.queries import encode_all
from cbir.spec import fingerprint
from cbir.types import FEATURES_SCHEMA, FeatureBatch, Hits
from pipelines.tables import open_parquet, read_features, read_range, sorted_table, write_parquet
from pipelines.training import Trained, added_up, packed
from pipelines.work import ChannelWork, Task, Worker

__all__ = [
    "BuildTask",
    "CatalogTask",
    "Extracted",
    "MergeTask",
    "PublishFeaturesTask",
    "TotalsTask",
    "probe_hits",
]

PROBE_DEPTH = 101
"""A hundred neighbours and the probe itself."""


@dataclass(frozen=True)
class BuildTask(Task):
    """Encode the features of one shard into index entries; on the way, compare them with the probes exactly."""

    stage: ClassVar[str] = "build"
    work: ChannelWork
    features: Done
    train: Done

    @classmethod
    def of(cls, work: ChannelWork, features: Done, train: Done) -> "BuildTask":
        """The task of one shard."""
        identity = fingerprint("build", features.fingerprint, train.fingerprint, work.channel.keep_signatures)
        return cls(f"entries [{work.name}]", identity, work, features, train)

    @property
    def weight(self) -> int:
        """Features to encode."""
        return self.features.counts["features"]

    def run(self, worker: Worker) -> Done:
        """Stream the features through the encoders."""
        trained = worker.cached(self.train.fingerprint, lambda: Trained.restore(worker, self.work, self.train))
        spec = trained.spec
        entries: list[pa.Table] = []
        exact: list[Hits] = []
        signatures: list[pa.RecordBatch] = []
        for features in self._features(worker):
            with worker.timer.phase("device"):
                encoded = encode_all(trained.encoders, features)
                entries.append(trained.index.entries(encoded))
                if len(trained.probes) and not spec.local:
                    exact.append(exact_search(trained.probes, encoded, spec.metric, PROBE_DEPTH))
                if self.work.channel.keep_signatures:
                    signatures.append(trained.index.signatures(encoded).to_arrow())
        table = sorted_table(pa.concat_tables(entries))
        path, probes = worker.scratch("entries.parquet"), worker.scratch("probes.parquet")
        with worker.timer.phase("write"):
            write_parquet(path, table, row_bytes=table.nbytes // max(table.num_rows, 1))
            write_parquet(probes, _hits_table(Hits.merge(exact, PROBE_DEPTH) if exact else _NO_HITS))
        facts = {"entry_bytes": table.num_rows * spec.entry_bytes(self.train.facts["dim"])}
        files = [self.put(worker, "entries", path, "parquet"), self.put(worker, "probe_hits", probes, "parquet")]
        if spec.has_statistics:
            files.append(self.put(worker, "statistics", packed(trained.index.statistics(table)), "safetensors"))
        if self.work.channel.keep_signatures:
            facts["signature_bytes"] = sum(batch.nbytes for batch in signatures)
            files.append(self._put_signatures(worker, signatures))
        counts = {"images": self.features.counts["indexed"], "vectors": table.num_rows}
        return self.finish(worker, files, counts, facts)

    def _put_signatures(self, worker: Worker, batches: Sequence[pa.RecordBatch]) -> StoredFile:
        table, path = pa.Table.from_batches(batches), worker.scratch("signatures.parquet")
        with worker.timer.phase("write"):
            write_parquet(path, table, row_bytes=table.nbytes // max(table.num_rows, 1))
        return self.put(worker, "signatures", path, "parquet")

    def _features(self, worker: Worker) -> Iterator[FeatureBatch]:
        batches = read_features(worker.store, self.features)
        while True:
            with worker.timer.phase("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


_NO_HITS = Hits(np.empty((0, 0), np.int64), np.empty((0, 0), np.float32))


def _hits_table(hits: Hits) -> pa.Table:
    query = np.repeat(np.arange(len(hits)), hits.image_ids.shape[1])
    return pa.table({"query": query, "image_id": hits.image_ids.ravel(), "score": hits.scores.ravel()})


def probe_hits(worker: Worker, builds: Sequence[Done], num_probes: int) -> Hits:
    """The exact neighbours of the probes over all shards, from what every `build` found in its own."""
    if not num_probes:
        return _NO_HITS
    parts = []
    for build in builds:
        table = open_parquet(worker.store, build.file("probe_hits")).read()
        ids, scores = table.column("image_id").to_numpy(), table.column("score").to_numpy()
        parts.append(Hits(ids.reshape(num_probes, -1), scores.reshape(num_probes, -1)))
    return Hits.merge(parts, PROBE_DEPTH)


@dataclass(frozen=True)
class TotalsTask(Task):
    """The statistics of all shards of one channel, added up: what every partition is built with."""

    stage: ClassVar[str] = "totals"
    builds: tuple[Done, ...]

    @classmethod
    def of(cls, work: ChannelWork, builds: Sequence[Done]) -> "TotalsTask":
        """The task of one channel."""
        identity = fingerprint("totals", sorted(done.fingerprint for done in builds))
        return cls(f"totals [{work.name}]", identity, tuple(builds))

    def run(self, worker: Worker) -> Done:
        """Exact sums of integers, whatever the order."""
        totals = added_up(worker, [done.file("statistics") for done in self.builds])
        return self.finish(worker, [self.put(worker, "totals", packed(totals), "safetensors")], {})


@dataclass(frozen=True)
class Extracted:
    """The finished `extract` of one shard and channel."""

    shard: str
    channel: str
    done: Done


@dataclass(frozen=True)
class CatalogTask(Task):
    """The id map and the quarantine ledger of one partition; finds keys that stand twice."""

    stage: ClassVar[str] = "catalog"
    low: int
    high: int
    extracted: tuple[Extracted, ...]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, bounds: tuple[int, int], extracted: Sequence[Extracted], sources: tuple[str, ...]) -> "CatalogTask":
        """The task of one range of ids over all shards and channels."""
        ordered = tuple(sorted(extracted, key=lambda part: (part.shard, part.channel)))
        identity = fingerprint("catalog", bounds, sorted(part.done.fingerprint for part in ordered))
        return cls(f"ids from {bounds[0]:016x}", identity, *bounds, ordered, sources)

    def run(self, worker: Worker) -> Done:
        """Read the id columns of every shard in this range."""
        with worker.timer.phase("read"):
            rows = [self._read(worker, part.done.file("features"), IDS_SCHEMA.names) for part in self.extracted]
            ledgers = [self._read(worker, part.done.file("quarantine")) for part in self.extracted]
        for channel in {part.channel for part in self.extracted}:
            mine = [n for n, part in enumerate(self.extracted) if part.channel == channel]
            _refuse_duplicates([rows[n] for n in mine], [ledgers[n] for n in mine], self.sources)
        ids = _distinct(sorted_table(pa.concat_tables(rows)))
        quarantine = sorted_table(pa.concat_tables(ledgers))
        lost = np.setdiff1d(quarantine.column("image_id").to_numpy(), ids.column("image_id").to_numpy())
        ids_path, quarantine_path = worker.scratch("ids.arrow"), worker.scratch("quarantine.parquet")
        IdMap.write(ids_path, ids)
        write_parquet(quarantine_path, quarantine)
        files = [
            self.put(worker, "ids", ids_path, "arrow"),
            self.put(worker, "quarantine", quarantine_path, "parquet"),
        ]
        return self.finish(worker, files, {"indexed": ids.num_rows, "quarantined": len(lost)})

    def _read(self, worker: Worker, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
        return read_range(worker.store, file, self.low, self.high, columns)


def _distinct(table: pa.Table) -> pa.Table:
    """The first of the rows with the same id, which is the same image seen by several channels."""
    ids = table.column("image_id").to_numpy()
    return table.filter(pa.array(np.diff(ids, prepend=-1) != 0))


def _refuse_duplicates(rows: Sequence[pa.Table], ledgers: Sequence[pa.Table], sources: Sequence[str]) -> None:
    """DataError if two images of one channel have the same id; names both places."""
    indexed = pa.concat_tables(rows)
    ids = np.concatenate([indexed.column("image_id").to_numpy(), *(t.column("image_id").to_numpy() for t in ledgers)])
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if not len(twice):
        return
    (key, place), (other_key, other_place) = (
        _describe(indexed, ledgers, sources, int(order[number])) for number in (twice[0], twice[0] + 1)
    )
    if key != other_key:
        raise DataError(f"keys {key!r} and {other_key!r} have the same 63-bit id; rename one of these images")
    raise DataError(f"key {key!r} stands twice: in {place} and in {other_place}; keys must be unique over all images")


def _describe(indexed: pa.Table, ledgers: Sequence[pa.Table], sources: Sequence[str], number: int) -> tuple[str, str]:
    """Key and place of a row of the indexed images, or of the quarantined ones after them."""
    ledger = pa.concat_tables(ledgers)
    table, number = (indexed, number) if number < indexed.num_rows else (ledger, number - indexed.num_rows)
    row = table.slice(number, 1).to_pylist()[0]
    place = Place(row["kind"], row["object"], row["start"], row["num_bytes"])
    return row["key"], place.describe(sources[row["source"]], row["key"])


@dataclass(frozen=True)
class MergeTask(Task):
    """One file of the index of one partition and channel, from the entries of every shard."""

    stage: ClassVar[str] = "merge"
    low: int
    high: int
    piece: int
    work: ChannelWork
    train: Done
    builds: tuple[Done, ...]
    totals: Done | None

    @classmethod
    def of(
        cls,
        bounds: tuple[int, int],
        piece: int,
        work: ChannelWork,
        train: Done,
        builds: Sequence[Done],
        totals: Done | None,
    ) -> "MergeTask":
        """The task of one range of ids and one of the `IndexSpec.pieces` of its index."""
        parts = sorted(done.fingerprint for done in builds)
        identity = fingerprint("merge", bounds, piece, train.fingerprint, parts)
        name = f"partition {bounds[0]:016x} [{work.name}]" + (f" part {piece}" if piece else "")
        return cls(name, identity, *bounds, piece, work, train, tuple(builds), totals)

    def run(self, worker: Worker) -> Done:
        """Concatenate the entries, build, save."""
        trained = worker.cached(self.train.fingerprint, lambda: Trained.restore(worker, self.work, self.train))
        with worker.timer.phase("read"):
            parts = (done.file("entries") for done in self.builds)
            tables = (read_range(worker.store, part, self.low, self.high) for part in parts)
            entries = pa.concat_tables([trained.index.piece(table, self.piece) for table in tables])
            totals = load_safetensors(read_part(worker.store, self.totals.file("totals"))) if self.totals else None
        path = worker.scratch(f"index.{self.work.channel.index.suffix}")
        with worker.timer.phase("device"):
            trained.index.build(entries, totals).save(path)
        files = [self.put(worker, "index", path, self.work.channel.index.suffix)]
        return self.finish(worker, files, {"vectors": entries.num_rows})


@dataclass(frozen=True)
class PublishFeaturesTask(Task):
    """The features, or the signatures, of the images of one partition, as a file that query actors map."""

    stage: ClassVar[str] = "merge"
    low: int
    high: int
    role: str
    sources: tuple[Done, ...]

    @classmethod
    def of(
        cls,
        bounds: tuple[int, int],
        work: ChannelWork,
        role: Literal["features", "signatures"],
        sources: Sequence[Done],
    ) -> "PublishFeaturesTask":
        """The task of one range of ids; `sources` have a Parquet file of that role each."""
        identity = fingerprint("publish features", bounds, role, sorted(done.fingerprint for done in sources))
        return cls(f"{role} {bounds[0]:016x} [{work.name}]", identity, *bounds, role, tuple(sources))

    def run(self, worker: Worker) -> Done:
        """Concatenate what lies in the range, sort, write."""
        with worker.timer.phase("read"):
            merged = self._merged(worker)
        order = np.argsort(merged.image_ids, kind="stable")
        step = 256
        batches = (merged.take(order[start : start + step]) for start in range(0, len(order), step))
        path = worker.scratch(f"{self.role}.arrow")
        with worker.timer.phase("write"):
            images = FeatureFile.write(path, batches, merged.take(order[:0]))
        return self.finish(worker, [self.put(worker, self.role, path, "arrow")], {"images": images})

    def _merged(self, worker: Worker) -> FeatureBatch:
        files = [done.file(self.role) for done in self.sources]
        tables = (read_range(worker.store, file, self.low, self.high, FEATURES_SCHEMA.names) for file in files)
        return FeatureBatch.concatenate([FeatureBatch.from_arrow(table) for table in tables])
