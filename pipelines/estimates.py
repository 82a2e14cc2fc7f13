"""What a run will need: images, bytes, memory, disk and time, each with the basis of its estimate."""

import itertools
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbir.collection import ImageShard, RawImage, read_images, read_vectors
from cbir.config import Channel, Config, Pool
from cbir.errors import DataError
from cbir.features.describer import Describer
from cbir.features.vectors import Vectors
from cbir.images import BadImage, decode
from cbir.types import FeatureBatch, ImageBatch, image_id
from pipelines.assets import check_codebooks, read_assets
from pipelines.plans import plan
from pipelines.work import limit_threads

__all__ = ["Estimate", "Line", "Trial", "estimate", "in_bytes", "in_time"]

TRIED_IMAGES = 16
TRIED_PER_SHARD = 4
TAR_HEADER_BYTES = 1024
TRAINING_COPIES = 4
"""How often training holds its sample at the peak: as stored, sorted, as float32 and encoded."""


@dataclass(frozen=True)
class Line:
    """One figure: what, how much in words, and how it is known."""

    what: str
    value: str
    basis: str


@dataclass(frozen=True)
class Trial:
    """What an image costs in one channel, as the mean of a few that were tried."""

    tried: int
    bad: int
    seconds: float
    features: float
    feature_bytes: float
    entry_bytes: float
    signature_bytes: float
    """If signatures are kept: a code of one bit per dimension, a word and a place for every feature."""

    def disk_bytes(self, channel: Channel) -> float:
        """Of the features, which are stored for re-use and perhaps once more for the reranker, and of the index.

        Vectors lie in the entries of every shard and in the merged partitions.
        """
        signatures = 2 * self.signature_bytes if channel.keep_signatures else 0
        return self.feature_bytes * (2 if channel.keep_features else 1) + 2 * self.entry_bytes + signatures


@dataclass(frozen=True)
class Estimate:
    """All that `cbir check` can tell before a run."""

    num_shards: int
    num_images: int
    num_bytes: int
    disk_bytes: float
    memory_bytes: float
    seconds: float
    trials: Mapping[str, Trial]
    """By channel."""
    lines: tuple[Line, ...]


def estimate(config: Config) -> Estimate:
    """List the collection and try a few of its images; nothing is written. ConfigError, DataError as `cbir index`."""
    limit_threads()
    shards = plan(config)
    for name in config.channels:
        check_codebooks(config, name)
    if config.input.format == "vectors":
        raw: list[RawImage] = []
        trials = {name: _try_vectors(channel, config, shards[0]) for name, channel in config.channels.items()}
    else:
        raw = _some_images(config, shards)
        trials = {name: _try(channel, config, name, raw) for name, channel in config.channels.items()}
    num_bytes = sum(shard.num_bytes for shard in shards)
    images, counted = _count(shards, raw)
    disk = {name: images * trial.disk_bytes(config.channels[name]) for name, trial in trials.items()}
    workers = _num_workers(config, config.pools.extract)
    seconds = {name: images * trial.seconds / workers for name, trial in trials.items()}
    memory, memory_basis = _memory(config, trials, images)
    lines = [
        Line("shards", f"{len(shards):,}", "listed"),
        Line("images", f"{images:,}", counted),
        Line("bytes to read", in_bytes(num_bytes * len(trials)), f"listed, once for each of {len(trials)} channel(s)"),
        *(_disk_line(config, name, trial, disk[name]) for name, trial in trials.items()),
        *(_time_line(config, name, trial, seconds[name], workers) for name, trial in trials.items()),
        Line("disk", in_bytes(sum(disk.values())), "all channels; every version of other settings needs its own"),
        Line("memory", in_bytes(memory), memory_basis),
        Line("time", in_time(sum(seconds.values())), "extraction alone; training, building and merging come on top"),
    ]
    return Estimate(
        len(shards), images, num_bytes, sum(disk.values()), memory, sum(seconds.values()), trials, tuple(lines)
    )


def _count(shards: Sequence[ImageShard], raw: Sequence[RawImage]) -> tuple[int, str]:
    """How many images there are, and how that is known."""
    known = [shard.num_images for shard in shards if shard.num_images is not None]
    if len(known) == len(shards):
        return sum(known), "counted"
    unknown_bytes = sum(shard.num_bytes for shard in shards if shard.num_images is None)
    mean_bytes = float(np.mean([image.size for image in raw])) + TAR_HEADER_BYTES
    return sum(known) + round(
        unknown_bytes / mean_bytes
    ), f"bytes / the mean of {len(raw)} images and their tar headers"


def _some_images(config: Config, shards: Sequence[ImageShard]) -> list[RawImage]:
    """A few images from shards all over the collection, which may be sorted by what they show."""
    step = max(1, len(shards) * TRIED_PER_SHARD // TRIED_IMAGES)
    spread = [shard for start in range(step) for shard in shards[start::step]]
    images = (image for shard in spread for image in _first_images(config, shard))
    found = list(itertools.islice(images, TRIED_IMAGES))
    if not found:
        raise DataError(f"no readable image under {', '.join(config.images)}")
    return found


def _first_images(config: Config, shard: ImageShard) -> Iterator[RawImage]:
    images = read_images(shard, config.input, int(config.limits.megabytes * 1e6))
    return itertools.islice((image for image in images if image.data is not None), TRIED_PER_SHARD)


def _try(channel: Channel, config: Config, name: str, raw: Sequence[RawImage]) -> Trial:
    """Decode and extract in this process."""
    describer = _build(channel, f"channels.{name}")
    start = time.perf_counter()
    decoded = [(image.key, decode(image.data or b"", channel.extractor.view, config.limits)) for image in raw]
    good = [(key, result) for key, result in decoded if not isinstance(result, BadImage)]
    size = channel.extractor.batch_size
    parts = [_no_features(describer)]
    for first in range(0, len(good), size):
        some = good[first : first + size]
        ids = np.array([image_id(key) for key, _ in some], np.int64)
        sizes = np.array([result.size for _, result in some], np.int32)
        parts.append(describer.describe(ImageBatch(ids, [result.pixels for _, result in some], sizes)))
    seconds = time.perf_counter() - start
    return _trial(channel, FeatureBatch.concatenate(parts), seconds, len(raw))


def _try_vectors(channel: Channel, config: Config, shard: ImageShard) -> Trial:
    """Read the first vectors of a shard."""
    spec = channel.extractor
    assert isinstance(spec, Vectors)
    start = time.perf_counter()
    rows = next(read_vectors(shard, config.input, spec.dim, spec.dtype), None)
    if rows is None:
        raise DataError(f"no vector in {shard.name}")
    ids = np.array([image_id(key) for key in rows.keys], np.int64)
    features = FeatureBatch.of_global(ids, rows.vectors).take(np.flatnonzero([not reason for reason in rows.reasons]))
    return _trial(channel, features, time.perf_counter() - start, len(rows.keys))


def _build(channel: Channel, path: str) -> Describer:
    """Extractor, mask and proposer on this process's CPU."""
    with tempfile.TemporaryDirectory(prefix="cbir-") as folder:
        files = {}
        for name, suffix, data in read_assets(channel, path):
            files[name] = Path(folder) / f"{name}{suffix}"
            files[name].write_bytes(data)
        return channel.describer("cpu", files)


def _no_features(describer: Describer) -> FeatureBatch:
    return describer.describe(ImageBatch(np.empty(0, np.int64), [], np.empty((0, 2), np.int32)))


def _trial(channel: Channel, features: FeatureBatch, seconds: float, tried: int) -> Trial:
    """What the images cost in features and index entries, by what the encoders' settings say about their output."""
    good = max(len(features), 1)
    dim, rows = features.descriptors.shape[1], math.ceil(len(features.descriptors) / good)
    boxes = features.regions.boxes if features.regions is not None else np.empty((0, 4), np.float32)
    for encoder in channel.encoders:
        dim = encoder.output_dim(dim)
        rows = math.ceil(len(boxes) / good) if encoder.rows_are_regions else encoder.output_rows(rows)
    return Trial(
        tried=tried,
        bad=tried - len(features),
        seconds=seconds / tried,
        features=len(features.descriptors) / good,
        feature_bytes=(features.descriptors.nbytes + features.geometry.nbytes + boxes.nbytes) / good,
        entry_bytes=rows * channel.index.entry_bytes(dim),
        signature_bytes=rows * (dim / 8 + 4 * (1 + features.geometry.shape[1])),
    )


def _num_workers(config: Config, pool: Pool) -> int:
    return max(1, pool.workers or config.workers)


def _disk_line(config: Config, name: str, trial: Trial, total: float) -> Line:
    copies = "2 x" if config.channels[name].keep_features else "1 x"
    basis = (
        f"per image {copies} {in_bytes(trial.feature_bytes)} of features, 2 x {in_bytes(trial.entry_bytes)} of index"
    )
    if config.channels[name].keep_signatures:
        basis += f", 2 x {in_bytes(trial.signature_bytes)} of signatures"
    return Line(f"{name}: disk", in_bytes(total), f"{basis}; {trial.tried} images tried")


def _time_line(config: Config, name: str, trial: Trial, seconds: float, workers: int) -> Line:
    bad = f", {trial.bad} of them cannot be used" if trial.bad else ""
    gpu = "; the pool has GPUs, expect less" if config.pools.extract.gpus else ""
    basis = f"{_milliseconds(trial.seconds)} per image in this process, {workers} worker(s)"
    return Line(f"{name}: extraction", in_time(seconds), f"{basis}; {trial.tried} images tried{bad}{gpu}")


def _memory(config: Config, trials: Mapping[str, Trial], images: int) -> tuple[float, str]:
    """Every process holds the libraries and models of this one; one of them trains on the whole sample."""
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    processes = max(_num_workers(config, pool) for pool in (config.pools.extract, config.pools.build))
    samples = [0.0]
    for trial in trials.values():
        share = min(1, config.sample.images / images, config.sample.features / max(images * trial.features, 1))
        samples.append(share * images * trial.feature_bytes)
    sample = max(samples)
    basis = (
        f"{processes} process(es) of {in_bytes(here)}, as this one; {TRAINING_COPIES} x a sample of {in_bytes(sample)}"
    )
    return here * processes + TRAINING_COPIES * sample, basis


def in_bytes(number: float) -> str:
    """For people: 1.5 GB are 1,500,000,000 bytes."""
    units = iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while number >= 1000 and unit != "PB":
        number, unit = number / 1000, next(units)
    return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def in_time(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
