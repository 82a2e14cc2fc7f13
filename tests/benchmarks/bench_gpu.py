"""From JPEG bytes in memory to float16 rows: how much of a GPU's rate the way there keeps; prints a Markdown table.

Run: python tests/benchmarks/bench_gpu.py [--device cuda] [--images 8192] [--batch 256] [--threads 16] [--compile]

Needs torch, torchvision, timm and this library; neither Ray nor faiss. Without a GPU it runs on one core with a few
images, which shows that it works and nothing else. Random weights; JPEGs are photographs of $CBIR_TEST_DATA (default
../shared/data) or, without, made here, all of 640 pixels.

- resident: the network, its pooling and normalisation on batches that already lie on the device;
- threads: decoder threads (`cbir.images.decode`, scaled decoding), passes of pinned memory, rows back on the host;
- nvJPEG: torchvision decodes and resizes whole batches on the GPU, on a stream of its own.

Ways take turns, and medians count. "Of resident" is the better way divided by resident. "Of matmul" is the rate of the
resident network's floating point operations, divided by that of large square matrix products in the same precision.
"""

import argparse
import io
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize

from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.runtime import Passes, network_on
from cbir.features.networks.vision import exactly
from cbir.images import Decoded, Limits, decode
from cbir.types import Floats, Pixels

DATA = Path(os.environ.get("CBIR_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-50, 224 px": {"backbone": "resnet50", "size": 224},
    "ResNet-50, 480 px": {"backbone": "resnet50", "size": 480},
    "ViT-B/16, 224 px": {
        "backbone": "vit_base_patch16_224",
        "backbone_args": {"img_size": 224},
        "size": 224,
        "pooling": {"name": "spoc"},
    },
}
NUM_ROUNDS = 5
NUM_DISTINCT = 256
LONGEST_SIDE = 640
IN_FLIGHT = 4
"""Batches that are being decoded."""

Way = Callable[[], Iterable[Floats]]
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    device: torch.device
    images: int
    batch: int
    threads: int
    precision: str
    compile: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def num_batches(self) -> int:
        return -(-self.images // self.batch)


class Described:
    """A network with its pooling: pixels (N, H, W, 3) uint8 on the device -> l2-normalised rows (N, D) float16."""

    def __init__(self, settings: dict[str, Any], options: Options) -> None:
        self.spec = Deep(**settings, weights="none", precision=options.precision, compile=options.compile)
        self._network = network_on(Backbone(self.spec, None), self.spec, (self.spec.size,) * 2, options.device)
        self._pool = self.spec.pooling.build(str(options.device), {})

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        with exactly():
            (maps,) = self._network(pixels)
            return [torch.nn.functional.normalize(self._pool(maps)).half()]


def jpegs() -> list[bytes]:
    paths = sorted((DATA / "photos").rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // NUM_DISTINCT)][:NUM_DISTINCT]
    pictures = (Image.open(path).convert("RGB") for path in paths) if paths else map(made, range(NUM_DISTINCT))
    return [encoded(picture) for picture in pictures]


def made(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((LONGEST_SIDE, LONGEST_SIDE * 3 // 4), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image) -> bytes:
    ratio = LONGEST_SIDE / max(picture.size)
    buffer = io.BytesIO()
    picture.resize([round(ratio * side) for side in picture.size]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def in_batches(files: Sequence[bytes], options: Options) -> Iterator[list[bytes]]:
    endless = itertools.cycle(files)
    return (list(itertools.islice(endless, options.batch)) for _ in range(options.num_batches))


def resident(described: Described, options: Options) -> Way:
    side = described.spec.size
    pixels = torch.randint(0, 256, (options.batch, side, side, 3), dtype=torch.uint8, device=options.device)

    def run() -> Iterator[Floats]:
        for _ in range(options.num_batches):
            rows = described(pixels)[0]
        yield rows.cpu().numpy()

    return run


def threads(described: Described, files: Sequence[bytes], options: Options, pool: ThreadPoolExecutor) -> Way:
    passes = Passes(described, options.device, options.batch)

    def pixels_of(data: bytes) -> Pixels:
        image = decode(data, described.spec.view, Limits())
        assert isinstance(image, Decoded)
        return image.pixels

    def run() -> Iterator[Floats]:
        submitted = ([pool.submit(pixels_of, data) for data in batch] for batch in in_batches(files, options))
        groups = ([image.result() for image in batch] for batch in ahead(submitted))
        return (rows for (rows,) in passes.rows(groups))

    return run


def nvjpeg(described: Described, files: Sequence[bytes], options: Options, pool: ThreadPoolExecutor) -> Way:
    stream, side = torch.cuda.Stream(options.device), described.spec.size

    def pixels_of(batch: list[bytes]) -> Tensor:
        coded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in batch]
        with torch.cuda.stream(stream):
            images = decode_jpeg(coded, mode=ImageReadMode.RGB, device=options.device)
            pixels = torch.stack([resize(image, [side, side], antialias=True) for image in images])
            channels_last = pixels.permute(0, 2, 3, 1).contiguous()
        stream.synchronize()
        return channels_last

    def launched(pixels: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        computing = torch.cuda.current_stream(options.device)
        pixels.record_stream(computing)
        rows = described(pixels)[0].to("cpu", non_blocking=True)
        return rows, computing.record_event()

    def run() -> Iterator[Floats]:
        submitted = (pool.submit(pixels_of, batch) for batch in in_batches(files, options))
        for rows, done in ahead(launched(pixels.result()) for pixels in ahead(submitted)):
            done.synchronize()
            yield rows.numpy()

    return run


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each after the next few have been begun."""
    begun: deque[T] = deque()
    for item in items:
        begun.append(item)
        if len(begun) == IN_FLIGHT:
            yield begun.popleft()
    yield from begun


def images_per_s(way: Way, options: Options) -> float:
    if options.on_gpu:
        torch.cuda.synchronize(options.device)
    start = time.perf_counter()
    for rows in way():
        assert rows.dtype == np.float16
        assert np.isfinite(rows).all()
    return options.num_batches * options.batch / (time.perf_counter() - start)


def matmul_flops(options: Options) -> float:
    """Floating point operations per second of square products in the precision of the network."""
    side, times = (8192, 20) if options.on_gpu else (1024, 5)
    one, other = (torch.rand(side, side, device=options.device).to(getattr(torch, options.precision)) for _ in range(2))
    taken = []
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        for _ in range(times):
            product = one @ other
        product[0, 0].item()
        taken.append((time.perf_counter() - start) / times)
    return 2 * side**3 / min(taken)


def flops_per_image(spec: Deep) -> float:
    network = timm.create_model(spec.backbone, num_classes=0, **spec.backbone_args).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.forward_features(torch.zeros(1, 3, spec.size, spec.size))
    return float(counter.get_total_flops())


def row_of(name: str, files: Sequence[bytes], options: Options, pool: ThreadPoolExecutor) -> str:
    described = Described(NETWORKS[name], options)
    ways = {"resident": resident(described, options), "threads": threads(described, files, options, pool)}
    if options.on_gpu:
        ways["nvJPEG"] = nvjpeg(described, files, options, pool)
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(-1, NUM_ROUNDS):
        for way, run in ways.items():
            rate = images_per_s(run, options)
            if turn >= 0:
                measured[way].append(rate)
    rates = {way: median(taken) for way, taken in measured.items()}
    best = max(rate for way, rate in rates.items() if way != "resident")
    flops = rates["resident"] * flops_per_image(described.spec)
    nv = f"{rates['nvJPEG']:.1f}" if "nvJPEG" in rates else "-"
    return (
        f"| {name} | {rates['resident']:.1f} | {rates['threads']:.1f} | {nv} | {best / rates['resident']:.2f} | "
        f"{flops / 1e12:.3f} | {flops / matmul_flops(options):.2f} |"
    )


def options_of_command_line() -> Options:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--images", type=int, default=8192 if on_gpu else 8)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true")
    given = vars(parser.parse_args())
    return Options(**{**given, "device": torch.device(given["device"])})


def main() -> None:
    options = options_of_command_line()
    if not options.on_gpu:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(options.device) if options.on_gpu else "one core"
    print(f"torch {torch.__version__}, {name}, {options}")
    print(f"\n| images/s | resident | threads | nvJPEG | of resident | TFLOP/s | of matmul |\n{'|---' * 7}|")
    files = jpegs()
    with ThreadPoolExecutor(options.threads) as pool:
        for network in NETWORKS:
            print(row_of(network, files, options, pool), flush=True)


if __name__ == "__main__":
    main()
