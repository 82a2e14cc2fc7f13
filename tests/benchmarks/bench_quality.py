"""How good the methods are on real photographs: `python tests/benchmarks/bench_quality.py [--store DIR]`.

Every row is one configuration, every column one set together with the distractors; cells are mAP / recall@1. The
photographs and weights are found through CBIR_TEST_DATA. With `--store`, a second run reuses what the first extracted.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported; the processes below share the processors

import numpy as np
import yaml

from cbir.config import Config, parse_config
from cbir.evaluation.ground_truth import GroundTruth, read_ground_truth
from cbir.evaluation.metrics import Quality, evaluate
from cbir.layout import Layout
from cbir.search import Searcher, open_version
from cbir.types import FeatureBatch
from cbir.versions import Manifest
from pipelines.indexing import index
from pipelines.work import limit_threads

PROJECT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CBIR_TEST_DATA", PROJECT.parent / "shared" / "data"))
SETS = ("smvs_dvd", "paintings", "grocery_packages", "koe_places", "sfm_scenes")
PROCESSES = 2
QUERY_BATCH = 16

REFERENCES = {
    "reference: the same network, plain script": (0.212, 0.843, 0.265, 0.762, 0.952),
    "reference: at 3 scales, whitened to 512 on the distractors": (0.339, 0.865, 0.283, 0.787, 0.983),
    "reference: VLAD, 64 words, plain script": (0.805, 0.895, 0.467, 0.633, 0.787),
}
"""mAP on the same sets by programs that share no code with this one."""


def channels() -> dict[str, dict[str, Any]]:
    """The extractors that all rows share, as in configs/, with the weights of the test data."""
    network = {
        "name": "deep",
        "backbone": "mobilenetv2_100",
        "backbone_args": {"pad_type": "same"},
        "weights": str(DATA / "weights" / "mobilenetv2_100_imagenet.safetensors"),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    deep, local = (
        yaml.safe_load((PROJECT / "configs" / f"{name}.yaml").read_text())["channels"]
        for name in ("deep_ivfpq", "sift_vlad")
    )
    extractor = {**deep["global"]["extractor"], **network}
    flat = {"name": "flat"}
    return {
        "global": {"extractor": {**extractor, "scales": [1.0]}, "index": flat},
        "scales": {"extractor": extractor, "index": flat},
        "local": {**local["local"], "index": flat},
    }


@dataclass(frozen=True)
class Row:
    """A configuration: what follows the extractor of each channel, and what follows the index."""

    name: str
    channels: dict[str, dict[str, Any]]
    rerank: int = 0
    """How many hits are verified."""

    def config(self, photographs: str, store: str, workers: int = 0) -> Config:
        """Of one set with the distractors."""
        settings: dict[str, Any] = {
            "images": [str(DATA / "photos" / name / "images") for name in (photographs, "distractors")],
            "store": store,
            "channels": {name: channels()[name] | changes for name, changes in self.channels.items()},
            "search": {"fuse": {"name": "late"}} if len(self.channels) > 1 else {},
            "evaluate": {"probes": 0},
            "workers": workers,
        }
        if self.rerank:
            settings["search"]["rerank"] = [{"name": "ransac", "channel": "local", "top": self.rerank}]
        return parse_config(settings, self.name)


def whitened(dim: int, shrinkage: float = 0.5) -> dict[str, Any]:
    """Half-whitened: the sample has only two to four times as many images as there are dimensions, and full whitening
    makes noise of its own samples."""
    return {"name": "pca", "dim": dim, "whiten": True, "shrinkage": shrinkage}


def coded(num_bytes: int) -> dict[str, Any]:
    return {"name": "ivfpq", "bytes": num_bytes, "opq": True, "probes": 16}


VLAD = [{"name": "rootsift"}, {"name": "vlad", "words": 64, "ssr": True, "intra": True}]
EXTRACTION = Row("extraction", {"global": {}, "scales": {}, "local": {}})
ROWS = (
    Row("deep (MobileNetV2, GeM)", {"global": {}}),
    Row("deep, fully whitened to 256", {"global": {"encoders": [whitened(256, 1.0)]}}),
    Row("deep, fully whitened to 512", {"global": {"encoders": [whitened(512, 1.0)]}}),
    Row("deep, half-whitened to 256", {"global": {"encoders": [whitened(256)]}}),
    Row("deep, half-whitened to 512", {"global": {"encoders": [whitened(512)]}}),
    Row("deep at 3 scales, half-whitened to 512", {"scales": {"encoders": [whitened(512)]}}),
    Row("deep, half-whitened to 256, ivfpq 32 bytes", {"global": {"encoders": [whitened(256)], "index": coded(32)}}),
    Row("deep, half-whitened to 256, ivfpq 16 bytes", {"global": {"encoders": [whitened(256)], "index": coded(16)}}),
    Row("sift + VLAD", {"local": {}}),
    Row("sift + VLAD, half-whitened to 512", {"local": {"encoders": [*VLAD, whitened(512)]}}),
    Row("sift + VLAD, RANSAC on the best 100", {"local": {}}, rerank=100),
    Row("deep and VLAD, fused", {"global": {}, "local": {}}),
    Row("deep and VLAD, fused, RANSAC on the best 100", {"global": {}, "local": {}}, rerank=100),
)


@dataclass(frozen=True)
class Score:
    """What a configuration reached on one set."""

    map: float
    recall_at_1: float
    bytes_per_image: float


def scores(photographs: str, store: str) -> dict[str, Score]:
    """All rows on one set; the queries' raw features are extracted once."""
    limit_threads()
    truth_file = DATA / "photos" / photographs / "ground_truth.csv"
    everything = open_version(store, index(EXTRACTION.config(photographs, store)).version)
    truth = read_ground_truth(truth_file).resolved(frozenset(everything.keys().values()))
    raw = extracted(everything, truth)
    found = {}
    for row in ROWS:
        manifest = index(row.config(photographs, store))
        searcher = open_version(store, manifest.version)
        quality = judged(searcher, truth, {name: raw[name] for name in row.channels})
        found[row.name] = Score(
            quality.mean_average_precision(), quality.recall_at(1), bytes_per_image(manifest, searcher, row, raw)
        )
        print(f"{photographs}: {row.name}: {found[row.name]}", file=sys.stderr, flush=True)
    return found


def batches(number: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    for start in range(0, number, QUERY_BATCH):
        yield np.arange(start, min(start + QUERY_BATCH, number))


def extracted(searcher: Searcher, truth: GroundTruth) -> dict[str, FeatureBatch]:
    """Raw features of all queries by channel."""
    parts = []
    for some in batches(len(truth.queries)):
        pictures = [truth.picture(truth.queries[number]).read_bytes() for number in some]
        parts.append(searcher.encoder.extract(pictures, [None] * len(pictures)))
    return {name: FeatureBatch.concatenate([part[name] for part in parts]) for name in parts[0]}


def judged(searcher: Searcher, truth: GroundTruth, raw: dict[str, FeatureBatch]) -> Quality:
    """The quality of complete rankings."""
    keys = searcher.keys()
    rankings: list[Sequence[str]] = []
    for some in batches(len(truth.queries)):
        answer = searcher.answer_features({name: batch.take(some) for name, batch in raw.items()}, len(keys))
        rankings += [[keys[image] for image in row if image >= 0] for row in answer.hits.image_ids.tolist()]
    return evaluate(rankings, truth)


def bytes_per_image(manifest: Manifest, searcher: Searcher, row: Row, raw: dict[str, FeatureBatch]) -> float:
    """Of entries in the index (trained codebooks do not grow with it), and of stored features if they are used."""
    one = searcher.encoder.encode({name: raw[name].take(np.zeros(1, np.int64)) for name in row.channels})
    entries = sum(
        searcher.config.channels[name].index.entry_bytes(batch.descriptors.shape[1]) for name, batch in one.items()
    )
    if not row.rerank:
        return entries
    sizes = {file.key: file.num_bytes for file in manifest.files}
    features = {key for part in Layout.from_json(manifest.layout).partitions for key in part.features.values()}
    return entries + sum(sizes[key] for key in features) / manifest.counts["indexed"]


def table(found: dict[str, dict[str, Score]]) -> str:
    """Markdown."""
    lines = ["| | " + " | ".join(SETS) + " | bytes per image |", "|---" * (len(SETS) + 2) + "|"]
    for row in ROWS:
        cells = [f"{found[name][row.name].map:.3f} / {found[name][row.name].recall_at_1:.3f}" for name in SETS]
        size = np.mean([found[name][row.name].bytes_per_image for name in SETS])
        lines.append(f"| {row.name} | " + " | ".join(cells) + f" | {size:,.0f} |")
    for name, precisions in REFERENCES.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in precisions) + " | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="keep the work in this folder")
    chosen = parser.parse_args().store
    if not (DATA / "photos").is_dir():
        sys.exit(f"no photographs at {DATA}/photos; set CBIR_TEST_DATA")
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as temporary:
        store = str(chosen or temporary)
        for name in SETS:
            index(EXTRACTION.config(name, store, workers=PROCESSES))
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            found = dict(zip(SETS, pool.map(scores, SETS, [store] * len(SETS)), strict=True))
    print(table(found))


if __name__ == "__main__":
    main()
