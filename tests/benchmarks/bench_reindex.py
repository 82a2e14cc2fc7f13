"""The price of a change: `bench_reindex.py [images] [method ...] [--share 0.01]`.

Photographs lie in tars of a hundred. After a full build, one in a hundred is changed, as many are added and as many
deleted, anywhere, so that nearly every tar is another; `cbir reindex` then brings the index up to date. It is held
against a full build of the changed collection in a new store with the same codebooks, whose partitions must be the same
to the byte, and against a re-index without any change, which is the fixed cost. All are whole commands, from start to
end. Real photographs (CBIR_TEST_DATA) if there are any, else the demo collection.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cbir.layout import Layout
from cbir.storage import open_store
from cbir.types import image_id
from cbir.versions import Manifest, Versions
from pipelines.runs import RunHistory
from tests.benchmarks.bench_overhead import methods, photographs
from tests.benchmarks.processes import Cost, measured

IMAGES_PER_TAR, WORDS = 100, 4096

ASMK = {
    "extractor": {"name": "sift"},
    "encoders": [{"name": "rootsift"}],
    "index": {"name": "asmk", "words": WORDS},
    "keep_signatures": True,
}


def write_tars(folder: Path, images: Mapping[str, bytes], num: int) -> None:
    """Every image in the tar that its id says, so that it stays there."""
    folder.mkdir(exist_ok=True)
    for number in range(num):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as archive:
            for key in sorted(key for key in images if image_id(key) % num == number):
                member = tarfile.TarInfo(key)
                member.size = len(images[key])
                archive.addfile(member, io.BytesIO(images[key]))


def collection(num_images: int) -> dict[str, bytes]:
    """Photographs by key, repeated under other names until there are so many."""
    known = photographs()
    return {f"{n:06d}{known[n % len(known)].suffix}": known[n % len(known)].read_bytes() for n in range(num_images)}


def changed(images: Mapping[str, bytes], share: float) -> dict[str, bytes]:
    """A share of the images other, as many new, as many gone."""
    rng, now = np.random.default_rng(1), dict(images)
    num = max(1, round(share * len(images)))
    chosen = rng.choice(sorted(images), 3 * num, replace=False).tolist()
    for key in chosen[:num]:
        now[key] = mirrored(images[key])
    for number, key in enumerate(chosen[num : 2 * num]):
        now[f"new{number:06d}.jpg"] = mirrored(images[key])
    for key in chosen[2 * num :]:
        del now[key]
    return now


def mirrored(data: bytes) -> bytes:
    """Another picture of the same size; broken ones are told apart by a byte more."""
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    except OSError:
        return data + b"\0"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def cbir(command: str, settings: Mapping[str, Any], folder: Path) -> Cost:
    """Run a command with these settings."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return measured([sys.executable, "-c", "from pipelines.cli import main; main()", command, str(path)])


def files_of(manifest: Manifest) -> set[str]:
    """sha256 of the files of all partitions."""
    digests = {file.key: file.sha256 for file in manifest.files}
    return {digests[key] for part in Layout.from_json(manifest.layout).partitions for key in part.keys}


def measure(name: str, channel: Mapping[str, Any], num_images: int, share: float, folder: Path) -> None:
    """All runs of one method; prints its rows."""
    images, num_tars = collection(num_images), -(-num_images // IMAGES_PER_TAR)
    tars, store, other = folder / "tars", folder / "store", folder / "anew"
    settings = {"images": str(tars), "store": str(store), "channels": {name: channel}, "workers": 2}
    write_tars(tars, images, num_tars)
    full = cbir("index", settings, folder)
    nothing = cbir("reindex", settings, folder)
    write_tars(tars, changed(images, share), num_tars)
    change = cbir("reindex", settings, folder)
    anew_settings = settings | {
        "store": str(other),
        "channels": {name: {**channel, "codebooks": {"store": str(store), "version": 1}}},
    }
    anew = cbir("index", anew_settings, folder)
    now, fresh = (Versions(open_store(str(where))).load() for where in (store, other))
    assert files_of(now) == files_of(fresh), "the re-index is not what a build from the beginning gives"
    extract = extract_figures(str(store))
    described = extract["images"] - extract["recalled_images"]
    for what, cost in (("full build", full), ("full build, codebooks given", anew), ("nothing changed", nothing)):
        print(f"| {name} | {what} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | | |")
    print(
        f"| {name} | {3 * share:.0%} changed, added, deleted | {change.wall_s:.1f} | {change.cpu_s:.1f} | "
        f"{described / now.counts['images']:.2%} | {(change.wall_s - nothing.wall_s) / full.wall_s:.1%} by the clock, "
        f"{(change.cpu_s - nothing.cpu_s) / full.cpu_s:.1%} of processors |",
        flush=True,
    )


def extract_figures(store: str) -> Mapping[str, Any]:
    """What the newest run did in `extract`."""
    *_, newest = RunHistory(open_store(store)).records()
    return next(stage for stage in newest["stages"] if stage["stage"] == "extract")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=int, default=2650)
    parser.add_argument("methods", nargs="*", help="sift_vlad, deep, asmk; all if none is given")
    parser.add_argument("--share", type=float, default=0.01, help="of the images that is changed, added, deleted each")
    chosen = parser.parse_args()
    known = {**methods(()), "asmk": ASMK}
    head = ["method", "run", "wall s", "CPU s", "decoded and described", "beyond the fixed cost, of the full build"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in chosen.methods or known:
        with tempfile.TemporaryDirectory(prefix="cbir-reindex-") as folder:
            measure(name, known[name], chosen.images, chosen.share, Path(folder))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n{os.cpu_count()} cores; load over 1, 5 and 15 minutes at the end: {load}.")


if __name__ == "__main__":
    main()
