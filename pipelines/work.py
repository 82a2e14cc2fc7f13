"""A unit of work, and the worker that does it.

A task is plain data: it travels to a worker process (or stays in this one), does one piece of one stage and leaves its
outputs and a DONE record in the store. Pixels and descriptors never travel between processes, only tasks and reports.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from threadpoolctl import threadpool_limits

from cbir.artifacts import Done, StoredFile, create_done, find_done, put_part, stage_prefix
from cbir.config import Channel, assets_of
from cbir.errors import CbirError, StorageError
from cbir.features.describer import Describer
from cbir.images import Decoder, Limits, View
from cbir.index.nearest import compute_on
from cbir.spec import Method, fingerprint
from cbir.storage import DISK_FULL, Store, open_store

__all__ = ["Asset", "Report", "Task", "Timer", "Worker", "limit_threads"]

PHASES = ("read", "decode", "device", "write")

T = TypeVar("T")

_CACHED = 8


class Timer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


@dataclass(frozen=True)
class Report:
    """What a worker tells the driver about a finished task; its processor time is without that of child processes."""

    done: Done
    seconds: Mapping[str, float]
    wall_s: float = 0.0
    tally: Mapping[str, int] = field(default_factory=dict)
    """What it took, where the record cannot tell: images `described`, and images `recalled` from an earlier version."""
    processor_s: float = 0.0


@dataclass(frozen=True)
class Asset:
    """A file that a method needs, kept in the store by its content, so that a version is self-contained."""

    key: str
    sha256: str


class Worker:
    """One process that does tasks: its store, its device, and what is worth keeping between tasks."""

    def __init__(self, store_uri: str, device: str = "cpu") -> None:
        limit_threads()
        self.store: Store = open_store(store_uri)
        self.device = device
        if device != "cpu":
            compute_on(device)
        self.timer = Timer()
        self.tally: Counter[str] = Counter()
        _remove_scratch_of_the_dead()
        self._scratch = tempfile.TemporaryDirectory(prefix=f"cbir-{os.getpid()}-")
        self._cache: dict[Hashable, object] = {}
        self._decoders: dict[tuple[View, Limits], Decoder] = {}

    def do(self, task: "Task") -> Report:
        """Do a task, unless its record says that it is done; an expected error comes with the name of the task."""
        self.timer, self.tally = Timer(), Counter()
        start, processor = time.perf_counter(), time.process_time()
        try:
            done = find_done(self.store, task.stage, task.fingerprint) or task.run(self)
        except CbirError as error:
            raise type(error)(f"{task.stage} {task.name}: {error}") from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise StorageError(
                f"{task.stage} {task.name}: no space is left for temporary files in {self._scratch.name} "
                f"({os.strerror(error.errno)}); free some, or set TMPDIR to a larger folder, and run again"
            ) from error
        wall_s, processor_s = time.perf_counter() - start, time.process_time() - processor
        return Report(done, self.timer.seconds, wall_s, dict(self.tally), processor_s)

    def describer(self, work: "ChannelWork") -> Describer:
        """The working extractor, mask and proposer of a channel, built at their first use in this process."""

        def build() -> Describer:
            paths = {name: self.fetch(asset.key, asset.sha256) for name, asset in work.assets.items()}
            return work.channel.describer(self.device, paths)

        return self.cached(("describer", fingerprint(work.extractor_identity())), build)

    def decoder(self, view: View, limits: Limits) -> Decoder:
        """The decoder for this view, with its child process, kept between tasks."""
        if (view, limits) not in self._decoders:
            self._decoders[view, limits] = Decoder(view, limits)
        return self._decoders[view, limits]

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this key in this process; made again if it was long unused."""
        if key not in self._cache:
            while len(self._cache) >= _CACHED:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = make()
        else:
            self._cache[key] = self._cache.pop(key)
        return cast(T, self._cache[key])

    def fetch(self, key: str, sha256: str) -> Path:
        """A file of the store as a local file."""
        local = self.store.local_path(key)
        if local is not None:
            return local
        target = self.scratch(f"{sha256}.{key.rsplit('.', 1)[-1]}")
        return target if target.exists() else self.store.fetch(key, target, sha256)

    def scratch(self, name: str) -> Path:
        """A place for a temporary file of this worker."""
        return Path(self._scratch.name) / name

    def close(self) -> None:
        """End the child processes and delete the temporary files."""
        for decoder in self._decoders.values():
            decoder.close()
        self._scratch.cleanup()


def _remove_scratch_of_the_dead() -> None:
    """Delete what killed workers of this machine could not."""
    for folder in Path(tempfile.gettempdir()).glob("cbir-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Task(ABC):
    """One piece of one stage; `fingerprint` covers everything that its outputs depend on."""

    stage: ClassVar[str]
    name: str
    """What to call it in progress and errors."""
    fingerprint: str

    @abstractmethod
    def run(self, worker: Worker) -> Done:
        """Do it and commit its record."""

    @property
    def weight(self) -> int:
        """How long it takes beside the other tasks of its stage, in any unit; the longest are begun first."""
        return 0

    @property
    def prefix(self) -> str:
        """Where its outputs lie."""
        return stage_prefix(self.stage, self.fingerprint)

    def put(self, worker: Worker, role: str, data: bytes | Path, suffix: str) -> StoredFile:
        """Write one output."""
        with worker.timer.phase("write"):
            return put_part(worker.store, self.stage, self.fingerprint, role, data, suffix)

    def finish(
        self, worker: Worker, files: list[StoredFile], counts: Mapping[str, int], facts: Mapping[str, Any] | None = None
    ) -> Done:
        """Commit the record of this task."""
        with worker.timer.phase("write"):
            done = Done(self.stage, self.fingerprint, tuple(files), dict(counts), dict(facts or {}))
            return create_done(worker.store, done)


@dataclass(frozen=True)
class ChannelWork:
    """A channel as tasks carry it: its name, its settings, its files, named as by `Channel.assets`, and, if it is not
    to be trained, the trained states of its encoders and, last, of its index."""

    name: str
    channel: Channel
    assets: Mapping[str, Asset] = field(default_factory=dict)
    states: tuple[Asset, ...] = ()

    def extractor_identity(self) -> dict[str, Any]:
        """What identifies the extractor, and mask and proposer where there are: their settings, with the content of
        their files instead of paths."""
        channel = self.channel
        more = {spec.role: self._identity(spec.role, spec) for spec in (channel.mask, channel.proposer) if spec}
        return {**self._identity("extractor", channel.extractor), **more}

    def _identity(self, part: str, spec: Method) -> dict[str, Any]:
        return {**spec.identity(), **{name: asset.sha256 for name, asset in assets_of(part, self.assets).items()}}

    def training_identity(self) -> dict[str, Any]:
        """What identifies the encoders and the index, with the content of the encoders' files instead of paths."""
        encoders = enumerate(self.channel.encoders)
        return {
            "encoders": [self._identity(f"encoders.{position}", encoder) for position, encoder in encoders],
            "index": self.channel.index.identity(),
        }


def limit_threads() -> None:
    """One thread for every library that would take more: parallelism is over processes.

    Two OpenMP threads of faiss on a loaded machine cost up to 30 times the processor time of one.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = "1"
    import cv2
    import faiss  # noqa: F401 - its OpenMP must be loaded to be limited

    cv2.setNumThreads(1)
    threadpool_limits(1)
    if "torch" in sys.modules:  # else it will read the environment, if it is needed at all; importing it takes a second
        import torch

        torch.set_num_threads(1)
