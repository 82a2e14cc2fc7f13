"""What serving costs beside bare faiss: `bench_serving.py [vectors] [rounds]`; prints a Markdown table.

Clustered synthetic vectors (D = 128) in IVF-PQ are published as a version of one partition and as one of eight, without
images. The same queries go, one at a time and in turns, to a bare faiss index, to the searcher in this process, to a
pool of one actor and to the HTTP service in front of it; then to pool and bare faiss in batches. Every process searches
with one thread. Medians over the rounds.
"""

import contextlib
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import uvicorn

import cbir
from cbir.artifacts import StoredFile, put_part, sha256_of
from cbir.config import Config, parse_config
from cbir.index.dense import DensePartition, merge_partitions
from cbir.layout import IDS_SCHEMA, ChannelLayout, IdMap, Layout, PartitionLayout, partition_bounds
from cbir.storage import Store, open_store
from cbir.types import FeatureBatch, Floats, image_id
from cbir.versions import Manifest, Versions
from pipelines.query_pool import QueryPool
from pipelines.serve import listen
from pipelines.service import Service, Settings
from pipelines.training import packed
from pipelines.work import limit_threads

DIM, NUM_QUERIES, DEPTH, PROBES = 128, 200, 10, 16


def clustered(num: int, rng: np.random.Generator) -> Floats:
    """Unit vectors around `num / 20` centres."""
    centres = rng.normal(0, 1, (max(num // 20, 1), DIM)).astype(np.float32)
    vectors = centres[rng.integers(0, len(centres), num)] + rng.normal(0, 0.4, (num, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def published(store: Store, vectors: Floats, num_partitions: int) -> Manifest:
    """A version of these vectors, as `cbir index` lays it out."""
    index = {"name": "ivfpq", "lists": 1024, "bytes": 16, "probes": PROBES, "iterations": 5}
    extractor = {"name": "deep", "backbone": "test_resnet", "weights": "none", "size": 64}
    channels = {"vectors": {"extractor": extractor, "index": index}}
    config = parse_config({"images": "/unused", "store": store.uri, "channels": channels}, "the benchmark")
    ids = np.array([image_id(f"{number}.jpg") for number in range(len(vectors))], np.int64)
    order = np.argsort(ids)
    batch = FeatureBatch.of_global(ids, vectors).take(order)
    trained = config.channels["vectors"].index.train(batch.take(np.arange(0, len(batch), 4)), seed=0)
    files = [put_part(store, "train", f"{num_partitions}", "index", packed(trained.state()), "safetensors")]
    parts = []
    for low, high in partition_bounds(num_partitions):
        some = batch.take(np.flatnonzero((batch.image_ids >= low) & (batch.image_ids < high)))
        with tempfile.TemporaryDirectory() as scratch:
            trained.build(trained.entries(some)).save(Path(scratch, "index"))
            IdMap.write(Path(scratch, "ids"), id_rows(some))
            own = [
                put_part(store, "merge", f"{num_partitions}-{low}", role, Path(scratch, role), suffix)
                for role, suffix in (("index", "faiss"), ("ids", "arrow"))
            ]
        files += own
        parts.append(PartitionLayout(low, high, len(some), own[1].key, "", {"vectors": (own[0].key,)}, {}, {}))
    layout = Layout({"vectors": ChannelLayout((), files[0].key, {})}, tuple(parts))
    with Versions(store).writing("the benchmark") as held:
        return Versions(store).publish(manifest_of(config, layout, files), held)


def id_rows(batch: FeatureBatch) -> pa.Table:
    """Rows of the id map, all alike but for the id."""
    row = {"key": "a.jpg", "content_sha256": b"0" * 32, "source": 0, "kind": "file", "object": "a.jpg", "start": 0}
    row |= {"num_bytes": 0, "height": 1, "width": 1}
    columns = {"image_id": batch.image_ids} | {name: [value] * len(batch) for name, value in row.items()}
    return pa.table(columns, schema=IDS_SCHEMA)


def manifest_of(config: Config, layout: Layout, files: list[StoredFile]) -> Manifest:
    """The manifest of a version that has these files."""
    content = sha256_of(repr(layout).encode())
    return Manifest(0, content, config.model_dump(mode="json"), tuple(files), layout.to_json(), {}, ())


@contextlib.contextmanager
def served(pool: QueryPool) -> Iterator[Callable[[Floats], Any]]:
    """The service in a thread, as a function that asks it for one vector over one connection."""
    with listen("127.0.0.1", 0) as listener:
        app = Service(pool, Settings()).app
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_keep_alive=600))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1])

        def ask(vector: Floats) -> Any:
            body = json.dumps({"vector": vector.tolist()})
            connection.request("POST", f"/search?depth={DEPTH}", body, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())

        try:
            yield ask
        finally:
            connection.close()
            server.should_exit = True
            thread.join()


def milliseconds(ask: Callable[[Floats], Any], queries: Floats) -> float:
    """The median time of a query."""
    times = []
    for query in queries:
        begun = time.perf_counter()
        ask(query)
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def batch_rate(ask: Callable[[Floats], Any], queries: Floats) -> float:
    """Queries per second of all queries at once."""
    begun = time.perf_counter()
    ask(queries)
    return len(queries) / (time.perf_counter() - begun)


def concurrent_rate(ask: Callable[[Floats], Any], queries: Floats, threads: int = 8) -> float:
    """Queries per second of threads that each ask one query after the other."""
    begun = time.perf_counter()
    workers = [
        threading.Thread(target=lambda own: [ask(query) for query in own], args=(queries[number::threads],))
        for number in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(queries) / (time.perf_counter() - begun)


def measure(folder: str, queries: Floats, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Medians by what was asked: milliseconds of single queries, and queries per second of many."""
    searcher = cbir.open(folder)
    bare = bare_index(searcher)
    many = np.tile(queries, (10, 1))
    with QueryPool(folder) as pool, served(pool) as ask_http:
        singles: dict[str, Callable[[Floats], Any]] = {
            "bare faiss": lambda query: bare.search(query[None], DEPTH),
            "this process": lambda query: searcher.search(query, DEPTH),
            "one actor": lambda query: pool.search(query, DEPTH),
            "HTTP": ask_http,
        }
        rates: dict[str, Callable[[], float]] = {
            "bare faiss, a batch": lambda: batch_rate(lambda rows: bare.search(rows, DEPTH), many),
            "this process, a batch": lambda: batch_rate(lambda rows: searcher.answer_vectors(rows, DEPTH), many),
            "one actor, a batch": lambda: batch_rate(lambda rows: pool.answer_vectors(rows, DEPTH), many),
            "one actor, 8 threads": lambda: concurrent_rate(lambda query: pool.search(query, DEPTH), many),
        }
        single, rate = ({name: list[float]() for name in some} for some in (singles, rates))
        for _ in range(rounds):
            for name, ask in singles.items():
                single[name].append(milliseconds(ask, queries))
            for name, run in rates.items():
                rate[name].append(run())
    return tuple({name: statistics.median(some) for name, some in found.items()} for found in (single, rate))  # type: ignore[return-value]


def main(num: int = 200_000, rounds: int = 3) -> None:
    """Measure, and print the tables."""
    limit_threads()
    rng = np.random.default_rng(0)
    vectors = clustered(num, rng)
    queries = vectors[rng.choice(num, NUM_QUERIES)]
    for num_partitions in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            published(open_store(folder), vectors, num_partitions)
            single, rate = measure(folder, queries, rounds)
        print(
            f"\n{num:,} vectors, {num_partitions} partition(s), {PROBES} probes\n\n| | ms per query | queries per s |"
        )
        print("|---|---|---|")
        for name, time_ms in single.items():
            print(f"| {name} | {time_ms:.2f} | {1e3 / time_ms:,.0f} |")
        for name, per_second in rate.items():
            print(f"| {name} | | {per_second:,.0f} |")


def bare_index(searcher: Any) -> faiss.Index:
    """All vectors in one plain faiss index."""
    parts = [part.indexes["vectors"] for part in searcher.partitions]
    assert all(isinstance(part, DensePartition) for part in parts)
    index = merge_partitions(parts)
    faiss.extract_index_ivf(index).nprobe = PROBES
    return index


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
