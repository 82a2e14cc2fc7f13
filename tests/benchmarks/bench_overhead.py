"""What the pipeline costs beside a bare loop: `bench_overhead.py [images] [rounds] [method ...]`.

`cbir index`, from the start of the command to its end, is held against two plain processes that each take half of the
shards and do nothing but read, decode, extract, encode and write with the same functions and the codebooks of the
index (they need not train, merge, catalogue, verify or publish); one such process alone shows what a second processor
of this machine is worth. The runs take turns; medians and ratios of wall time and of processor time, which other load
on the machine changes less. Real photographs (CBIR_TEST_DATA) if there are any, else the demo collection. Then the peak
memory of a worker over ten times as many images.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cbir.collection import list_shards, read_images
from cbir.config import Config, parse_config
from cbir.images import Decoded, decode
from cbir.layout import Layout
from cbir.partition import LocalFiles
from cbir.queries import encode_all, restore_encoders
from cbir.storage import open_store
from cbir.types import ImageBatch, image_id
from cbir.versions import Versions
from pipelines.tables import write_parquet
from pipelines.work import limit_threads
from tests.benchmarks.processes import Cost, measured

PROJECT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CBIR_TEST_DATA", PROJECT.parent / "shared" / "data"))


def photographs() -> list[Path]:
    """Real photographs, or those of the demo collection."""
    if (DATA / "photos").is_dir():
        return sorted(path for path in (DATA / "photos").glob("*/images/**/*") if path.is_file())
    folder = Path(tempfile.gettempdir()) / "cbir-bench-demo"
    if not folder.is_dir():
        subprocess.run([sys.executable, "-m", "pipelines.demo", str(folder)], check=True, cwd=PROJECT)
    return sorted((folder / "queries").glob("*.jpg"))


def collection(folder: Path, num_images: int) -> Path:
    """A folder of links to the photographs, repeated under other names until there are so many."""
    known = photographs()
    for number in range(num_images):
        copy, which = divmod(number, len(known))
        path = known[which]
        link = folder / f"{copy:03d}" / f"{which:05d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        path.read_bytes()  # from now on it lies in the page cache for all
    return folder


def methods(wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    """The channels to measure, all or those wanted; random weights where there are no others, the cost is the same."""
    sift = {
        "extractor": {"name": "sift"},
        "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 64}],
        "index": {"name": "flat"},
        "keep_features": True,
    }
    network = {"name": "deep", "backbone": "mobilenetv2_100", "size": 224, "fit": "stretch", "weights": "none"}
    weights = DATA / "weights" / "mobilenetv2_100_imagenet.safetensors"
    if weights.is_file():
        network |= {"weights": str(weights), "backbone_args": {"pad_type": "same"}}
    known = {"sift_vlad": sift, "deep": {"extractor": network, "index": {"name": "flat"}}}
    return {name: channel for name, channel in known.items() if not wanted or name in wanted}


def settings(images: Path, store: Path, channel: dict[str, Any], workers: int) -> dict[str, Any]:
    """A whole configuration; 64 words need no larger sample."""
    return {
        "images": str(images),
        "store": str(store),
        "input": {"shard_images": 32},
        "sample": {"features": 200_000},
        "channels": {"it": channel},
        "workers": workers,
    }


def index(data: dict[str, Any]) -> Cost:
    """`cbir index` of this configuration, from the start of the command to its end."""
    path = Path(data["store"]).with_suffix(".yaml")
    path.write_text(json.dumps(data))  # JSON is YAML
    return measured([sys.executable, "-c", "from pipelines.cli import main; main()", "index", str(path)])


def bare(data: dict[str, Any], processes: int = 2) -> Cost:
    """Two plain processes with half of the shards each."""
    path = Path(data["store"]).with_suffix(".yaml")
    command = [sys.executable, __file__, "--bare", str(path), str(processes)]
    return measured(*([*command, str(part)] for part in range(processes)))


def bare_loop(config: Config, part: int, parts: int) -> None:
    """Read, decode, extract, encode and write every so many-th shard."""
    limit_threads()
    (name, channel), store = next(iter(config.channels.items())), open_store(config.store)
    manifest = Versions(store).load()
    layout, files = Layout.from_json(manifest.layout).channels[name], LocalFiles(store, manifest)
    extractor = channel.extractor.build("cpu", {field: files.path(key) for field, key in layout.assets.items()})
    encoders = restore_encoders(channel, layout.encoders, files)
    trained = channel.index.restore(files.state(layout.index))
    with tempfile.TemporaryDirectory(dir=Path(store.local_path("x") or "/tmp").parent) as folder:
        for shard in islice(list_shards(config.images, config.input), part, None, parts):
            features, entries = [], []
            images = read_images(shard, config.input, 1 << 30)
            while some := list(islice(images, channel.extractor.batch_size)):
                view, limits = channel.extractor.view, config.limits
                decoded = [(image_id(raw.key), decode(raw.data or b"", view, limits)) for raw in some]
                batch = extractor.extract(_batch([pair for pair in decoded if isinstance(pair[1], Decoded)]))
                features.append(batch.to_arrow())
                entries.append(trained.entries(encode_all(encoders, batch)))
            table = pa.Table.from_batches(features)
            write_parquet(Path(folder) / "features.parquet", table, table.nbytes // max(1, table.num_rows))
            write_parquet(Path(folder) / "entries.parquet", pa.concat_tables(entries))


def _batch(images: list[tuple[int, Any]]) -> ImageBatch:
    ids = np.array([number for number, _ in images], np.int64)
    sizes = np.array([image.size for _, image in images], np.int32).reshape(-1, 2)
    return ImageBatch(ids, [image.pixels for _, image in images], sizes)


def compare_speed(folder: Path, channels: dict[str, dict[str, Any]], num_images: int, rounds: int) -> None:
    images = collection(folder / "images", num_images)
    print(f"\n{num_images:,} photographs, {rounds} round(s), medians\n")
    print("| method | run | wall s | images/s | CPU s | of the bare loop: wall | CPU |\n|---|---|---|---|---|---|---|")
    for name, channel in channels.items():
        found: dict[str, list[Cost]] = {}
        for _ in range(rounds):
            two, one = (settings(images, folder / f"{name}{workers}", channel, workers) for workers in (2, 1))
            found.setdefault("two workers", []).append(index(two))
            found.setdefault("nothing left to do", []).append(index(two))
            found.setdefault("bare loop", []).append(bare(two))
            found.setdefault("bare loop, one process", []).append(bare(two, 1))
            found.setdefault("one worker", []).append(index(one))
            for data in (two, one):
                shutil.rmtree(data["store"])
        _print_speed(name, num_images, found)


def _print_speed(name: str, num_images: int, found: dict[str, list[Cost]]) -> None:
    loops = found["bare loop"]
    for run, costs in found.items():
        wall, cpu = (statistics.median(getattr(cost, what) for cost in costs) for what in ("wall_s", "cpu_s"))
        pairs = list(zip(loops, costs, strict=True))
        ratios = [
            statistics.median(loop.wall_s / cost.wall_s for loop, cost in pairs),
            statistics.median(loop.cpu_s / cost.cpu_s for loop, cost in pairs),
        ]
        shown = "" if run == "nothing left to do" else f"{num_images / wall:.1f}"
        shares = f"{ratios[0]:.2f} | {ratios[1]:.2f}" if run.endswith(("workers", "worker")) else " | "
        print(f"| {name} | {run} | {wall:.1f} | {shown} | {cpu:.1f} | {shares} |")
    for many, single in (("two workers", "one worker"), ("bare loop", "bare loop, one process")):
        speedups = [one.wall_s / two.wall_s for one, two in zip(found[single], found[many], strict=True)]
        print(f"| {name} | {many} against one | {statistics.median(speedups):.2f} x | | | | |", flush=True)


def compare_memory(folder: Path, channels: dict[str, dict[str, Any]], num_images: int) -> None:
    print("\nPeak memory of a worker, with a sample and partitions that do not grow with the collection\n")
    print("| method | images | peak of each worker, MB | ratio of the largest |\n|---|---|---|---|")
    for name, channel in channels.items():
        largest = []
        for times in (1, 10):
            images = collection(folder / f"memory-{name}-{times}", times * num_images)
            bounds = {"sample": {"images": num_images}, "partition_megabytes": 16}
            cost = index(settings(images, folder / f"{name}-m{times}", channel, 2) | bounds)
            largest.append(max(cost.worker_bytes))
            peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in cost.worker_bytes)
            print(f"| {name} | {times * num_images:,} | {peaks} | {largest[-1] / largest[0]:.2f} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        path, parts, part = sys.argv[2:]
        bare_loop(parse_config(json.loads(Path(path).read_text()), path), int(part), int(parts))
        return
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else len(photographs())
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory(prefix="cbir-bench-") as folder:
        channels = methods(sys.argv[3:])
        compare_speed(Path(folder), channels, num_images, rounds)
        compare_memory(Path(folder), channels, max(1, min(200, num_images)))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


if __name__ == "__main__":
    main()
