"""How fast `deep` is on one core in each precision and form, and what that does to its mAP; prints Markdown tables.

Run: python tests/benchmarks/bench_deep.py [--only speed|quality]

Speed: random weights, one thread, one image at a time. The contestants take turns in rotating order, and medians count:
of processor time (all threads), which other work on the machine disturbs least, and of wall time. "Plain timm" is the
bare network in float32 as timm makes it, on pixels that are already normalised; the others are whole extractors, from
uint8 pixels to the row. "Of matmul" is the rate of a contestant's network, divided by what large square matrix products
of its precision reach on the same core in the same turns: what is far below 1 can be made faster, what is near it not.

Quality: MobileNetV2 with the weights and photographs of $CBIR_TEST_DATA (default ../shared/data), 224 px, GeM, exact
search as in tests/benchmarks/quality/global/gem_224.yaml; queries are described like the database, and in float32 as a
searcher does.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
import pyarrow.csv
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from cbir.errors import ConfigError
from cbir.evaluation.ground_truth import read_ground_truth
from cbir.evaluation.metrics import evaluate
from cbir.features.deep import Deep
from cbir.features.extractor import Extractor
from cbir.images import Decoded, Limits, decode
from cbir.types import Floats, ImageBatch, Pixels

DATA = Path(os.environ.get("CBIR_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SETS = ("smvs_dvd", "paintings", "grocery_packages", "koe_places", "sfm_scenes")

NUM_ROUNDS = 15
MATMUL_SIDE = 1024
BASELINE = "plain timm, float32"

NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-50, 480 px": {"backbone": "resnet50", "size": 480},
    "ViT-S/14, 224 px": {
        "backbone": "vit_small_patch14_dinov2",
        "backbone_args": {"img_size": 224},
        "size": 224,
        "pooling": {"name": "spoc"},
    },
}

FORMS: dict[str, dict[str, Any]] = {
    f"{label}, {precision}": {**fields, "precision": precision}
    for precision in ("float32", "bfloat16")
    for label, fields in {"deep": {}, "compile": {"compile": True}, "openvino": {"runtime": "openvino"}}.items()
}

MOBILENET: dict[str, Any] = {
    "backbone": "mobilenetv2_100",
    "backbone_args": {"pad_type": "same"},
    "weights": str(DATA / "weights" / "mobilenetv2_100_imagenet.safetensors"),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "size": 224,
}

Run = Callable[[], object]


def built(settings: Mapping[str, Any]) -> dict[str, Extractor]:
    """The extractors of all forms that this machine has."""
    extractors = {}
    for name, form in FORMS.items():
        try:
            extractors[name] = Deep(**settings, **form).build("cpu", {})
        except ConfigError as error:
            print(f"left out: {name}: {error}")
    return extractors


def images_of(pixels: Sequence[Pixels]) -> ImageBatch:
    return ImageBatch(np.arange(len(pixels)), pixels, np.array([image.shape[:2] for image in pixels], np.int32))


def plain(settings: Mapping[str, Any]) -> tuple[Run, float]:
    """The bare network, and the floating point operations of its pass."""
    network = timm.create_model(settings["backbone"], num_classes=0, **settings.get("backbone_args", {})).eval()
    pixels = torch.rand(1, 3, settings["size"], settings["size"])

    def run() -> object:
        with torch.inference_mode():
            return network.forward_features(pixels)

    with FlopCounterMode(display=False) as counter:
        run()
    return run, float(counter.get_total_flops())


def matmul(precision: str) -> Run:
    one, other = (torch.rand(MATMUL_SIDE, MATMUL_SIDE).to(getattr(torch, precision)) for _ in range(2))
    return lambda: one @ other


def in_turns(runs: Mapping[str, Run]) -> dict[str, tuple[float, float]]:
    """Medians of processor and wall seconds."""
    names, times = list(runs), {name: [] for name in runs}
    for turn in range(-2, NUM_ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = (time.process_time(), time.perf_counter())
            runs[name]()
            times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {name: tuple(map(median, zip(*taken[2:], strict=True))) for name, taken in times.items()}


def print_speed() -> None:
    for network, settings in NETWORKS.items():
        baseline, flops = plain(settings)
        side = settings["size"]
        image = images_of([np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)])
        extractors = built({"weights": "none", **settings})
        runs = {name: lambda made=made, image=image: made.extract(image) for name, made in extractors.items()}
        rates = {precision: matmul(precision) for precision in ("float32", "bfloat16")}
        taken = in_turns({BASELINE: baseline, **runs, **rates})
        print(f"\n| {network} | CPU ms | wall ms | x, CPU time | x, wall time | of matmul |\n|---|---|---|---|---|---|")
        for name in (BASELINE, *runs):
            (cpu, wall), first = taken[name], taken[BASELINE]
            share = flops / cpu / (2 * MATMUL_SIDE**3 / taken[name.rpartition(" ")[2]][0])
            print(
                f"| {name} | {1e3 * cpu:.1f} | {1e3 * wall:.1f} | {first[0] / cpu:.2f} | {first[1] / wall:.2f} | "
                f"{share:.2f} |"
            )


def photographs() -> dict[str, list[str]]:
    """Names of all images by set, as in the ground truth; the distractors too."""
    return {
        name: [row["image"] for row in pyarrow.csv.read_csv(DATA / "photos" / name / "ground_truth.csv").to_pylist()]
        for name in (*SETS, "distractors")
    }


def decoded(names: Mapping[str, Sequence[str]]) -> dict[str, list[Pixels]]:
    view = Deep(**MOBILENET).view
    found = {
        name: [decode((DATA / "photos" / name / image).read_bytes(), view, Limits()) for image in images]
        for name, images in names.items()
    }
    return {name: [image.pixels for image in some if isinstance(image, Decoded)] for name, some in found.items()}


def mean_average_precision(
    photos: str, names: Mapping[str, Sequence[str]], rows: Mapping[str, Floats], query_rows: Floats
) -> float:
    truth = read_ground_truth(DATA / "photos" / photos / "ground_truth.csv")
    keys = [*names[photos], *(f"distractors/{name}" for name in names["distractors"])]
    positions = {name: i for i, name in enumerate(names[photos])}
    queries = query_rows[[positions[query.image] for query in truth.queries]]
    order = np.argsort(-queries @ np.concatenate([rows[photos], rows["distractors"]]).T, axis=1, kind="stable")
    # Pictures that are queries only are junk to every query, so that it does no harm to rank them.
    return evaluate([[keys[i] for i in ranked] for ranked in order], truth).mean_average_precision()


def print_quality() -> None:
    names = photographs()
    pixels = decoded(names)
    rows: dict[str, dict[str, Floats]] = {}
    print(f"\n| mAP | {' | '.join(SETS)} | largest change |\n|---|{'---|' * (len(SETS) + 1)}")
    for form, extractor in built(MOBILENET).items():
        rows[form] = {name: extractor.extract(images_of(some)).descriptors for name, some in pixels.items()}
        exact = next(iter(rows.values()))
        ways = {"": rows[form]} if form == next(iter(rows)) else {"": rows[form], ", float32 queries": exact}
        for way, queries in ways.items():
            found = [mean_average_precision(name, names, rows[form], queries[name]) for name in SETS]
            first = [mean_average_precision(name, names, exact, exact[name]) for name in SETS]
            change = max(abs(one - other) for one, other in zip(found, first, strict=True))
            print(f"| {form}{way} | {' | '.join(f'{value:.4f}' for value in found)} | {change:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "quality"))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cpu.get_capabilities()['cpu_name']}, load {os.getloadavg()[0]:.1f}")
    if only != "quality":
        print_speed()
    if only != "speed":
        print_quality()


if __name__ == "__main__":
    main()
