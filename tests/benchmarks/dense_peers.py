"""The tools that `bench_dense_peers.py` holds beside each other, one thread each, in processes of their own.

`dense_peers.py STEP CONTENDER FOLDER LISTS|PROBES` builds the index of a contender, or asks it one query after the
other, and prints figures as one line of JSON. It needs numpy and the contender, so that another Python may run it.
FOLDER has `vectors.npy` (n, D), the numbers of those to train on in `sample.npy`, and `queries.npy` (Q, D).
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CODE_BYTES, DEPTH, REPEATS = 16, 10, 3

Seconds = dict[str, float]
"""Processor seconds by step, and `wall` by the clock."""

Ask = Callable[[Any], Sequence[int]]
"""From a query (D,) to the numbers of the vectors found."""


@contextlib.contextmanager
def step(name: str, seconds: Seconds) -> Iterator[None]:
    """Count the block for a step."""
    begun, processor = time.perf_counter(), time.process_time()
    yield
    seconds[name] = time.process_time() - processor
    seconds["wall"] = seconds.get("wall", 0.0) + time.perf_counter() - begun


def build_faiss(folder: Path, lists: int) -> Seconds:
    """`index_factory` as its users call it, without the polysemous step; written as one file."""
    import faiss

    rows, seconds = np.load(folder / "vectors.npy"), Seconds()
    sample = rows[np.load(folder / "sample.npy")]
    index = faiss.index_factory(rows.shape[1], f"IVF{lists},PQ{CODE_BYTES}np", faiss.METRIC_INNER_PRODUCT)
    with step("train", seconds):
        index.train(sample)
    with step("add", seconds):
        index.add(rows)
        faiss.write_index(index, str(folder / "plain.faiss"))
    return {**seconds, "both": seconds["train"] + seconds["add"]}


def ask_faiss(folder: Path, probes: int) -> Ask:
    """In memory, as it was built."""
    return _ask_index(folder / "plain.faiss", probes)


def build_lance(folder: Path, lists: int) -> Seconds:
    """`create_index` of a dataset that lies there; Euclidean distance, which orders unit vectors as products do."""
    import lance
    import pyarrow as pa

    rows, seconds = np.load(folder / "vectors.npy"), Seconds()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    data = lance.write_dataset(
        pa.table({"number": np.arange(len(rows)), "vector": vectors}), str(folder / "lance"), mode="overwrite"
    )
    with step("both", seconds):
        data.create_index("vector", "IVF_PQ", metric="l2", num_partitions=lists, num_sub_vectors=CODE_BYTES)
    return seconds


def ask_lance(folder: Path, probes: int) -> Ask:
    """The numbers alone are read of what is found."""
    import lance

    data = lance.dataset(str(folder / "lance"))

    def ask(query: Any) -> Sequence[int]:
        wanted = {"column": "vector", "q": query, "k": DEPTH, "nprobes": probes}
        table = data.to_table(columns=["number", "_distance"], nearest=wanted)
        numbers: list[int] = table.column("number").to_pylist()
        return numbers

    return ask


def build_autofaiss(folder: Path, lists: int) -> Seconds:
    """`build_index` with a memory budget of 25 bytes for each vector, for which it chooses codes of 16."""
    import autofaiss

    num, seconds = len(np.load(folder / "vectors.npy", mmap_mode="r")), Seconds()
    (folder / "autofaiss").mkdir(exist_ok=True)
    if not (folder / "autofaiss" / "vectors.npy").exists():
        (folder / "autofaiss" / "vectors.npy").symlink_to(folder / "vectors.npy")
    with step("both", seconds):
        autofaiss.build_index(
            str(folder / "autofaiss"),
            index_path=str(folder / "autofaiss.faiss"),
            index_infos_path=str(folder / "autofaiss.json"),
            max_index_memory_usage=f"{25 * num // 1000}KB",
            current_memory_available="8G",
            nb_cores=1,
            verbose=30,
        )
    return seconds


def ask_autofaiss(folder: Path, probes: int) -> Ask:
    """With so many probes, not those that it chose."""
    return _ask_index(folder / "autofaiss.faiss", probes)


def _ask_index(path: Path, probes: int) -> Ask:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(path))
    faiss.extract_index_ivf(index).nprobe = probes
    return lambda query: index.search(query[None], DEPTH)[1][0].tolist()


def ask_cbir(folder: Path, probes: int) -> Ask:
    """The published version, searched in this process."""
    import cbir

    searcher = cbir.open(str(folder / "store"))
    return lambda query: [int(result.key[1:]) for result in searcher.search(query, DEPTH)]


def asked(ask: Ask, queries: Any) -> dict[str, Any]:
    """What is found for queries (Q, D); the median milliseconds of one, and queries per processor second."""
    found = [list(ask(query)) for query in queries]
    times, processor = [], time.process_time()
    for query in np.tile(queries, (REPEATS, 1)):
        begun = time.perf_counter()
        ask(query)
        times.append(time.perf_counter() - begun)
    rate = len(times) / (time.process_time() - processor)
    return {"found": found, "ms": 1e3 * statistics.median(times), "rate": rate}


BUILD = {"faiss": build_faiss, "lance": build_lance, "autofaiss": build_autofaiss}
ASK = {"faiss": ask_faiss, "lance": ask_lance, "autofaiss": ask_autofaiss, "cbir": ask_cbir}


def main(what: str, contender: str, folder: str, number: str) -> None:
    """One step of one contender."""
    where = Path(folder)
    if what == "build":
        figures: dict[str, Any] = dict(BUILD[contender](where, int(number)))
    else:
        figures = asked(ASK[contender](where, int(number)), np.load(where / "queries.npy"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
