"""What scaled decoding and the decoder processes cost: `python tests/benchmarks/bench_images.py [rounds]`.

The variants take turns in each round, so that other load on the machine meets all of them; medians and their ratios.
"""

import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from cbir.images import Decoded, Decoder, Limits, View, decode

LIMITS = Limits()


def photograph(width: int, height: int) -> bytes:
    """A JPEG of about 1 bit per pixel: smooth colours, edges at all scales, a little noise."""
    generator = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64, 256):
        layer = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), np.float32) / cells**0.5
    pixels *= 255 / pixels.max()
    pixels += generator.normal(0, 2, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def full_decode(data: bytes, size: tuple[int, int]) -> Any:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BILINEAR))


def medians_ms(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def compare(width: int, view: View, rounds: int) -> None:
    data = photograph(width, width * 2 // 3)
    upright = decode(data, view, LIMITS)
    assert isinstance(upright, Decoded)
    height, width_delivered = upright.pixels.shape[:2]
    with Decoder(view, LIMITS) as decoder:
        variants = {
            "full": lambda: full_decode(data, (width_delivered, height)),
            "decode": lambda: decode(data, view, LIMITS),
            "decoder": lambda: decoder.decode(data),
        }
        ms = medians_ms(variants, rounds)
    print(
        f"| {width} x {width * 2 // 3} ({len(data) / 1e3:.0f} kB) | {view.fit} {view.size} | {ms['full']:.2f} | "
        f"{ms['decode']:.2f} | {ms['full'] / ms['decode']:.2f} x | {ms['decoder']:.2f} | "
        f"{ms['decoder'] - ms['decode']:+.2f} |"
    )


def start_ms() -> float:
    """From nothing to the first small image out of a new process."""
    times = []
    data = photograph(30, 20)
    for _ in range(9):
        start = time.perf_counter()
        with Decoder(View(size=32), LIMITS) as decoder:
            decoder.decode(data)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def throughput(processes: int, seconds: float = 3.0) -> float:
    """Images per second of `Decoder.map`, 2400 px -> 1024 px."""
    data = photograph(2400, 1600)
    with Decoder(View(size=1024), LIMITS, processes) as decoder:
        for _ in decoder.map((i, data) for i in range(2 * processes)):
            pass
        start, count = time.perf_counter(), 0
        for _ in decoder.map(iter(lambda: (0, data), None)):
            count += 1
            if time.perf_counter() - start > seconds:
                break
        return count / (time.perf_counter() - start)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 41
    print("| JPEG | view | full Pillow decode, ms | `decode`, ms | ratio | `Decoder`, ms | its overhead, ms |")
    print("|---|---|---|---|---|---|---|")
    compare(2400, View(size=1024), rounds)
    compare(1024, View(size=1024), rounds)
    compare(2400, View(size=224, fit="stretch"), rounds)
    compare(256, View(size=224, fit="stretch"), rounds)
    print(f"\nA new decoder process answers after {start_ms():.0f} ms.")
    rates = ", ".join(f"{processes}: {throughput(processes):.0f}" for processes in (1, 2))
    print(f"Images per second at 2400 -> 1024 px by number of processes ({os.cpu_count()} cores): {rates}.")


if __name__ == "__main__":
    main()
