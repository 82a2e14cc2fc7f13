"""What a run will need: images, bytes, memory, disk and time, each with the basis of its estimate."""

import itertools
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbir.collection import ImageShard, RawImage, read_images
from cbir.config import Channel, Config
from cbir.errors import DataError
from cbir.images import BadImage, decode
from cbir.types import FeatureBatch, ImageBatch, image_id
from pipelines.indexing import plan, read_asset
from pipelines.work import limit_threads

__all__ = ["Estimate", "Line", "estimate"]

TRIED_IMAGES = 16


@dataclass(frozen=True)
class Line:
    """One figure: what, how much in words, and how it is known."""

    what: str
    value: str
    basis: str


@dataclass(frozen=True)
class Estimate:
    """All that `cbir check` can tell before a run."""

    num_shards: int
    num_images: int
    num_bytes: int
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class _Trial:
    """What a few images cost in one channel: seconds and bytes per image."""

    seconds: float
    feature_bytes: float
    tried: int
    bad: int


def estimate(config: Config) -> Estimate:
    """List the collection and try a few of its images; nothing is written. ConfigError, DataError as `cbir index`."""
    limit_threads()
    shards = plan(config)
    raw = _some_images(config, shards)
    num_bytes = sum(shard.num_bytes for shard in shards)
    mean_bytes = max(1.0, float(np.mean([image.size for image in raw])))
    known = [shard.num_images for shard in shards]
    counted = all(number is not None for number in known)
    images = sum(number or 0 for number in known) if counted else round(num_bytes / (mean_bytes + 1024))
    trials = {name: _try(config, channel, name, raw) for name, channel in config.channels.items()}
    lines = [
        Line("shards", f"{len(shards):,}", "listed"),
        Line("images", f"{images:,}", "counted" if counted else f"bytes / the mean of {len(raw)} images + tar headers"),
        Line("bytes to read", _bytes(num_bytes * len(trials)), f"listed, once for each of {len(trials)} channel(s)"),
    ]
    for name, trial in trials.items():
        lines += _channel_lines(config, name, trial, images)
    lines.append(_memory_line(config, trials))
    return Estimate(len(shards), images, num_bytes, tuple(lines))


def _some_images(config: Config, shards: Sequence[ImageShard]) -> list[RawImage]:
    limit = int(config.limits.megabytes * 1e6)
    images = (image for shard in shards for image in read_images(shard, config.input, limit))
    found = list(itertools.islice((image for image in images if image.data is not None), TRIED_IMAGES))
    if not found:
        raise DataError(f"no readable image under {', '.join(config.images)}")
    return found


def _try(config: Config, channel: Channel, name: str, raw: Sequence[RawImage]) -> _Trial:
    spec = channel.extractor
    with tempfile.TemporaryDirectory(prefix="cbir-") as folder:
        files = {}
        for field, uri in spec.assets.items():
            files[field] = Path(folder) / f"{field}{Path(uri).suffix}"
            files[field].write_bytes(read_asset(uri, f"channels.{name}.extractor.{field}"))
        extractor = spec.build("cpu", files)
    extractor.extract(ImageBatch(np.empty(0, np.int64), [], np.empty((0, 2), np.int32)))
    start = time.perf_counter()
    decoded = [(image, decode(image.data or b"", spec.view, config.limits)) for image in raw]
    good = [(image, result) for image, result in decoded if not isinstance(result, BadImage)]
    parts: list[FeatureBatch] = []
    for first in range(0, len(good), spec.batch_size):
        some = good[first : first + spec.batch_size]
        ids = np.array([image_id(image.key) for image, _ in some], np.int64)
        sizes = np.array([result.size for _, result in some], np.int32)
        parts.append(extractor.extract(ImageBatch(ids, [result.pixels for _, result in some], sizes)))
    seconds = time.perf_counter() - start
    stored = sum(part.descriptors.nbytes + part.geometry.nbytes for part in parts)
    return _Trial(seconds / len(raw), stored / max(len(good), 1), len(raw), len(raw) - len(good))


def _channel_lines(config: Config, name: str, trial: _Trial, images: int) -> list[Line]:
    workers = max(1, config.pools.extract.workers or config.workers)
    basis = f"{trial.tried} images tried in this process"
    gpu = "; the pool has GPUs, expect less" if config.pools.extract.gpus else ""
    copies = 2 if config.channels[name].keep_features else 1
    stored = trial.feature_bytes * images * copies
    what = f"{name}: "
    return [
        Line(what + "extraction", _time(trial.seconds * images / workers), f"{basis}, {workers} worker(s){gpu}"),
        Line(
            what + "features on disk", _bytes(stored), f"{basis}, {copies} time(s) {_bytes(trial.feature_bytes)} each"
        ),
    ]


def _memory_line(config: Config, trials: dict[str, _Trial]) -> Line:
    """A training worker holds the whole sample as float32, every process the libraries and models of this one."""
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sample = 0.0
    for trial in trials.values():
        sample = max(sample, min(config.sample.images * trial.feature_bytes, config.sample.features * 512.0))
    total = here * max(1, config.workers) + 4 * sample
    basis = f"{_bytes(here)} for each of {max(1, config.workers)} process(es), as this one, and 4 x the largest sample"
    return Line("memory", _bytes(total), basis)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
