"""Rows of features in Parquet: `python tests/benchmarks/bench_rows.py [images] [rounds]`; prints a Markdown table.

The same float16 matrix, one row per image, is written and read back as the pipeline's features (bytes, with their dtype
in the metadata) and as pyarrow's default column of lists. The two take turns; medians of wall and of processor time.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cbir.types import FeatureBatch
from pipelines.tables import write_parquet
from pipelines.work import limit_threads

DIM = 512
Halves = npt.NDArray[np.float16]
Cost = tuple[float, float]
"""Seconds by the clock, and of the processor."""


def measured(call: Callable[[], object]) -> Cost:
    """What a call costs."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def write_lists(rows: Halves, path: Path) -> None:
    offsets = pa.array(np.arange(0, rows.size + 1, DIM, dtype=np.int32))
    vectors = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
    pq.write_table(pa.table({"image_id": np.arange(len(rows)), "vector": vectors}), path)


def read_lists(path: Path) -> Halves:
    vectors = pq.read_table(path, use_threads=False).column("vector").combine_chunks()
    rows: Halves = vectors.values.to_numpy(zero_copy_only=False).reshape(-1, DIM)
    return rows


def write_features(rows: Halves, path: Path) -> None:
    batch = FeatureBatch.of_global(np.arange(len(rows)), rows)
    write_parquet(path, pa.Table.from_batches([batch.to_arrow()]), row_bytes=rows[0].nbytes)


def read_features(path: Path) -> Halves:
    descriptors: Halves = FeatureBatch.from_arrow(pq.read_table(path, use_threads=False)).descriptors
    return descriptors


def main() -> None:
    limit_threads()
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    rows = np.random.default_rng(0).normal(size=(images, DIM)).astype(np.float16)
    ways = {"pyarrow's list column": (write_lists, read_lists), "features": (write_features, read_features)}
    writes: dict[str, list[Cost]] = {name: [] for name in ways}
    reads: dict[str, list[Cost]] = {name: [] for name in ways}
    sizes = {}
    with tempfile.TemporaryDirectory(prefix="bench-rows-") as folder:
        for _ in range(rounds):
            for number, (name, (write, read)) in enumerate(ways.items()):
                path = Path(folder) / f"{number}.parquet"
                writes[name].append(measured(partial(write, rows, path)))
                reads[name].append(measured(partial(read, path)))
                assert np.array_equal(read(path), rows)
                sizes[name] = path.stat().st_size
    print(
        f"{images:,} rows of {DIM} float16, medians of {rounds} rounds; x: how often pyarrow's list column costs that\n"
    )
    print("| | write, s | x | CPU x | read, s | x | CPU x | MB |")
    print("|---|---|---|---|---|---|---|---|")
    base = next(iter(ways))
    for name in ways:
        cells = []
        for costs in (writes, reads):
            (wall, cpu), (base_wall, base_cpu) = medians(costs[name]), medians(costs[base])
            cells += [f"{wall:.2f}", f"{base_wall / wall:.1f}", f"{base_cpu / cpu:.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {sizes[name] / 1e6:.1f} |")


def medians(costs: list[Cost]) -> Cost:
    wall, cpu = (statistics.median(values) for values in zip(*costs, strict=True))
    return wall, cpu


if __name__ == "__main__":
    main()
