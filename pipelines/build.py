"""Stage `build`: the features of one shard -> entries of the index, and what exact search finds for the probes in it.

Entries of images that an earlier version knows are taken over, if they were made with the same trained state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa

from cbir.artifacts import Done, StoredFile
from cbir.index.dense import exact_search
from cbir.queries import encode_all
from cbir.spec import fingerprint
from cbir.types import FeatureBatch, Floats, Hits, Int64s
from pipelines.known import KnownImages, digests_of, rows_of
from pipelines.tables import open_parquet, read_features, sorted_table, write_parquet
from pipelines.training import Trained, packed
from pipelines.work import Asset, ChannelWork, Task, Worker

__all__ = ["PROBE_DEPTH", "BuildTask", "build_fingerprint", "probe_hits"]

PROBE_DEPTH = 101
"""A hundred neighbours and the probe itself."""

_KEPT_HITS = 128
"""So many are stored of a shard that some may be deleted before all have to be looked for again."""


@dataclass(frozen=True)
class BuildTask(Task):
    """Encode the features of one shard into index entries; on the way, compare them with the probes exactly."""

    stage: ClassVar[str] = "build"
    work: ChannelWork
    features: Done
    train: Done
    earlier: Asset | None = None
    """Which work has entries of images of this shard, if any has, as `KnownImages.of` reads it."""

    @classmethod
    def of(cls, work: ChannelWork, features: Done, train: Done, earlier: Asset | None = None) -> "BuildTask":
        """The task of one shard."""
        identity = build_fingerprint(work, features.fingerprint, train)
        return cls(f"entries [{work.name}]", identity, work, features, train, earlier)

    @property
    def weight(self) -> int:
        """Features to encode."""
        return self.features.counts["features"]

    def run(self, worker: Worker) -> Done:
        """Take over what is known, stream the other features through the encoders."""
        trained = worker.cached(self.train.fingerprint, lambda: Trained.restore(worker, self.work, self.train))
        made, unknown = self._taken_over(worker, trained)
        for features in self._features(worker, unknown):
            with worker.timer.phase("device"):
                encoded = encode_all(trained.encoders, features)
                made.entries.append(trained.index.entries(encoded))
                if _is_compared(trained):
                    found = exact_search(trained.probes, encoded, trained.spec.metric, _KEPT_HITS)
                    made.neighbours.append(_Neighbours(found, np.full(len(found), -np.inf, np.float32)))
                if self.work.channel.keep_signatures:
                    made.signatures.append(pa.Table.from_batches([trained.index.signatures(encoded).to_arrow()]))
        return self._commit(worker, trained, made)

    def _taken_over(self, worker: Worker, trained: Trained) -> tuple["_Made", Int64s | None]:
        """What is known of images of this shard, and the ids of the others; None for all of them.

        Nothing is taken over where so many of a probe's neighbours are gone that all have to be compared again.
        """
        known, made = KnownImages.of(worker, self.earlier), _Made()
        if not known:
            return made, None
        with worker.timer.phase("read"):
            table = open_parquet(worker.store, self.features.file("features")).read(["image_id", "content_sha256"])
            ids: Int64s = table.column("image_id").to_numpy()
            owners = known.owners(ids, digests_of(table))
            for number in np.unique(owners[owners >= 0]).tolist():
                build, wanted = known.made[number].build, ids[owners == number]
                assert build is not None, "a build asks for what was built"
                made.entries += rows_of(worker.store, build.file("entries"), wanted)
                if self.work.channel.keep_signatures:
                    made.signatures += rows_of(worker.store, build.file("signatures"), wanted)
                if _is_compared(trained):
                    made.neighbours.append(_Neighbours.stored(worker, build, wanted))
        if made.neighbours and _Neighbours.merge(made.neighbours).above_floor().image_ids.shape[1] < PROBE_DEPTH:
            return _Made(), None
        worker.tally["recalled"] += int((owners >= 0).sum())
        return made, ids[owners < 0]

    def _features(self, worker: Worker, image_ids: Int64s | None) -> Iterator[FeatureBatch]:
        """The features of these images; of no images if there are none, so that all that is written has its form."""
        batches = read_features(worker.store, self.features) if image_ids is None else self._some(worker, image_ids)
        while True:
            with worker.timer.phase("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _some(self, worker: Worker, image_ids: Int64s) -> Iterator[FeatureBatch]:
        yield next(read_features(worker.store, self.features)).take(np.arange(0))
        for table in rows_of(worker.store, self.features.file("features"), image_ids):
            yield FeatureBatch.from_arrow(table)

    def _commit(self, worker: Worker, trained: Trained, made: "_Made") -> Done:
        spec, table = trained.spec, sorted_table(pa.concat_tables(made.entries))
        hits = _Neighbours.merge(made.neighbours).above_floor() if made.neighbours else _NO_HITS
        path, probes = worker.scratch("entries.parquet"), worker.scratch("probes.parquet")
        with worker.timer.phase("write"):
            write_parquet(path, table, row_bytes=table.nbytes // max(table.num_rows, 1))
            write_parquet(probes, _hits_table(hits))
        facts = {"entry_bytes": table.num_rows * spec.entry_bytes(self.train.facts["dim"])}
        files = [self.put(worker, "entries", path, "parquet"), self.put(worker, "probe_hits", probes, "parquet")]
        if spec.has_statistics:
            files.append(self.put(worker, "statistics", packed(trained.index.statistics(table)), "safetensors"))
        if self.work.channel.keep_signatures:
            signatures = sorted_table(pa.concat_tables(made.signatures))
            facts["signature_bytes"] = signatures.nbytes
            files.append(self._put_signatures(worker, signatures))
        counts = {"images": self.features.counts["indexed"], "vectors": table.num_rows}
        return self.finish(worker, files, counts, facts)

    def _put_signatures(self, worker: Worker, table: pa.Table) -> StoredFile:
        path = worker.scratch("signatures.parquet")
        with worker.timer.phase("write"):
            write_parquet(path, table, row_bytes=table.nbytes // max(table.num_rows, 1))
        return self.put(worker, "signatures", path, "parquet")


def build_fingerprint(work: ChannelWork, features: str, train: Done) -> str:
    """That of the task for the features with this fingerprint."""
    return fingerprint("build", features, train.fingerprint, work.channel.keep_signatures)


@dataclass
class _Made:
    """What was made of a shard so far."""

    entries: list[pa.Table] = field(default_factory=list)
    signatures: list[pa.Table] = field(default_factory=list)
    neighbours: list["_Neighbours"] = field(default_factory=list)


def _is_compared(trained: Trained) -> bool:
    return len(trained.probes) > 0 and not trained.spec.local


@dataclass(frozen=True)
class _Neighbours:
    """Of the probes (P,) among some images of a shard: those whose scores are above `floor` (P,) are all there."""

    hits: Hits
    floor: Floats

    @classmethod
    def stored(cls, worker: Worker, build: Done, image_ids: Int64s) -> "_Neighbours":
        """Those among these images of a shard. A list that is full was cut; what it lost is no better than its last."""
        table = open_parquet(worker.store, build.file("probe_hits")).read()
        num_probes = len(np.unique(table.column("query").to_numpy()))
        hits = _hits_of(table, num_probes)
        is_there = np.isin(hits.image_ids, image_ids)
        floor = np.where(hits.image_ids[:, -1] < 0, -np.inf, hits.scores[:, -1]).astype(np.float32)
        return cls(Hits.ranked(np.where(is_there, hits.image_ids, -1), hits.scores, _KEPT_HITS), floor)

    @classmethod
    def merge(cls, parts: Sequence["_Neighbours"]) -> "_Neighbours":
        """Of several parts of one shard."""
        hits = Hits.merge([part.hits for part in parts], _KEPT_HITS)
        return cls(hits, np.max([part.floor for part in parts], axis=0))

    def above_floor(self) -> Hits:
        """Equally many of each probe, none of which can have been lost."""
        counts = (self.hits.scores > self.floor[:, None]).sum(1)
        width = np.where(np.isneginf(self.floor), _KEPT_HITS, counts).min(initial=_KEPT_HITS)
        return Hits(self.hits.image_ids[:, :width], self.hits.scores[:, :width])


def _hits_table(hits: Hits) -> pa.Table:
    query = np.repeat(np.arange(len(hits)), hits.image_ids.shape[1])
    return pa.table({"query": query, "image_id": hits.image_ids.ravel(), "score": hits.scores.ravel()})


def _hits_of(table: pa.Table, num_probes: int) -> Hits:
    ids, scores = table.column("image_id").to_numpy(), table.column("score").to_numpy()
    return Hits(ids.reshape(num_probes, -1), scores.reshape(num_probes, -1))


def probe_hits(worker: Worker, builds: Sequence[Done], num_probes: int) -> Hits:
    """The exact neighbours of the probes over all shards, from what every `build` found in its own."""
    if not num_probes:
        return _NO_HITS
    tables = (open_parquet(worker.store, build.file("probe_hits")).read() for build in builds)
    return Hits.merge([_hits_of(table, num_probes) for table in tables], PROBE_DEPTH)


_NO_HITS = Hits(np.empty((0, 0), np.int64), np.empty((0, 0), np.float32))
