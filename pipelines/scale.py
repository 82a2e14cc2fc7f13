"""What the same configuration will need for more images: partitions, memory, disk, bytes moved, hours and money.

The figures of one image come from `estimates.estimate`, which tries a few; seconds of building and merging are slopes
that benchmarks measured, stated below.
"""

import math
from dataclasses import dataclass

from cbir.config import Channel, Config
from cbir.layout import ID_BYTES
from pipelines.estimates import Estimate, Line, Trial, in_bytes, in_time

__all__ = ["Scale", "at_scale"]

BUILD_S_OF_VECTOR = 24e-6
"""Processor time to code and merge a vector of D = 128 among 4,096 lists (bench_dense_peers.py, 1,000,000 vectors); on
processors that multiply 8-bit integers it is half of that."""

BUILD_S_OF_FEATURE = 25e-6
"""Processor time to find the word of a local feature among 65,536 and to merge its posting (bench_codebook.py,
bench_inverted_scale.py)."""

MAPPED_SHARE = 0.8
"""Of a machine's memory, for mapped partitions."""

HOURS_OF_MONTH = 730


@dataclass(frozen=True)
class Scale:
    """So many images; machines with so many workers and 10^9 bytes of memory, and their price an hour in any
    currency."""

    images: int
    machine_workers: int = 16
    machine_gb: float = 64.0
    price: float | None = None


def at_scale(config: Config, found: Estimate, scale: Scale) -> list[Line]:
    """The figures for a larger collection of images like those that were tried."""
    workers = max(1, config.pools.extract.workers or config.workers)
    channels = [(config.channels[name], trial) for name, trial in found.trials.items()]
    read = scale.images * found.num_bytes / max(found.num_images, 1) * len(channels)
    disk = scale.images * sum(trial.disk_bytes(channel) for channel, trial in channels)
    moved = read + scale.images * sum(_moved(channel, trial) for channel, trial in channels)
    extracting = scale.images * sum(trial.seconds for _, trial in channels) / workers
    building = scale.images * sum(_building(channel, trial) for channel, trial in channels) / workers
    published = scale.images * (ID_BYTES + sum(_published(channel, trial) for channel, trial in channels))
    partitions = math.ceil(published / (config.partition_megabytes * 1e6))
    pool = math.ceil(published / (MAPPED_SHARE * scale.machine_gb * 1e9))
    machines = math.ceil(workers / scale.machine_workers)
    lines = [
        Line("images", f"{scale.images:,}", "as asked; like the tried ones"),
        Line("bytes to read", in_bytes(read), "the mean of the listed ones, once for each channel"),
        Line("bytes moved", in_bytes(moved), "images; features written and read; entries written, read and merged"),
        Line("disk", in_bytes(disk), "features and entries of one version, with its partitions"),
        Line(
            "partitions", f"{partitions:,}", f"{in_bytes(published)} published, {config.partition_megabytes:,} MB each"
        ),
        Line("extraction", in_time(extracting), f"{workers:,} worker(s) as fast as this process"),
        Line("building and merging", in_time(building), f"slopes of benchmarks on one core, {workers:,} worker(s)"),
        Line("machines of the build", f"{machines:,}", f"{scale.machine_workers} workers each"),
        Line(
            "machines of the query pool",
            f"{pool:,}",
            f"all partitions mapped in {MAPPED_SHARE:.0%} of {scale.machine_gb:g} GB; without replicas",
        ),
    ]
    return lines if scale.price is None else [*lines, *_money(scale, machines, extracting + building, pool)]


def _money(scale: Scale, machines: int, seconds: float, pool: int) -> list[Line]:
    assert scale.price is not None
    hours = seconds / 3600
    return [
        Line(
            "price of the build", f"{machines * hours * scale.price:,.0f}", f"{machines:,} machine(s), {hours:,.1f} h"
        ),
        Line("price of the pool", f"{pool * HOURS_OF_MONTH * scale.price:,.0f} a month", f"{pool:,} machine(s)"),
    ]


def _published(channel: Channel, trial: Trial) -> float:
    """Bytes of an image in the files of a version."""
    features = trial.feature_bytes if channel.keep_features else 0.0
    return trial.entry_bytes + features + (trial.signature_bytes if channel.keep_signatures else 0.0)


def _moved(channel: Channel, trial: Trial) -> float:
    """Bytes of an image between workers and the store, but for the image itself."""
    features = trial.feature_bytes * (4 if channel.keep_features else 2)
    signatures = 3 * trial.signature_bytes if channel.keep_signatures else 0.0
    return features + 3 * trial.entry_bytes + signatures


def _building(channel: Channel, trial: Trial) -> float:
    """Seconds of an image."""
    return trial.features * BUILD_S_OF_FEATURE if channel.extractor.local else BUILD_S_OF_VECTOR
