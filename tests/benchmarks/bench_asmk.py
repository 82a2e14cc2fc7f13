"""The inverted file beside the `asmk` package: `python tests/benchmarks/bench_asmk.py [images] [rounds]`.

Same features, same codebook of 65,536 words, one process, one thread, taking turns; medians and ratios. Needs
`pip install asmk==0.1.1` (the extra `bench`). Scores are compared on real photographs (CBIR_TEST_DATA) where there are
any. Postings for the search are synthetic: images of 500 random words each with random signs, as many per word as
65,536 equally frequent words give.
"""

import functools
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cbir.encoding.vocabulary import Vocabulary
from cbir.index.dense import code_column
from cbir.index.inverted.asmk import Asmk
from cbir.index.inverted.embedding import aggregated, binarised
from cbir.index.inverted.inverted import InvertedIndex
from cbir.types import FeatureBatch
from pipelines.work import limit_threads
from tests.benchmarks.photographs import root_sift

try:
    from asmk import asmk_method, codebook, index, inverted_file, kernel
except ImportError:
    print("the package asmk is not installed, so nothing can be compared with it: pip install asmk==0.1.1")
    sys.exit(0)

WORDS, DIM = 65_536, 128
WORDS_PER_IMAGE = 500


def interleaved(rounds: int, *runs: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each, after one run that does not count."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for times, run in zip(found, runs, strict=True):
            start = time.perf_counter()
            run()
            if number:
                times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in found]


def row(name: str, theirs: float, ours: float, goal: str, note: str = "") -> None:
    print(f"| {name} | {theirs:.3g} | {ours:.3g} | {theirs / ours:.1f} | {goal} | {note} |", flush=True)


def clustered(num: int, seed: int) -> np.ndarray:
    """Non-negative unit rows in clusters, much like RootSIFT."""
    rng = np.random.default_rng(seed)
    centres = rng.gamma(0.4, size=(4096, DIM))
    rows = centres[rng.integers(0, 4096, num)] * rng.gamma(4.0, 0.25, size=(num, DIM))
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def peer(centroids: np.ndarray, *, binary: bool, idf: bool) -> Any:
    """The package's method around a codebook that is there already."""
    factory = index.initialize_index(gpu_id=None)
    book = codebook.Codebook(factory, size=len(centroids))
    book.index(centroids)
    steps = {
        "build_ivf": {
            "kernel": {"binary": binary},
            "ivf": {"use_idf": idf},
            "quantize": {"multiple_assignment": 1},
            "aggregate": {},
        },
        "query_ivf": {
            "quantize": {"multiple_assignment": 5},
            "aggregate": {},
            "search": {"topk": None},
            "similarity": {"similarity_threshold": 0.0, "alpha": 3.0},
        },
    }
    return asmk_method.ASMKMethod(steps, {}, codebook=book)


@dataclass(frozen=True)
class SameWords:
    """Gives the package the words that the vocabulary finds.

    Its own search sums in float32 by |x|^2 - 2 x.c + |c|^2, which takes another one of two words that are equally near.
    """

    vocabulary: Vocabulary

    def search(self, rows: np.ndarray, num: int) -> tuple[None, np.ndarray]:
        return None, self.vocabulary.nearest(rows, num).astype(np.int64)


def compare_scores(batch: FeatureBatch) -> None:
    """Largest difference of scores over all pairs of images, given the same words."""
    vocabulary = Vocabulary.train(batch.descriptors, 4096, 5, 0, "exact")
    own = peer(vocabulary.centroids, binary=True, idf=False).codebook.search_index.search(batch.descriptors, 5)[1]
    same = float((own == vocabulary.nearest(batch.descriptors, 5)).mean())
    print(f"\nOf the words that the package finds for a feature, {100 * same:.4f} % are ours; both got ours.")
    images = np.repeat(np.arange(len(batch)), batch.counts)
    queries = batch.take(np.arange(0, len(batch), 5))
    print("\n| scores on photographs | pairs | largest difference |\n|---|---|---|")
    for binary in (False, True):
        for idf in (False, True):
            method = peer(vocabulary.centroids, binary=binary, idf=idf)
            method.codebook.search_index = SameWords(vocabulary)
            theirs = method.build_ivf(batch.descriptors, images.copy())
            owners = np.repeat(np.arange(len(queries)), queries.counts)
            _, asked, ranks, scores = theirs.query_ivf(queries.descriptors, owners)
            ours = InvertedIndex(Asmk(words=4096, binary=binary, idf=idf, assigner="exact"), vocabulary, {})
            hits = ours.build(ours.entries(batch)).search(ours.queries(queries), len(batch))
            worst = 0.0
            for query, order, found in zip(asked.tolist(), ranks, scores, strict=True):
                expected = dict(zip(batch.image_ids[order].tolist(), found.tolist(), strict=True))
                mine = dict(zip(hits.image_ids[query].tolist(), hits.scores[query].tolist(), strict=True))
                worst = max(worst, *(abs(score - mine.get(image, 0.0)) for image, score in expected.items()))
            name = f"ASMK{'*' if binary else ''}{', idf' if idf else ''}"
            print(f"| {name} | {len(asked) * len(batch):,} | {worst:.1e} |", flush=True)


def compare_aggregation(rounds: int) -> None:
    """Aggregation of the 1,000 features of one image; how they are quantised is measured by `bench_codebook.py`."""
    centroids = np.unique(clustered(80_000, 0), axis=0)[:WORDS]
    rows = clustered(1000, 1)
    batch = FeatureBatch.of_images(np.array([1]), [rows])
    theirs = peer(centroids, binary=True, idf=False)
    nearest = theirs.codebook.quantize(rows, multiple_assignment=1)[1]
    step, words = kernel.ASMKKernel(theirs.codebook, binary=True), nearest.astype(np.int32)

    def ours() -> None:
        binarised(aggregated(batch, words, centroids).vectors)

    row("aggregate 1,000 features, ms", *interleaved(rounds, lambda: step.aggregate_image(rows, nearest), ours), "5")


def compare_search(num_images: int, rounds: int) -> None:
    """Search among many images, and the bytes of the index."""
    rng = np.random.default_rng(0)
    words = np.concatenate([np.sort(rng.choice(WORDS, WORDS_PER_IMAGE, replace=False)) for _ in range(num_images)])
    images = np.repeat(np.arange(num_images), WORDS_PER_IMAGE)
    codes = rng.integers(0, 256, (len(words), DIM // 8), np.uint8)
    ivf = inverted_file.IVF.initialize_empty(codebook_size=WORDS, use_idf=False)
    ivf.add(np.ascontiguousarray(codes).view(np.uint32), words, images.copy())
    step = kernel.ASMKKernel(None, binary=True)
    similarity = functools.partial(step.similarity, alpha=3.0, similarity_threshold=0.0)
    ours = InvertedIndex(Asmk(), Vocabulary.of(np.zeros((WORDS, DIM), np.float32), "exact"), {})
    names = ["image_id", "word", "code"]
    entries = pa.table([pa.array(images), pa.array(words.astype(np.int32)), code_column(codes)], names=names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.arrow"
        ours.build(entries).save(path)
        partition = Asmk().load(path)
        asked = FeatureBatch(
            np.array([0]),
            np.array([0, WORDS_PER_IMAGE]),
            codes[:WORDS_PER_IMAGE],
            words=words[:WORDS_PER_IMAGE].astype(np.int32),
        )
        query = np.ascontiguousarray(codes[:WORDS_PER_IMAGE]).view(np.uint32)

        def search() -> Any:
            return ivf.search(query, words[:WORDS_PER_IMAGE], similarity_func=similarity, topk=100)

        _, scores = search()
        hits = partition.search(asked, 100)
        worst = float(np.abs(hits.scores[0] - scores).max())
        times = interleaved(rounds, search, lambda: partition.search(asked, 100))
        row(f"search {num_images:,} x {WORDS_PER_IMAGE} words, ms", *times, "8", f"difference {worst:.0e}")
        sizes = [len(pickle.dumps(ivf.state_dict())) / len(words), path.stat().st_size / len(words)]
        row("bytes per entry", *sizes, "(18.5 bytes)")


def main() -> None:
    limit_threads()
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    print("\n| step | asmk 0.1.1 | cbir | ratio | goal | |\n|---|---|---|---|---|---|")
    compare_aggregation(rounds)
    compare_search(num_images, rounds)
    batch = root_sift(("koe_places", "sfm_scenes"))
    if batch is None:
        print("\nno photographs: scores were not compared (CBIR_TEST_DATA)")
    else:
        compare_scores(batch)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


if __name__ == "__main__":
    main()
