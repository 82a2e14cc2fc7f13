"""How fast large codebooks are trained and searched beside faiss and asmk; prints Markdown tables.

Run: python -m tests.benchmarks.bench_codebook [--tables words lists many look-ups] [--images 1200] [--words 65536]

`words` and `look-ups` are on RootSIFT of real photographs, found through CBIR_TEST_DATA; rows to look up are those of
images that no codebook was trained on. `lists` and `many` are the lists of inverted files, on the clustered synthetic
vectors of bench_dense_scale.py: 8,192 on 200,000 vectors, and 65,536 on 1,000,000, where faiss takes one iteration and
ten are ten times that. One thread; times are processor times, and all candidates of a table take turns. asmk is left
out where it is not installed.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import cv2
import faiss
import numpy as np

from cbir.encoding.assigners import ExactAssigner
from cbir.encoding.rootsift import RootSift
from cbir.encoding.vocabulary import Vocabulary
from cbir.features.sift import Sift
from cbir.images import Limits, decode
from cbir.index.ivfflat import IvfFlat
from cbir.types import FeatureBatch, Floats, ImageBatch
from tests.benchmarks.bench_dense_scale import blocks, made, noisy, unit

try:
    import asmk
except ImportError:  # it is built from source, which needs a C compiler
    asmk = None

DATA = Path(os.environ.get("CBIR_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HELD_OUT_IMAGES, LOOK_UPS, TEST_ROWS, ROUNDS = 60, 1000, 10000, 5
TRAINED_WORDS, TRAINING_ROWS = 8192, 200_000
QUERIES, PROBES = 500, (1, 4, 16)
TABLES = "words", "lists", "many", "look-ups"
SETTINGS = Sift(size=640)

Lookup = Callable[[np.ndarray], np.ndarray]


def descriptors(num_images: int) -> list[np.ndarray]:
    """SIFT of each of that many photographs, drawn by a seed."""
    files = sorted(path for path in (DATA / "photos").glob("*/images/**/*") if path.is_file())
    order = np.random.default_rng(0).permutation(len(files))[:num_images]
    extractor, found = SETTINGS.build("cpu", {}), []
    for at in order:
        decoded = decode(files[at].read_bytes(), SETTINGS.view, Limits())
        if hasattr(decoded, "pixels"):
            batch = ImageBatch(np.zeros(1, np.int64), [decoded.pixels], np.array([decoded.size], np.int32))
            found.append(extractor.extract(batch).descriptors)
    return found


def rootsift(rows: np.ndarray) -> np.ndarray:
    blocks = np.array_split(rows, len(rows) // 10000 + 1)
    return np.concatenate([RootSift().transform(block).astype(np.float32) for block in blocks])


def measured(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def of_faiss(rows: np.ndarray, iterations: int, words: int = TRAINED_WORDS) -> np.ndarray:
    most = {"min_points_per_centroid": 1, "max_points_per_centroid": 256}
    kmeans = faiss.Kmeans(rows.shape[1], words, niter=iterations, seed=1, **most)
    kmeans.train(rows)
    return np.asarray(kmeans.centroids)


def training_table(rows: np.ndarray, test: np.ndarray) -> None:
    runs: dict[str, Callable[[], np.ndarray]] = {"faiss.Kmeans, 10 iterations": lambda: of_faiss(rows, 10)}
    for iterations in (0, 1, 2, 5):
        runs[f"Vocabulary, {iterations} iterations"] = lambda iterations=iterations: (
            Vocabulary.train(rows, TRAINED_WORDS, iterations, 1, "ivf").centroids
        )
    print(f"\nTraining {TRAINED_WORDS:,} words on {len(rows):,} rows\n")
    print("| | processor s | times less | mean squared error of other images | beside faiss |")
    print("|---|---|---|---|---|")
    base_seconds = base_error = 0.0
    for name, run in runs.items():
        seconds, centroids = measured(run)
        error = float(ExactAssigner(centroids).nearest(test, 1)[1].mean())
        base_seconds, base_error = base_seconds or seconds, base_error or error
        print(
            f"| {name} | {seconds:.2f} | {base_seconds / seconds:.1f} | {error:.5f} | {error / base_error - 1:+.2%} |"
        )


def synthetic(num_vectors: int) -> tuple[Floats, Floats, Floats]:
    """Vectors to train on, others to measure the error on, and queries near to some of the first."""
    rows = np.concatenate([made(numbers, 1) for numbers in blocks(num_vectors + TEST_ROWS)])
    rows, test = np.split(rows, [num_vectors])
    return rows, test, unit(noisy(rows[:QUERIES], np.random.default_rng(2)))


def trained_lists(rows: Floats, lists: int) -> np.ndarray:
    """As the inverted files do it."""
    spec, batch = IvfFlat(lists=lists, metric="l2"), FeatureBatch.of_global(np.arange(len(rows)), rows)
    codebook = spec.train_codebook(batch, 1)
    for number in range(1, spec.codebook_rounds + 1):
        sums = spec.codebook_sums(codebook, batch)
        codebook = spec.next_codebook(codebook, sums, last=number == spec.codebook_rounds)
    return codebook["centroids"]


def recalls(centroids: np.ndarray, rows: Floats, queries: Floats) -> list[float]:
    """The share of the ten nearest vectors that lie in the nearest lists, for each number of probes."""
    nearest = faiss.knn(queries, rows, 10)[1]
    lists = faiss.knn(rows[nearest.ravel()], centroids, 1)[1].reshape(*nearest.shape, 1)
    probed = faiss.knn(queries, centroids, max(PROBES))[1][:, None]
    return [float((lists == probed[..., :probes]).any(2).mean()) for probes in PROBES]


def lists_table(num_vectors: int, lists: int, iterations: int) -> None:
    """Beside faiss with so many iterations, whose time is scaled to ten."""
    rows, test, queries = synthetic(num_vectors)
    theirs, plain = measured(lambda: of_faiss(rows, iterations, lists))
    ours, found = measured(lambda: trained_lists(rows, lists))
    runs = {
        f"faiss.Kmeans, {iterations} iterations": (theirs, plain),
        "inverted files of cbir": (ours, found),
    }
    base_error = float(faiss.knn(test, plain, 1)[0].mean())
    probes = ", ".join(map(str, PROBES))
    print(f"\nTraining {lists:,} lists on {num_vectors:,} synthetic vectors\n")
    print(f"| | processor s | mean squared error of other vectors | beside faiss | recall@10 at {probes} probes |")
    print("|---|---|---|---|---|")
    for name, (seconds, centroids) in runs.items():
        error = float(faiss.knn(test, centroids, 1)[0].mean())
        found_of = ", ".join(f"{value:.3f}" for value in recalls(centroids, rows, queries))
        print(f"| {name} | {seconds:.1f} | {error:.4f} | {error / base_error - 1:+.2%} | {found_of} |")
    print(f"\nTen iterations of faiss take {theirs * 10 / iterations / ours:.1f} times as long.", flush=True)


def lookups(centroids: np.ndarray) -> dict[str, Lookup]:
    flat = faiss.IndexFlatL2(centroids.shape[1])
    flat.add(centroids)
    found: dict[str, Lookup] = {"faiss.IndexFlatL2": lambda rows: flat.search(rows, 1)[1]}
    if asmk is not None:
        codebook = asmk.codebook.Codebook(asmk.index.FaissL2Index(), size=len(centroids))
        codebook.index(centroids)
        found["asmk Codebook.quantize"] = lambda rows: codebook.quantize(rows, multiple_assignment=1)[1]
    for name in ("exact", "hnsw", "ivf"):
        seconds, vocabulary = measured(lambda name=name: Vocabulary.of(centroids, name))
        found[f"Vocabulary, {name} (built in {seconds:.1f} s)"] = vocabulary.nearest
    return found


def lookup_table(centroids: np.ndarray, test: np.ndarray) -> None:
    few = np.ascontiguousarray(test[:LOOK_UPS])
    candidates = lookups(centroids)
    exact = ExactAssigner(centroids).nearest(test, 1)[0]
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, lookup in candidates.items():
            taken[name].append(measured(lambda lookup=lookup: lookup(few))[0])
    base = np.median(taken["faiss.IndexFlatL2"])
    print(f"\nThe nearest of {len(centroids):,} words for {LOOK_UPS:,} rows\n")
    print(f"| | median processor ms | times as fast | agreement with exact on {len(test):,} rows |")
    print("|---|---|---|---|")
    for name, lookup in candidates.items():
        median = np.median(taken[name])
        print(f"| {name} | {median * 1e3:.1f} | {base / median:.1f} | {np.mean(lookup(test) == exact):.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="what to measure")
    parser.add_argument("--images", type=int, default=1200, help="photographs to take descriptors from")
    parser.add_argument("--words", type=int, default=65536, help="size of the codebook that is searched")
    chosen = parser.parse_args()
    cv2.setNumThreads(1)
    faiss.omp_set_num_threads(1)
    trained_lists(made(np.arange(10_000), 1), TRAINED_WORDS)  # compiles the loops
    if "lists" in chosen.tables:
        lists_table(TRAINING_ROWS, TRAINED_WORDS, 10)
    if "many" in chosen.tables:
        lists_table(1_000_000, 65536, 1)
    if "words" in chosen.tables or "look-ups" in chosen.tables:
        tables_of_words(chosen.images, chosen.words, chosen.tables)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


def tables_of_words(num_images: int, num_words: int, tables: Sequence[str]) -> None:
    """Those on features of photographs."""
    images = descriptors(num_images)
    rng = np.random.default_rng(1)
    held_out = rootsift(np.concatenate(images[:HELD_OUT_IMAGES]))
    test = held_out[np.sort(rng.choice(len(held_out), min(TEST_ROWS, len(held_out)), replace=False))]
    rows = np.concatenate(images[HELD_OUT_IMAGES:])
    if "words" in tables:
        some = rootsift(rows[np.sort(rng.choice(len(rows), min(TRAINING_ROWS, len(rows)), replace=False))])
        training_table(some, test)
    if "look-ups" in tables:
        seconds, vocabulary = measured(lambda: Vocabulary.train(rootsift(rows), num_words, 2, 1, "ivf"))
        print(f"\n{num_words:,} words on {len(rows):,} rows, 2 iterations: {seconds:.0f} processor s")
        lookup_table(vocabulary.centroids, rng.permutation(test))


if __name__ == "__main__":
    main()
