"""The dense index by size, through the whole pipeline: `bench_dense_scale.py [vectors ...] [--folder DIR] [--lists N]`.

Clustered synthetic vectors (D = 128, float16, unit length) lie in Parquet as another program would leave them; `cbir
index` makes an IVF-PQ index of them with two workers, end to end. Printed are wall time, the share of each stage, the
peak memory of a worker, bytes per vector, and for several numbers of probes recall@10 against exact search and the
time of one query in one process with one thread. Queries are perturbed vectors of the index; they are not in it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cbir.search import Searcher, searcher_of
from cbir.storage import open_store
from cbir.types import FeatureBatch, Floats, Int64s, image_id
from cbir.versions import Versions
from pipelines.work import limit_threads
from tests.benchmarks.processes import measured

DIM, CLUSTERS, FACTORS = 128, 4096, 24
SPREAD, NOISE = 0.7, 0.1
"""Lengths beside that of a centre: of what the vectors of a cluster differ by, in FACTORS directions and in all."""

FILE_VECTORS, QUERIES, DEPTH = 250_000, 200, 10
PROBES = (4, 16, 64)


def made(numbers: Int64s, seed: int) -> Floats:
    """Unit vectors (n, D) about the centres of clusters."""
    rng, fixed = np.random.default_rng([seed, int(numbers[0])]), np.random.default_rng(seed)
    centres = fixed.standard_normal((CLUSTERS, DIM), np.float32) / np.float32(DIM**0.5)
    directions = fixed.standard_normal((FACTORS, DIM), np.float32) / np.float32((FACTORS * DIM) ** 0.5)
    rows = centres[rng.integers(0, CLUSTERS, len(numbers))]
    rows += np.float32(SPREAD) * (rng.standard_normal((len(rows), FACTORS), np.float32) @ directions)
    return unit(noisy(rows, rng)).astype(np.float16).astype(np.float32)


def noisy(rows: Floats, rng: np.random.Generator) -> Floats:
    """With a little of everything."""
    return rows + np.float32(NOISE / DIM**0.5) * rng.standard_normal(rows.shape, np.float32)


def unit(rows: Floats) -> Floats:
    """Of unit length."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def blocks(num_vectors: int) -> Iterator[Int64s]:
    """The numbers of the vectors of each file."""
    for start in range(0, num_vectors, FILE_VECTORS):
        yield np.arange(start, min(start + FILE_VECTORS, num_vectors))


def write(folder: Path, num_vectors: int) -> None:
    """The feature store."""
    folder.mkdir()
    for numbers in blocks(num_vectors):
        rows = made(numbers, 1).astype(np.float16)
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * DIM), len(rows), [None, pa.py_buffer(rows)])
        table = pa.table({"key": [_key(number) for number in numbers.tolist()], "vector": column})
        pq.write_table(table, folder / f"{numbers[0]:09d}.parquet", row_group_size=16_384)


def _key(number: int) -> str:
    return f"v{number}"


def queries(num_vectors: int) -> Floats:
    """Vectors of the first file, perturbed."""
    rows = made(np.arange(min(FILE_VECTORS, num_vectors)), 1)[:QUERIES]
    return unit(noisy(rows, np.random.default_rng(2)))


def exact(asked: Floats, num_vectors: int) -> Int64s:
    """The ids (Q, 10) of the vectors of largest inner product."""
    best = np.full((len(asked), DEPTH), -np.inf, np.float32)
    owners = np.full(best.shape, -1, np.int64)
    for numbers in blocks(num_vectors):
        scores = np.hstack([best, asked @ made(numbers, 1).T])
        top = np.argpartition(-scores, DEPTH, axis=1)[:, :DEPTH]
        everyone = np.hstack([owners, np.broadcast_to(numbers, (len(asked), len(numbers)))])
        best, owners = np.take_along_axis(scores, top, 1), np.take_along_axis(everyone, top, 1)
    return np.array([[image_id(_key(number)) for number in row] for row in owners.tolist()])


def settings(folder: Path, num_vectors: int, lists: int) -> dict[str, Any]:
    """The configuration of one size."""
    return {
        "images": str(folder / "vectors"),
        "store": str(folder / "store"),
        "input": {"format": "vectors"},
        "sample": {"images": 50 * lists, "features": 50 * lists},
        "channels": {
            "given": {
                "extractor": {"name": "vectors", "dim": DIM},
                "index": {"name": "ivfpq", "lists": lists, "bytes": 32, "iterations": 10},
            },
        },
        "partition_megabytes": 128,
        "evaluate": {"probes": 0},
        "workers": 2,
    }


def measure(folder: Path, num_vectors: int, lists: int) -> None:
    """Build and search at one size; prints the rows of the tables."""
    write(folder / "vectors", num_vectors)
    data = settings(folder, num_vectors, lists)
    path = folder / "config.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    cost = measured([sys.executable, "-c", "from pipelines.cli import main; main()", "index", str(path)])
    searcher = opened(data["store"], {})
    stored = sum(file.num_bytes for file in searcher.manifest.files if file.key.endswith(".faiss"))
    print(
        f"| {num_vectors:,} | {lists:,} | {len(searcher.partitions)} | {cost.wall_s:.0f} | "
        f"{num_vectors / cost.wall_s:,.0f} | {cost.cpu_s:.0f} | {max(cost.worker_bytes) / 1e6:,.0f} | "
        f"{stored / num_vectors:.1f} | {' | '.join(searched(data['store'], num_vectors))} |",
        flush=True,
    )


def searched(store: str, num_vectors: int) -> Iterator[str]:
    """recall@10 and milliseconds of one query (p50 / p99) for each number of probes."""
    asked = queries(num_vectors)
    wanted = exact(asked, num_vectors)
    for probes in PROBES:
        searcher, seconds, found = opened(store, {"probes": probes}), [], []
        for row in asked:
            begun = time.perf_counter()
            hits = searcher.channel_hits({"given": FeatureBatch.of_global(np.zeros(1, np.int64), row[None])}, DEPTH)
            seconds.append(time.perf_counter() - begun)
            found.append(len(np.intersect1d(hits["given"].image_ids[0], wanted[len(found)])) / DEPTH)
        p50, p99 = (1000 * np.quantile(seconds, share) for share in (0.5, 0.99))
        yield f"{statistics.mean(found):.3f}, {p50:.2f} / {p99:.2f}"


def opened(store: str, changes: Mapping[str, Any]) -> Searcher:
    """The published version, with other settings of its index."""
    manifest = Versions(open_store(store)).load()
    config = json.loads(json.dumps(dict(manifest.config)))
    config["channels"]["given"]["index"] |= changes
    return searcher_of(open_store(store), replace(manifest, config=config))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", nargs="*", type=int, default=[100_000, 1_000_000], help="sizes")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--lists", type=int, help="inverted lists; 4 sqrt(n) if not given, at most 4,096")
    return parser.parse_args()


def lists_for(num_vectors: int, wanted: int | None) -> int:
    return wanted or min(4096, 2 ** round(np.log2(4 * num_vectors**0.5)))


def main() -> None:
    limit_threads()
    chosen = arguments()
    columns: Sequence[str] = [f"{probes} probes: recall@10, ms p50 / p99" for probes in PROBES]
    head = ["vectors", "lists", "partitions", "wall s", "vectors/s", "CPU s", "peak MB of a worker", "bytes/vector"]
    print(f"\n| {' | '.join([*head, *columns])} |\n|{'---|' * (len(head) + len(columns))}")
    for num_vectors in chosen.vectors:
        with tempfile.TemporaryDirectory(prefix="cbir-dense-", dir=chosen.folder) as folder:
            measure(Path(folder), num_vectors, lists_for(num_vectors, chosen.lists))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


if __name__ == "__main__":
    main()
