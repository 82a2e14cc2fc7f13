"""What shards do to an index: `python tests/benchmarks/bench_sharding.py [vectors]`; prints Markdown tables.

Clustered vectors stand in for the features of photographs: they are written as the feature files and DONE records that
`extract` leaves, and the pipeline's own tasks (sample, train, build, merge) do the rest. Beside them stands plain faiss
trained on the first vectors that come, as some builders do. Recall is against exact search.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from cbir.artifacts import Done, create_done, put_part
from cbir.config import Channel
from cbir.index.dense import exact_search
from cbir.index.index import SearchIndex
from cbir.layout import IDS_SCHEMA, partition_bounds
from cbir.spec import fingerprint
from cbir.types import FeatureBatch, Floats, Hits, Int64s, image_id
from pipelines.build import BuildTask
from pipelines.stages import MergeTask
from pipelines.tables import ShardWriter
from pipelines.training import SampleTask, TrainTask
from pipelines.work import ChannelWork, Worker, limit_threads

DIM, DEPTH, NUM_QUERIES, SEED = 32, 10, 200, 5
NUM_THEMES = 20
LISTS, PARTS, BITS, PROBES = 64, 16, 6, 4


@dataclass(frozen=True)
class Clustered:
    """One vector per image, numbered so that the images of a class, and the classes of a theme, are neighbours."""

    vectors: Floats
    queries: Floats

    @classmethod
    def draw(cls, num: int) -> "Clustered":
        """`num` vectors, ten of a class and as many classes of a theme, and queries near some of them."""
        rng, each = np.random.default_rng(0), num // NUM_THEMES // DEPTH
        themes = rng.normal(0, 1, (NUM_THEMES, DIM)).repeat(each, 0)
        centres = (themes + rng.normal(0, 0.4, themes.shape)).repeat(DEPTH, 0)
        vectors = centres + rng.normal(0, 0.1, centres.shape)
        queries = vectors[rng.choice(len(vectors), NUM_QUERIES)] + rng.normal(0, 0.1, (NUM_QUERIES, DIM))
        return cls(*((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (vectors, queries)))

    def batch(self, numbers: Int64s) -> FeatureBatch:
        """The features of the images with these numbers."""
        ids = np.array([image_id(f"{number}.jpg") for number in numbers], np.int64)
        return FeatureBatch.of_global(ids, self.vectors[numbers])

    def query_batch(self) -> FeatureBatch:
        """The queries."""
        return FeatureBatch.of_global(np.arange(len(self.queries), dtype=np.int64), self.queries)


def channel(index: dict[str, object]) -> ChannelWork:
    """One descriptor per image as it comes."""
    extractor = {"name": "vectors", "dim": DIM, "dtype": "float32"}
    return ChannelWork("global", Channel.model_validate({"extractor": extractor, "index": index}))


IVFPQ = {"name": "ivfpq", "lists": LISTS, "bytes": PARTS, "bits": BITS, "probes": PROBES}


def extracted(worker: Worker, data: Clustered, shards: Sequence[Int64s]) -> list[Done]:
    """The records that `extract` would leave for these shards."""
    return [_write_shard(worker, data.batch(numbers), numbers) for numbers in shards]


def _write_shard(worker: Worker, batch: FeatureBatch, numbers: Int64s) -> Done:
    writer, path = ShardWriter(worker.scratch("shard.arrow")), worker.scratch("shard.parquet")
    rows = [
        {"image_id": image, "key": f"{number}.jpg", "content_sha256": bytes(32), "source": 0, "kind": "files"}
        | {"object": f"{number}.jpg", "start": 0, "num_bytes": 1, "height": 1, "width": 1}
        for image, number in zip(batch.image_ids.tolist(), numbers.tolist(), strict=True)
    ]
    writer.add(batch, pa.Table.from_pylist(rows, schema=IDS_SCHEMA))
    writer.finish(path, batch)
    identity = fingerprint("shard", numbers.tolist())
    file = put_part(worker.store, "extract", identity, "features", path, "parquet")
    counts = {"images": len(batch), "indexed": len(batch), "quarantined": 0, "features": len(batch)}
    return create_done(worker.store, Done("extract", identity, (file,), counts))


@dataclass(frozen=True)
class BuiltIndex:
    """The records of a build and its opened partitions."""

    train: Done
    builds: Sequence[Done]
    merges: Sequence[Done]
    partitions: Sequence[SearchIndex]

    def search(self, queries: FeatureBatch, depth: int = DEPTH) -> Hits:
        """The best of all partitions."""
        return Hits.merge([partition.search(queries, depth) for partition in self.partitions], depth)


def build(
    worker: Worker, work: ChannelWork, shards: Sequence[Done], share: float, num_partitions: int = 1
) -> BuiltIndex:
    """Sample, train, build and merge as the pipeline does."""
    drawing = [SampleTask.of(done, share, SEED) for done in shards]
    samples = [worker.do(task).done for task in drawing]
    train = worker.do(TrainTask.of(work, drawing, samples, SEED, 10)).done
    builds = [worker.do(BuildTask.of(work, done, train)).done for done in shards]
    content = fingerprint([done.fingerprint for done in builds])
    bounds = partition_bounds(num_partitions)
    tasks = [MergeTask.of(bound, 0, work, train, builds, None, content) for bound in bounds]
    return _opened(worker, work, train, builds, tasks)


def unmerged(worker: Worker, work: ChannelWork, whole: BuiltIndex) -> BuiltIndex:
    """The same entries, but every build shard stays an index of its own."""
    (bounds,) = partition_bounds(1)
    tasks = [MergeTask.of(bounds, 0, work, whole.train, [done], None, done.fingerprint) for done in whole.builds]
    return _opened(worker, work, whole.train, whole.builds, tasks)


def _opened(
    worker: Worker, work: ChannelWork, train: Done, builds: Sequence[Done], tasks: Sequence[MergeTask]
) -> BuiltIndex:
    merges = [worker.do(task).done for task in tasks]
    files = [done.file("index") for done in merges]
    partitions = [work.channel.index.load(worker.fetch(file.key, file.sha256)) for file in files]
    return BuiltIndex(train, builds, merges, partitions)


def sorted_shards(num: int, num_shards: int) -> list[Int64s]:
    """Every shard holds whole classes."""
    return np.array_split(np.arange(num), num_shards)


def shuffled_shards(num: int, num_shards: int) -> list[Int64s]:
    """Every shard holds a bit of everything."""
    return np.array_split(np.random.default_rng(1).permutation(num), num_shards)


def truth(data: Clustered) -> Int64s:
    """The true neighbours of the queries (Q, DEPTH)."""
    return exact_search(data.query_batch(), data.batch(np.arange(len(data.vectors))), "ip", DEPTH).image_ids


def recall(found: Int64s, true: Int64s) -> float:
    """Recall@DEPTH."""
    return statistics.mean(len(set(a) & set(b)) / DEPTH for a, b in zip(found.tolist(), true.tolist(), strict=True))


def trained_on_the_first(data: Clustered, order: Int64s, share: float) -> Int64s:
    """Results of plain faiss with the same parameters, trained on the first vectors of this order."""
    ids = data.batch(order).image_ids
    quantiser = faiss.IndexFlatIP(DIM)
    index = faiss.IndexIVFPQ(quantiser, DIM, LISTS, PARTS, BITS, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = PROBES
    index.train(data.vectors[order[: int(share * len(order))]])
    index.add_with_ids(data.vectors[order], ids)
    return np.asarray(index.search(data.queries, DEPTH)[1])


def _recall_table(worker: Worker, data: Clustered, share: float) -> None:
    num, true, work = len(data.vectors), truth(data), channel(IVFPQ)
    print(f"\nRecall@{DEPTH} of ivfpq over {num:,} vectors, codebooks trained on {share:.0%} of them.\n")
    print("| shards | the pipeline | plain faiss, trained on the first vectors |\n|---|---|---|")
    for name, arrange in (("class-sorted", sorted_shards), ("shuffled", shuffled_shards)):
        shards = arrange(num, 40)
        ours = build(worker, work, extracted(worker, data, shards), share).search(data.query_batch()).image_ids
        first = trained_on_the_first(data, np.concatenate(shards), share)
        print(f"| 40, {name} | {recall(ours, true):.3f} | {recall(first, true):.3f} |")


def _query_table(worker: Worker, data: Clustered, share: float) -> None:
    num, work = len(data.vectors), channel(IVFPQ)
    print("\nOne query, by the number of build shards: merged, and if every shard stayed an index of its own.\n")
    print("| build shards | files | lists looked into | median ms | unmerged: files | lists | median ms |")
    print("|---|---|---|---|---|---|---|")
    built = {}
    for num_shards in (1, 8, 64):
        whole = build(worker, work, extracted(worker, data, shuffled_shards(num, num_shards)), share)
        built[num_shards] = (whole, unmerged(worker, work, whole))
    for num_shards, (merged_ms, unmerged_ms) in _interleaved(built, data).items():
        columns = f"1 | {PROBES} | {merged_ms:.3f} | {num_shards} | {PROBES * num_shards} | {unmerged_ms:.3f}"
        print(f"| {num_shards} | {columns} |")


def _interleaved(built: dict[int, tuple[BuiltIndex, BuiltIndex]], data: Clustered) -> dict[int, tuple[float, float]]:
    times: dict[tuple[int, int], list[float]] = {}
    for query in range(NUM_QUERIES):
        one = FeatureBatch.of_global(np.zeros(1, np.int64), data.queries[query : query + 1])
        for num_shards, kinds in built.items():
            for kind, index in enumerate(kinds):
                start = time.perf_counter()
                index.search(one)
                times.setdefault((num_shards, kind), []).append(1e3 * (time.perf_counter() - start))
    return {n: (statistics.median(times[n, 0]), statistics.median(times[n, 1])) for n in built}


def main() -> None:
    limit_threads()
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    data, share = Clustered.draw(num), 0.2
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(str(Path(folder) / "store"))
        _recall_table(worker, data, share)
        _query_table(worker, data, share)
        worker.close()
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
