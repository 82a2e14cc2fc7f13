"""How fast and how good geometric verification is; prints Markdown tables. One thread.

Run: python tests/benchmarks/bench_verification.py [--fit] [--photographs]

Fit: planted scenes of 300 matches, a share of them true with 0.5 px of noise; sizes are wrong by 20 % and angles by 8
degrees (one standard deviation); threshold 8 px. Every scene is solved by all estimators in turn, and counts as solved
if no true match is more than 2 px off where the true transform puts it.

Photographs (found through CBIR_TEST_DATA): queries of two sets against their databases and distractors, SIFT with 1,000
keypoints, a vocabulary trained on the database, 100 best by tf-idf. Every query is re-ranked by all methods in turn,
from features or signatures in memory, matching included.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import cv2
import numpy as np

from cbir.encoding.codebook import Codebook
from cbir.evaluation.ground_truth import read_ground_truth
from cbir.evaluation.metrics import evaluate
from cbir.features.sift import Sift
from cbir.images import BadImage, Limits, decode
from cbir.rerank.fits import mapped
from cbir.rerank.fsm import Fsm, FsmFit
from cbir.rerank.hough_pyramid import Hpm
from cbir.rerank.matches import Matches, MatchingSpec
from cbir.rerank.ransac import Ransac, RansacFit
from cbir.rerank.wgc import Wgc
from cbir.types import FeatureBatch, Hits, ImageBatch, Int64s

DATA = Path(os.environ.get("CBIR_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SETS = ("smvs_dvd", "paintings")
NUM_SCENES, NUM_MATCHES = 60, 300
THRESHOLD_PX, MAX_ITERATIONS, CONFIDENCE = 8.0, 5000, 0.999
WORDS, QUERY_WORDS, TOP = 4096, 3, 100
EVERY_QUERY, NUM_DISTRACTORS = 4, 400

Estimate = Callable[[FeatureBatch, FeatureBatch], np.ndarray | None]


def transform(rng: np.random.Generator) -> np.ndarray:
    """Turned, zoomed, sheared and shifted."""
    angle, scale = rng.uniform(-0.5, 0.5), rng.uniform(0.6, 1.5)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.eye(3)
    matrix[:2, :2] = scale * rotation @ np.array([[1, rng.uniform(-0.2, 0.2)], [0, rng.uniform(0.8, 1.2)]])
    matrix[:2, 2] = rng.uniform(-50, 50, 2)
    return matrix


def scene(seed: int, share: float) -> tuple[FeatureBatch, FeatureBatch, np.ndarray, int]:
    """Matched features of two images, row by row, the true ones first; the true transform and their number."""
    rng, num, num_true = np.random.default_rng(seed), NUM_MATCHES, int(share * NUM_MATCHES)
    matrix = transform(rng)
    here = np.column_stack([rng.uniform(0, 1, (num, 2)) * [640, 480], sizes(rng), rng.uniform(0, 360, num)])
    turn = np.stack([np.cos(np.radians(here[:, 3])), np.sin(np.radians(here[:, 3]))], axis=1) @ matrix[:2, :2].T
    there = here.copy()
    there[:, :2] = mapped(matrix, here[:, :2]) + rng.normal(0, 0.5, (num, 2))
    there[:, 2] *= np.sqrt(np.linalg.det(matrix[:2, :2])) * np.exp(rng.normal(0, 0.2, num))
    there[:, 3] = np.degrees(np.arctan2(turn[:, 1], turn[:, 0])) + rng.normal(0, 8, num)
    chance = np.column_stack([rng.uniform(0, 1, (num, 2)) * [640, 480], sizes(rng), rng.uniform(0, 360, num)])
    there[num_true:] = chance[num_true:]
    return one_image(here), one_image(there), matrix, num_true


def sizes(rng: np.random.Generator) -> np.ndarray:
    """As those of SIFT are distributed, about."""
    return np.exp(rng.normal(1.8, 0.6, NUM_MATCHES))


def one_image(geometry: np.ndarray) -> FeatureBatch:
    """Features without meaningful descriptors."""
    ends = np.array([0, len(geometry)])
    return FeatureBatch(
        np.zeros(1, np.int64), ends, np.zeros((len(geometry), 1), np.uint8), geometry.astype(np.float32)
    )


def row_by_row(num: int) -> Matches:
    """Row n of the query matches row n of the database."""
    rows = np.arange(num, dtype=np.int32)
    return Matches(np.zeros(1, np.int64), np.array([0, num]), rows, rows)


def plain_ransac(query: FeatureBatch, database: FeatureBatch) -> np.ndarray | None:
    """OpenCV's."""
    limits = {"ransacReprojThreshold": THRESHOLD_PX, "maxIters": MAX_ITERATIONS, "confidence": CONFIDENCE}
    left, right = (np.ascontiguousarray(side.geometry[:, :2]) for side in (query, database))
    found: np.ndarray | None = cv2.estimateAffine2D(left, right, method=cv2.RANSAC, **limits)[0]
    return None if found is None else np.vstack([found, [0, 0, 1]])


def usac(method: str) -> Estimate:
    """A method of ours that calls OpenCV's USAC."""
    fields: dict[str, Any] = {"threshold_px": THRESHOLD_PX, "max_iterations": MAX_ITERATIONS, "confidence": CONFIDENCE}
    fit = RansacFit(Ransac.model_validate({"channel": "local", "method": method, **fields}))
    return lambda query, database: fit(query, database, row_by_row(NUM_MATCHES)).transforms[0]


def fsm() -> Estimate:
    """Fast spatial matching."""
    fit = FsmFit(Fsm(channel="local", threshold_px=THRESHOLD_PX))
    return lambda query, database: fit(query, database, row_by_row(NUM_MATCHES)).transforms[0]


def print_fits() -> None:
    """Pairs per second and share of scenes solved, by estimator."""
    estimators: dict[str, Estimate] = {
        "cv2.RANSAC": plain_ransac,
        "ransac, usac_fast": usac("usac_fast"),
        "ransac, magsac": usac("magsac"),
        "fsm": fsm(),
    }
    fsm()(*scene(0, 0.5)[:2])  # compiles the loops
    print("| true matches | estimator | pairs/s (median) | median px off | scenes solved |\n|---|---|---|---|---|")
    for share in (0.5, 0.2, 0.1):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in estimators}
        for seed in range(NUM_SCENES):
            query, database, truth, num_true = scene(seed, share)
            inside = query.geometry[:num_true, :2]
            for name, estimate in estimators.items():
                start = time.perf_counter()
                matrix = estimate(query, database)
                seconds = time.perf_counter() - start
                off = np.inf if matrix is None else np.abs(mapped(matrix, inside) - mapped(truth, inside)).max()
                found[name].append((seconds, float(off)))
        for name, rows in found.items():
            seconds, off = np.array(rows).T
            columns = f"{1 / np.median(seconds):,.0f} | {np.median(off):.2f} | {np.mean(off < 2):.0%}"
            print(f"| {share:.0%} | {name} | {columns} |", flush=True)


@dataclass(frozen=True)
class Photographs:
    """Features and signatures of one set in memory; a reranker's context for one query."""

    database: FeatureBatch
    coded: FeatureBatch
    query: FeatureBatch
    query_coded: FeatureBatch

    def query_features(self, channel: str) -> FeatureBatch:
        """Of the one query."""
        return self.query

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Ids are positions."""
        return self.database.take(image_ids)

    def query_signatures(self, channel: str) -> FeatureBatch:
        """Of the one query."""
        return self.query_coded

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Ids are positions."""
        return self.coded.take(image_ids)


def extracted(paths: Sequence[Path]) -> FeatureBatch:
    """SIFT of image files."""
    spec, batches = Sift(), []
    extractor = spec.build("cpu", {})
    for number, path in enumerate(paths):
        image = decode(path.read_bytes(), spec.view, Limits())
        assert not isinstance(image, BadImage), path
        batches.append(
            extractor.extract(ImageBatch(np.array([number]), [image.pixels], np.array([image.size], np.int32)))
        )
    return FeatureBatch.concatenate(batches)


def rooted(batch: FeatureBatch) -> np.ndarray:
    """RootSIFT."""
    rows = batch.descriptors.astype(np.float32)
    return np.sqrt(rows / np.maximum(rows.sum(1, keepdims=True), 1e-12))


def signatures(batch: FeatureBatch, codebook: Codebook, num_words: int) -> FeatureBatch:
    """The signs of the residuals to the nearest words, 128 bits each; `num_words` rows per feature."""
    rows = rooted(batch)
    half = (codebook.centroids**2).sum(1) / 2
    nearest = [np.argsort(half - part @ codebook.centroids.T, axis=1)[:, :num_words] for part in parts(rows)]
    words = np.concatenate(nearest)
    codes = np.packbits(rows[:, None] > codebook.centroids[words], axis=2).reshape(-1, 16)
    geometry = np.repeat(batch.geometry, num_words, axis=0)
    offsets = batch.offsets * num_words
    return FeatureBatch(batch.image_ids, offsets, codes, geometry, words=words.ravel().astype(np.int32))


def parts(rows: np.ndarray) -> list[np.ndarray]:
    """A few thousand rows at a time."""
    return [rows[start : start + 4096] for start in range(0, len(rows), 4096)] or [rows]


def short_lists(queries: FeatureBatch, database: FeatureBatch) -> Hits:
    """The best by tf-idf of single words (Sivic and Zisserman 2003)."""
    stored = bags(database, 1)
    idf = np.log(len(database) / np.maximum((stored > 0).sum(0), 1))
    left, right = bags(queries, QUERY_WORDS) * idf, stored * idf
    scores = left @ (right / np.maximum(np.linalg.norm(right, axis=1, keepdims=True), 1e-12)).T
    ids = np.broadcast_to(np.arange(len(database)), scores.shape)
    return Hits.ranked(ids, scores.astype(np.float32), TOP)


def bags(coded: FeatureBatch, num_words: int) -> np.ndarray:
    """How many features have which nearest word (N, WORDS)."""
    assert coded.words is not None
    images = np.repeat(np.arange(len(coded)), coded.counts)[::num_words]
    counts = np.bincount(images * WORDS + coded.words[::num_words], minlength=len(coded) * WORDS)
    return counts.reshape(len(coded), WORDS)


def rerankers() -> Mapping[str, MatchingSpec | None]:
    """What is compared, all on the same short-lists."""
    return {
        "none": None,
        "ransac, ratio": Ransac(channel="local", top=TOP),
        "ransac (usac_fast), ratio": Ransac(channel="local", top=TOP, method="usac_fast"),
        "ransac (usac_fast), word": Ransac(channel="local", top=TOP, method="usac_fast", matches="word"),
        "fsm, ratio": Fsm(channel="local", top=TOP, matches="ratio"),
        "fsm, word": Fsm(channel="local", top=TOP),
        "hpm, word": Hpm(channel="local", top=TOP),
        "wgc, word": Wgc(channel="local", top=TOP),
    }


def compiled(context: Photographs) -> None:
    """Compile all loops before anything is timed."""
    some = Hits(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
    for spec in rerankers().values():
        if spec:
            spec.build().rerank(some, context)


def print_photographs(name: str) -> None:
    """Pairs per second, mAP and recall of every verification on one set."""
    truth = read_ground_truth(DATA / "photos" / name / "ground_truth.csv")
    truth = replace(truth, queries=truth.queries[::EVERY_QUERY])
    others = sorted((DATA / "photos" / "distractors" / "images").iterdir())[:NUM_DISTRACTORS]
    positives = sorted(frozenset[str]().union(*(query.positives for query in truth.queries)))
    keys = [*positives, *(str(path) for path in others)]
    database = extracted([truth.folder / key for key in keys])
    queries = extracted([truth.picture(query) for query in truth.queries])
    sample = rooted(database)[np.random.default_rng(0).permutation(len(database.descriptors))[: 30 * WORDS]]
    codebook = Codebook.train(sample, WORDS, 10, 0)
    coded, query_coded = signatures(database, codebook, 1), signatures(queries, codebook, QUERY_WORDS)
    hits = short_lists(query_coded, coded)
    compiled(Photographs(database, coded, queries.take(np.zeros(1, int)), query_coded.take(np.zeros(1, int))))
    rankings: dict[str, list[list[str]]] = {method: [] for method in rerankers()}
    seconds: dict[str, list[float]] = {method: [] for method in rerankers()}
    for query in range(len(queries)):
        position = np.array([query])
        context = Photographs(database, coded, queries.take(position), query_coded.take(position))
        before = Hits(hits.image_ids[position], hits.scores[position])
        for method, spec in rerankers().items():
            start = time.perf_counter()
            after = spec.build().rerank(before, context) if spec else before
            seconds[method].append(time.perf_counter() - start)
            rankings[method].append([keys[image] for image in after.image_ids[0]])
    print(f"\n{name}: {len(queries)} queries, {len(database)} images, {WORDS} words, 128 bits")
    print("| verification | pairs/s (median) | mAP of the best 100 | recall@1 |\n|---|---|---|---|")
    for method, ranked in rankings.items():
        quality = evaluate(ranked, truth)
        rate = f"{TOP / np.median(seconds[method]):,.0f}" if rerankers()[method] else ""
        print(
            f"| {method} | {rate} | {quality.mean_average_precision():.4f} | {quality.recall_at(1):.3f} |", flush=True
        )


def main() -> None:
    """Print what was asked for, or all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="the fit alone")
    parser.add_argument("--photographs", action="store_true", help="whole verification alone")
    asked = parser.parse_args()
    cv2.setNumThreads(1)
    if asked.fit or not asked.photographs:
        print_fits()
    if asked.photographs or not asked.fit:
        for name in SETS:
            print_photographs(name)


if __name__ == "__main__":
    main()
