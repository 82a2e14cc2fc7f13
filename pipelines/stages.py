"""The stages after `build`: totals, catalog and merge, each a task over plain files of the store."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_safetensors

from cbir.artifacts import Done, StoredFile, read_part
from cbir.collection import Place
from cbir.errors import DataError
from cbir.layout import IDS_SCHEMA, FeatureFile, IdMap
from cbir.spec import fingerprint
from cbir.types import FEATURES_SCHEMA, FeatureBatch
from pipelines.known import digests_of
from pipelines.tables import on_disk, read_range, sorted_table, write_parquet
from pipelines.training import Trained, added_up, packed
from pipelines.work import ChannelWork, Task, Worker

__all__ = [
    "CatalogTask",
    "Extracted",
    "MergeTask",
    "PublishFeaturesTask",
    "TotalsTask",
]


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
    """The id map and the quarantine ledger of one partition; finds keys that stand twice.

    `contents`, a fact of its record, identifies by channel which images with which bytes have features here.
    """

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
            rows = self._rows(worker)
            ledgers = [self._read(worker, part.done.file("quarantine")) for part in self.extracted]
        contents = {}
        for channel in {part.channel for part in self.extracted}:
            mine = [n for n, part in enumerate(self.extracted) if part.channel == channel]
            _refuse_duplicates([rows[n] for n in mine], [ledgers[n] for n in mine], self.sources)
            contents[channel] = _content_of(pa.concat_tables(rows[n] for n in mine))
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
        counts = {"indexed": ids.num_rows, "quarantined": len(lost)}
        return self.finish(worker, files, counts, {"contents": contents})

    def _rows(self, worker: Worker) -> list[pa.Table]:
        """The rows of the id map of every shard and channel; they lie on the disk."""
        found = (self._read(worker, part.done.file("features"), IDS_SCHEMA.names) for part in self.extracted)
        sizes: list[int] = []

        def counted() -> Iterator[pa.Table]:
            for table in found:
                sizes.append(table.num_rows)
                yield table

        whole = on_disk(worker.scratch("rows.arrow"), counted())
        starts = np.cumsum([0, *sizes])[:-1].tolist()
        return [whole.slice(start, size) for start, size in zip(starts, sizes, strict=True)]

    def _read(self, worker: Worker, file: StoredFile, columns: list[str] | None = None) -> pa.Table:
        return read_range(worker.store, file, self.low, self.high, columns)


def _distinct(table: pa.Table) -> pa.Table:
    """The first of the rows with the same id, which is the same image seen by several channels."""
    is_first = np.diff(table.column("image_id").to_numpy(), prepend=-1) != 0
    return table if is_first.all() else table.filter(pa.array(is_first))


def _content_of(rows: pa.Table) -> str:
    """What identifies a set of images and their bytes, wherever they lie."""
    ids, digests = rows.column("image_id").to_numpy(), digests_of(rows)
    order = np.argsort(ids)
    return hashlib.sha256(ids[order].tobytes() + digests[order].tobytes()).hexdigest()


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
    """One file of the index of one partition and channel, from the entries of every shard.

    It is identified by what lies in the partition, and not by the shards: other shards, or changes in other
    partitions, leave it as it is.
    """

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
        content: str,
    ) -> "MergeTask":
        """The task of one range of ids and one of the `IndexSpec.pieces` of its index.

        `content` identifies the features of the images in this range.
        """
        counted = totals.file("totals").sha256 if totals else ""
        identity = fingerprint("merge", bounds, piece, train.fingerprint, content, counted)
        name = f"partition {bounds[0]:016x} [{work.name}]" + (f" part {piece}" if piece else "")
        return cls(name, identity, *bounds, piece, work, train, tuple(builds), totals)

    def run(self, worker: Worker) -> Done:
        """Concatenate the entries, build, save."""
        trained = worker.cached(self.train.fingerprint, lambda: Trained.restore(worker, self.work, self.train))
        with worker.timer.phase("read"):
            parts = (done.file("entries") for done in self.builds)
            tables = (read_range(worker.store, part, self.low, self.high) for part in parts)
            entries = on_disk(worker.scratch("entries.arrow"), (trained.index.piece(t, self.piece) for t in tables))
            totals = load_safetensors(read_part(worker.store, self.totals.file("totals"))) if self.totals else None
        path = worker.scratch(f"index.{self.work.channel.index.suffix}")
        with worker.timer.phase("device"):
            trained.index.build(entries, totals).save(path)
        files = [self.put(worker, "index", path, self.work.channel.index.suffix)]
        worker.scratch("entries.arrow").unlink()
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
        content: str,
    ) -> "PublishFeaturesTask":
        """The task of one range of ids; `sources` have a Parquet file of that role each.

        `content` identifies the rows of that role in this range.
        """
        identity = fingerprint("publish features", bounds, role, content)
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
