"""An inverted file of a million images: `python tests/benchmarks/bench_inverted_scale.py [images ...] [--folder DIR]`.

The postings of real photographs (CBIR_TEST_DATA, else random ones of the same shape) are repeated under new ids until
there are so many images, each copy perturbed: every fifth posting is left out, every tenth goes to another word, and
one bit in eight of every code is flipped. They are written as `build` leaves them, and the pipeline's own tasks add up
the totals and merge the partitions. Searched are unperturbed images, with one thread over all partitions one after the
other; a pool answers with one actor per partition. Prints build rate, bytes per image, search times and memory by
size, and what their slopes say of 100 million images.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save as save_safetensors

from cbir.artifacts import Done, create_done, put_part
from cbir.config import Channel
from cbir.encoding.vocabulary import Vocabulary
from cbir.index.dense import code_column
from cbir.index.inverted.asmk import Asmk
from cbir.index.inverted.inverted import InvertedIndex
from cbir.layout import partition_bounds
from cbir.spec import fingerprint
from cbir.types import FeatureBatch, Hits, image_id
from pipelines.stages import MergeTask, TotalsTask
from pipelines.tables import sorted_table, write_parquet
from pipelines.work import ChannelWork, Worker, limit_threads
from tests.benchmarks.photographs import root_sift

WORDS, BITS, FEATURES = 65_536, 128, 500
SHARD_IMAGES, PARTITION_IMAGES = 10_000, 62_500
NUM_QUERIES = 60
SETS = ("smvs_dvd", "paintings", "koe_places", "sfm_scenes")


@dataclass(frozen=True)
class Postings:
    """Postings of real images: image i owns rows offsets[i] to offsets[i + 1]; queries are the images themselves."""

    offsets: np.ndarray
    words: np.ndarray
    codes: np.ndarray
    queries: FeatureBatch


def real_postings(spec: Asmk) -> tuple[Postings, InvertedIndex]:
    """Those of photographs, with a codebook trained on them."""
    batch = root_sift(SETS)
    if batch is None:
        sys.exit("no photographs: set CBIR_TEST_DATA")
    rows = batch.descriptors[np.random.default_rng(0).permutation(len(batch.descriptors))]
    vocabulary = Vocabulary.train(rows, spec.words, 3, 0, spec.assigner)
    index = InvertedIndex(spec, vocabulary, {})
    entries = index.entries(batch)
    owners = np.searchsorted(np.sort(batch.image_ids), entries.column("image_id").to_numpy())
    order = np.argsort(owners, kind="stable")
    offsets = np.searchsorted(owners[order], np.arange(len(batch) + 1))
    codes = np.frombuffer(entries.column("code").combine_chunks().buffers()[1], np.uint8).reshape(-1, BITS // 8)
    words = entries.column("word").to_numpy()
    chosen = np.linspace(0, len(batch) - 1, NUM_QUERIES).astype(np.int64)
    return Postings(offsets, words[order], codes[order], index.queries(batch.take(chosen))), index


def perturbed(source: Postings, numbers: np.ndarray, seed: int) -> pa.Table:
    """Entries of images with these numbers, each a perturbed copy of a real one."""
    rng = np.random.default_rng(seed)
    which = numbers % (len(source.offsets) - 1)
    counts = np.diff(source.offsets)[which]
    ends = np.cumsum(counts)
    rows = np.repeat(source.offsets[which] - (ends - counts), counts) + np.arange(ends[-1])
    ids = np.repeat(np.array([image_id(f"{number}.jpg") for number in numbers.tolist()], np.int64), counts)
    kept = rng.random(len(rows)) >= 0.2
    ids, words, codes = ids[kept], source.words[rows[kept]].copy(), source.codes[rows[kept]]
    moved = rng.random(len(words)) < 0.1
    words[moved] = rng.choice(source.words, int(moved.sum()))
    noise = rng.integers(0, 256, (3, *codes.shape), np.uint8)
    columns = [pa.array(ids), pa.array(words), code_column(codes ^ (noise[0] & noise[1] & noise[2]))]
    return _one_per_word(sorted_table(pa.table(columns, names=["image_id", "word", "code"])))


def _one_per_word(table: pa.Table) -> pa.Table:
    """An image has one aggregated posting of a word."""
    ids, words = table.column("image_id").to_numpy(), table.column("word").to_numpy()
    order = np.lexsort((words, ids))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(ids[order]) != 0) | (np.diff(words[order]) != 0)
    return table.take(np.sort(order[first]))


def write_shard(worker: Worker, index: InvertedIndex, source: Postings, numbers: np.ndarray) -> tuple[Done, int]:
    """The record that `build` would leave, and the number of its postings."""
    table = perturbed(source, numbers, int(numbers[0]))
    path, identity = worker.scratch("entries.parquet"), fingerprint("shard", int(numbers[0]), len(numbers))
    write_parquet(path, table, row_bytes=28)
    statistics = save_safetensors(dict(index.statistics(table)))
    files = (
        put_part(worker.store, "build", identity, "entries", path, "parquet"),
        put_part(worker.store, "build", identity, "statistics", statistics, "safetensors"),
    )
    return create_done(worker.store, Done("build", identity, files, {"images": len(numbers)})), table.num_rows


def rehearse(folder: Path, num_images: int, source: Postings, index: InvertedIndex) -> None:
    """Build and search an index of so many images; prints its row."""
    worker = Worker(str(folder / f"store{num_images}"))
    extractor = {"name": "sift", "max_features": FEATURES}
    settings = {"extractor": extractor, "encoders": [{"name": "rootsift"}], "index": index.spec.model_dump()}
    work = ChannelWork("local", Channel.model_validate(settings))
    trained = save_safetensors({name: np.ascontiguousarray(array) for name, array in index.state().items()})
    file = put_part(worker.store, "train", "rehearsal", "index", trained, "safetensors")
    probes = worker.scratch("probes.parquet")
    write_parquet(probes, pa.Table.from_batches([source.queries.take(np.empty(0, np.int64)).to_arrow()]))
    parts = (file, put_part(worker.store, "train", "rehearsal", "probes", probes, "parquet"))
    encoder = put_part(worker.store, "train", "rehearsal", "encoder-0", save_safetensors({}), "safetensors")
    train = create_done(worker.store, Done("train", "rehearsal", (*parts, encoder), {}, {"dim": BITS}))
    steps = np.array_split(np.arange(num_images), max(1, num_images // SHARD_IMAGES))
    shards = [write_shard(worker, index, source, numbers) for numbers in steps]
    builds, num_postings = [done for done, _ in shards], sum(num for _, num in shards)
    start = time.perf_counter()
    totals = worker.do(TotalsTask.of(work, builds)).done
    bounds = partition_bounds(max(1, num_images // PARTITION_IMAGES))
    tasks = [MergeTask.of(bound, 0, work, train, builds, totals, f"{num_images} images") for bound in bounds]
    merges = [worker.do(task).done for task in tasks]
    merge_s = time.perf_counter() - start
    files = [done.file("index") for done in merges]
    partitions = [index.spec.load(worker.fetch(part.key, part.sha256)) for part in files]
    times, own = _search(partitions, source.queries)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = sum(part.num_bytes for part in files)
    median, slow, one = np.percentile(times, 50), np.percentile(times, 99), np.median(own)
    sizes = f"{num_images:,} | {num_postings:,} | {len(bounds)} | {num_images / merge_s:,.0f}"
    bytes_ = f"{total / num_images:,.0f} | {total / num_postings:.2f}"
    print(f"| {sizes} | {bytes_} | {median:.1f} | {slow:.1f} | {one:.1f} | {peak / 1e9:.2f} |", flush=True)
    worker.close()


def _search(partitions: Sequence[object], queries: FeatureBatch) -> tuple[list[float], list[float]]:
    """Milliseconds of each query over all partitions, and over the first; once before, to map the pages."""
    times, own = [], []
    for turn in range(2):
        for number in range(len(queries)):
            query, hits, start = queries.take(np.array([number])), [], time.perf_counter()
            for place, partition in enumerate(partitions):
                hits.append(partition.search(query, 100))  # type: ignore[attr-defined]
                if turn and not place:
                    own.append(1e3 * (time.perf_counter() - start))
            Hits.merge(hits, 100)
            if turn:
                times.append(1e3 * (time.perf_counter() - start))
    return times, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the indexes go; a temporary folder without it")
    options = parser.parse_args()
    limit_threads()
    source, index = real_postings(Asmk(features=FEATURES))
    per_image = np.diff(source.offsets).mean()
    print(f"\n{len(source.offsets) - 1:,} real images, {per_image:.0f} postings each; every query has", end=" ")
    print(f"{source.queries.counts.mean():,.0f} words. {SHARD_IMAGES:,} images a shard.\n")
    print("| images | postings | partitions | merged images/s | bytes/image | bytes/posting | p50 ms | p99 ms ", end="")
    print("| p50 of one partition, ms | peak GB |\n|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="cbir-bench-", dir=options.folder) as folder:
        for num_images in options.images:
            rehearse(Path(folder), num_images, source, index)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


if __name__ == "__main__":
    main()
