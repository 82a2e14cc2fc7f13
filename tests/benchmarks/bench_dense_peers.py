"""The dense index beside other tools: `bench_dense_peers.py [vectors] [--lists N] [--rounds N] [--folder DIR]
[--lance PYTHON] [--autofaiss PYTHON]`; prints Markdown tables.

The clustered synthetic vectors of `bench_dense_scale.py` (D = 128, unit length), codes of 16 bytes. `cbir index` makes
its index of them from Parquet: in its own process, with one Ray worker and with two; it publishes without evaluation.
Plain faiss trains on the same sample and adds, from memory; Lance indexes a dataset that lies there; autofaiss chooses
an index for a memory budget that gives codes as large, of 200,000 vectors, and the others have as many lists there as
it then chooses. Every process has one thread. All build in turns, Lance and autofaiss once, the others in rounds, of
which medians are printed; then all are asked in turns, one query at a time. Queries are perturbed vectors; recall@10
is against exact search.

A contender is asked in a process of its own (`dense_peers.py`). Lance and autofaiss are no dependencies: without the
Python that has them (this one, if they are here) they are left out. Then a merge is done again for a tenth of the
vectors and for all of them, watched for memory, and partitions are held against one index of all vectors.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbir.storage import open_store
from cbir.types import FeatureBatch, Floats, Int64s, image_id
from pipelines.runs import RunHistory
from pipelines.training import seeded_uniform
from pipelines.work import limit_threads
from tests.benchmarks import dense_peers
from tests.benchmarks.bench_dense_scale import blocks, exact, made, opened, queries, settings, write
from tests.benchmarks.dense_peers import CODE_BYTES, DEPTH
from tests.benchmarks.processes import Cost, measured

PROBES = 16
FEW, FEW_LISTS = 200_000, 2048
"""Vectors for autofaiss, and the lists that it makes of so many."""

WHOLE, ENTRY_BYTES = 4096, CODE_BYTES + 8
"""Megabytes of a partition that holds everything; bytes of a vector in it."""

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LANCE_CPU_THREADS", "RAYON_NUM_THREADS"), "1")
"""One for the work of Lance; its other pools block each other with less than they want."""

SLOW = ("lance", "autofaiss")

STEPS = {"train": ("codebook", "train"), "add": ("build", "merge")}
"""The stages of a run that do what other tools call train and add, by the first word of their titles."""


class Arena:
    """A folder with vectors, and the figures of what contenders make of them: lists of one for each round."""

    def __init__(self, folder: Path, num_vectors: int, lists: int, pythons: Mapping[str, str]) -> None:
        self.folder, self.num_vectors, self.lists, self.pythons = folder, num_vectors, lists, pythons
        self.figures: dict[str, dict[str, list[float]]] = {}
        folder.mkdir()
        write(folder / "vectors", num_vectors)
        np.save(folder / "vectors.npy", np.concatenate([made(numbers, 1) for numbers in blocks(num_vectors)]))
        self._ids = np.array([image_id(f"v{number}") for number in range(num_vectors)], np.int64)
        np.save(folder / "sample.npy", np.flatnonzero(seeded_uniform(self._ids, 0) < 50 * lists / num_vectors))
        self.queries = queries(num_vectors)
        np.save(folder / "queries.npy", self.queries)
        order = np.argsort(self._ids)
        self._nearest = order[np.searchsorted(self._ids[order], exact(self.queries, num_vectors))]

    def build(self, contender: str) -> None:
        """One round of `faiss`, `lance`, `autofaiss`, or `cbir, N workers`."""
        name, _, workers = contender.partition(", ")
        self._add(contender, self._indexed(int(workers.split()[0])) if name == "cbir" else self._run("build", name))

    def ask(self, contender: str) -> None:
        """All queries, one after the other, at what this contender built last."""
        figures = self._run("ask", contender.partition(", ")[0])
        hits = zip(figures.pop("found"), self._nearest.tolist(), strict=True)
        recall = statistics.mean(len(set(found) & set(nearest)) / DEPTH for found, nearest in hits)
        self._add(contender, {**figures, "recall": recall})

    def median(self, contender: str, name: str) -> float:
        """Of all rounds; NaN if there is no such figure."""
        return statistics.median(self.figures[contender].get(name, [math.nan]))

    def _add(self, contender: str, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.figures.setdefault(contender, {}).setdefault(name, []).append(value)

    def _run(self, what: str, name: str) -> dict[str, Any]:
        number = self.lists if what == "build" else PROBES
        command = [self.pythons[name], dense_peers.__file__, what, name, str(self.folder), str(number)]
        done = subprocess.run(command, env=os.environ | THREADS, stdout=subprocess.PIPE, check=True, text=True)
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures

    def _indexed(self, workers: int) -> dict[str, float]:
        """`cbir index` into an empty store: processor seconds by stage and of the whole command."""
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        cost = index(self.folder, self.num_vectors, self.lists, workers, WHOLE)
        seconds = stage_seconds(self.folder / "store")
        steps = {step: sum(seconds[stage] for stage in stages) for step, stages in STEPS.items()}
        by_stage = {f"stage {name}": value for name, value in seconds.items()}
        return {**by_stage, **steps, "both": sum(steps.values()), "command": cost.cpu_s, "wall": cost.wall_s}


def index(folder: Path, num_vectors: int, lists: int, workers: int, partition_megabytes: int) -> Cost:
    """`cbir index`; what its store has already is used."""
    data = settings(folder, num_vectors, lists)
    data["channels"]["given"]["index"] = {"name": "ivfpq", "lists": lists, "bytes": CODE_BYTES, "probes": PROBES}
    path = folder / "config.yaml"
    path.write_text(json.dumps(data | {"workers": workers, "partition_megabytes": partition_megabytes}))  # JSON is YAML
    return measured([sys.executable, "-c", "from pipelines.cli import main; main()", "index", str(path)])


def stage_seconds(store: Path) -> dict[str, float]:
    """Processor seconds of the last run's tasks by stage, rounds of a stage together."""
    *_, record = RunHistory(open_store(str(store))).records()
    seconds: dict[str, float] = {}
    for stage in record["stages"]:
        name = stage["stage"].split(",")[0]
        seconds[name] = seconds.get(name, 0.0) + stage["processor_s"]
    return seconds


def rounds_of(arena: Arena, contenders: Sequence[str], num_rounds: int) -> None:
    """All build in turns, the slow ones once; then all are asked in turns."""
    for number in range(num_rounds):
        for contender in contenders:
            if number == 0 or contender not in SLOW:
                arena.build(contender)
    for _ in range(num_rounds):
        for contender in contenders:
            arena.ask(contender)


def print_contenders(arena: Arena, contenders: Sequence[str]) -> None:
    """What a build costs, and what its searches find."""
    columns = ["train, CPU s", "add, CPU s", "both", "of faiss", "whole command, CPU s", "wall s"]
    columns += [f"recall@{DEPTH} at {PROBES} probes", "ms per query, p50", "queries per CPU s"]
    print(f"\n{arena.num_vectors:,} vectors, {CODE_BYTES}-byte codes, {arena.lists:,} lists\n")
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in contenders:
        train, add, both, command, wall, recall, ms, rate = (
            arena.median(name, figure) for figure in ("train", "add", "both", "command", "wall", "recall", "ms", "rate")
        )
        cells = f"{train:.1f} | {add:.1f} | {both:.1f} | {both / arena.median('faiss', 'both'):.2f} | {command:.1f}"
        print(f"| {name} | {cells} | {wall:.1f} | {recall:.3f} | {ms:.2f} | {rate:,.0f} |".replace("nan", "-"))


def print_stages(arena: Arena, contenders: Sequence[str]) -> None:
    """Where the processor time of `cbir index` goes."""
    names = [name for name in arena.figures[contenders[0]] if name.startswith("stage ")]
    columns = [name.removeprefix("stage ") for name in names if arena.median(contenders[0], name) > 0]
    print(f"\nCPU s by stage\n\n| | {' | '.join(columns)} | merge / build |\n|{'---|' * (len(columns) + 2)}")
    for name in contenders:
        seconds = {column: arena.median(name, f"stage {column}") for column in columns}
        cells = " | ".join(f"{value:.2f}" for value in seconds.values())
        print(f"| {name} | {cells} | {seconds['merge'] / seconds['build']:.1%} |")


def print_partitions(arena: Arena) -> None:
    """Many partitions beside one, at every power of two of probes; and the memory of who merges them."""
    megabytes = max(1, math.ceil(ENTRY_BYTES * arena.num_vectors / 10 / 1e6))
    probes = [2**power for power in range(arena.lists.bit_length())]
    whole = {number: answers(arena, number) for number in probes}
    costs = {arena.num_vectors: merged_again(arena.folder, arena.num_vectors, arena.lists, megabytes)}
    num_partitions = len(opened(str(arena.folder / "store"), {}).partitions)
    for number in probes:
        for one, other in zip(whole[number], answers(arena, number), strict=True):
            np.testing.assert_array_equal(one, other)
    tenth, num = arena.folder / "tenth", arena.num_vectors // 10
    tenth.mkdir()
    write(tenth / "vectors", num)
    costs[num] = merged_again(tenth, num, arena.lists // 4, megabytes)
    print(f"\n{num_partitions} partitions: ids and scores equal those of one, at {probes[0]} to {probes[-1]:,} probes.")
    print(f"Own memory of the worker that merges, at its peak, partitions of at most {megabytes} MB:")
    for vectors, cost in costs.items():
        print(f"- {vectors:,} vectors: {max(cost.worker_bytes) / 1e6:,.0f} MB")


def merged_again(folder: Path, num_vectors: int, lists: int, partition_megabytes: int) -> Cost:
    """What it costs to merge all partitions of this size, when everything else is there."""
    index(folder, num_vectors, lists, 1, partition_megabytes)
    shutil.rmtree(folder / "store" / "stages" / "merge")
    return index(folder, num_vectors, lists, 1, partition_megabytes)


def answers(arena: Arena, probes: int) -> tuple[Int64s, Floats]:
    """Ids and scores of all queries, with so many probes."""
    searcher = opened(str(arena.folder / "store"), {"probes": probes})
    asked = FeatureBatch.of_global(np.arange(len(arena.queries)), arena.queries)
    hits = searcher.channel_hits({"given": asked}, DEPTH)["given"]
    return hits.image_ids, hits.scores


def pythons(chosen: argparse.Namespace) -> dict[str, str]:
    """Who runs each contender; the missing are named."""
    wanted = {"lance": chosen.lance, "autofaiss": chosen.autofaiss}
    found = {"faiss": sys.executable, "cbir": sys.executable}
    for name, python in wanted.items():
        if subprocess.run([python, "-c", f"import {name}"], stderr=subprocess.DEVNULL, check=False).returncode:
            print(f"{name} is left out: {python} does not have it.")
        else:
            found[name] = python
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--lists", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--lance", default=sys.executable, metavar="PYTHON", help="that has pylance")
    parser.add_argument("--autofaiss", default=sys.executable, metavar="PYTHON", help="that has autofaiss")
    return parser.parse_args()


def main() -> None:
    limit_threads()
    chosen = arguments()
    who = pythons(chosen)
    ours = ["cbir, 0 workers", "cbir, 1 worker", "cbir, 2 workers"]
    with tempfile.TemporaryDirectory(prefix="cbir-peers-", dir=chosen.folder) as folder:
        arena = Arena(Path(folder, "many"), chosen.vectors, chosen.lists, who)
        contenders = ["faiss", *(name for name in who if name == "lance"), *ours]
        rounds_of(arena, contenders, chosen.rounds)
        print_contenders(arena, contenders)
        print_stages(arena, ours)
        print_partitions(arena)
        if "autofaiss" in who:
            arena = Arena(Path(folder, "few"), min(FEW, chosen.vectors), FEW_LISTS, who)
            contenders = ["faiss", "autofaiss", *ours]
            rounds_of(arena, contenders, 1)
            print_contenders(arena, contenders)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


if __name__ == "__main__":
    main()
