"""The history of an index: each run leaves one record in the store, also one that failed or was interrupted.

    runs/<UTC time>-<id>.json     the newest 1,000; gc leaves them alone

A record that cannot be written is a warning, never the end of a run. A run that was killed has no last word: its record
says `running` until nobody has renewed it for a while, and `lost` from then on.
"""

import calendar
import contextlib
import importlib.metadata
import json
import resource
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cbir.artifacts import dump_json, load_json, sha256_of
from cbir.errors import ArtifactError, CbirError, ObjectMissing
from cbir.storage import Store
from cbir.versions import Versions
from pipelines.logs import without_secrets

if TYPE_CHECKING:
    from cbir.versions import Manifest
    from pipelines.progress import LineProgress, StageFigures
    from pipelines.work import Report, Task

__all__ = ["KEPT_RUNS", "RunHistory", "RunRecord", "WatchedRun"]

FORMAT = 1
KEPT_RUNS = 1000
RENEW_EVERY_S = 60.0
LOST_AFTER_S = 600.0

_AREA = "runs/"
_LONGEST_ERROR = 2000
_FIRST_STAGE = "plan"


class WatchedRun:
    """A run that is under way: who watches it hears everything from here, and what is known of it is kept.

    It passes what it is told on to the display. `counted` and `decided` are for what a run finds out about itself.
    Workers of another machine say how much processor time they took, without that of their decoders.
    """

    def __init__(self, command: str, store_uri: str, display: "LineProgress", *, is_remote: bool = False) -> None:
        self.command, self.store_uri = command, without_secrets(store_uri)
        self.counts: dict[str, int] = {}
        self.decisions: dict[str, dict[str, Any]] = {}
        self.version: int | None = None
        self.version_before: int | None = None
        self.outcome, self.error = "running", ""
        self.started = time.time()
        self._ended: float | None = None
        self._display, self._is_remote = display, is_remote
        self._processor_before = _processor_s()

    def stage(self, name: str, num_tasks: int | None) -> None:
        """A stage begins."""
        self._display.stage(name, num_tasks)

    def report(self, task: "Task", report: "Report", *, reused: bool) -> None:
        """A task has ended, or was found done."""
        self._display.report(task, report, reused=reused)

    def tick(self) -> None:
        """About a second has passed."""
        self._display.tick()

    def say(self, text: str) -> None:
        """Something worth a line."""
        self._display.say(text)

    def counted(self, **counts: int) -> None:
        """So many images are new, changed, deleted ..."""
        self.counts |= counts

    def decided(self, what: str, choice: str, **figures: float) -> None:
        """What was chosen for a channel, such as to append or to retrain, and the figures that spoke for it."""
        self.decisions[what] = {"choice": choice, **figures}

    def published(self, manifest: "Manifest") -> None:
        """It came to this version, which may be the one that was current before."""
        self.version = manifest.version
        self.counts = dict(manifest.counts) | self.counts
        self.outcome = "unchanged" if manifest.version == self.version_before else "published"

    def ended(self, error: BaseException | None) -> None:
        """It is over, with this error or without."""
        self._display.end_stage()
        self._ended = time.time()
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            self.outcome = "interrupted" if interrupted else "failed"
            text = str(error) if isinstance(error, CbirError) else f"{type(error).__name__}: {error}".rstrip(": ")
            self.error = _shortened(text)
        elif self.outcome == "running":
            self.outcome = "done"

    @property
    def stages(self) -> "list[StageFigures]":
        """The figures of its stages so far."""
        return self._display.stages

    @property
    def wall_s(self) -> float:
        """Seconds since it began, or that it took."""
        return (self._ended or time.time()) - self.started

    @property
    def is_at_work(self) -> bool:
        """Whether it has come further than to look at its input."""
        return any(stage.name != _FIRST_STAGE for stage in self.stages)

    @property
    def reused_share(self) -> float | None:
        """The share of the images whose features were there already; None if none were wanted."""
        extracts = [stage for stage in self.stages if stage.name == "extract"]
        wanted = sum(stage.images + stage.found_images for stage in extracts)
        return sum(stage.reused_images for stage in extracts) / wanted if wanted else None

    def to_json(self) -> dict[str, Any]:
        """The record as it stands."""
        remote = sum(stage.processor_s for stage in self.stages) if self._is_remote else 0.0
        return {
            "format": FORMAT,
            "cbir": importlib.metadata.version("cbir"),
            "command": self.command,
            "started": _utc(self.started),
            "renewed": _utc(time.time()),
            "wall_s": round(self.wall_s, 3),
            "worker_s": round(sum(stage.worker_s for stage in self.stages), 3),
            "processor_s": round(_processor_s() - self._processor_before + remote, 3),
            "outcome": self.outcome,
            "error": self.error,
            "version": self.version,
            "counts": self.counts,
            "decisions": self.decisions,
            "reused_share": self.reused_share,
            "stages": [stage.to_json() for stage in list(self.stages)],
        }


def _processor_s() -> float:
    """Processor time of this process, and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _utc(instant: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(instant))


def _shortened(text: str) -> str:
    """Without the middle of what is very long, such as a worker's traceback."""
    half = _LONGEST_ERROR // 2
    return text if len(text) <= _LONGEST_ERROR else f"{text[:half]} ... {text[-half:]}"


class RunRecord:
    """The record of one run in its store, renewed while it is under way.

    Nothing is written for a run that ends before it has begun to work in a store without any version, so that a wrong
    name makes no store.
    """

    def __init__(self, history: "RunHistory", run: WatchedRun) -> None:
        self._history, self._run = history, run
        second, part = time.strftime("%Y%m%dT%H%M%S", time.gmtime(run.started)), int(1000 * (run.started % 1))
        self._key = f"{_AREA}{second}.{part:03d}Z-{uuid.uuid4().hex[:8]}.json"
        self._renewed = -RENEW_EVERY_S

    def begin(self) -> None:
        """Look which version is current before the run."""
        with contextlib.suppress(CbirError, OSError):  # the run will say so itself
            current = Versions(self._history.store).current()
            self._run.version_before = current.version if current is not None else None

    def tick(self) -> None:
        """About a second has passed."""
        if self._run.is_at_work and time.monotonic() - self._renewed >= RENEW_EVERY_S:
            self._renewed = time.monotonic()
            with contextlib.suppress(CbirError, OSError):  # the last word is what counts
                self._history.write(self._key, self._run.to_json())

    def end(self) -> None:
        """Write the last word, and forget the oldest runs."""
        if not self._run.is_at_work and self._run.version_before is None:
            return
        try:
            self._history.write(self._key, self._run.to_json())
            self._history.forget_oldest()
        except (CbirError, OSError) as error:
            self._run.say(f"warning: this run is missing in the history of {self._run.store_uri}: {error}")


class RunHistory:
    """The records of all runs of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Put or replace a record, with the sha256 of the rest of it, and without credentials of the environment."""
        clean = json.loads(without_secrets(json.dumps(record, default=_plain)))
        self.store.write(key, dump_json({**clean, "sha256": sha256_of(dump_json(clean))}))

    def forget_oldest(self) -> None:
        """Keep the newest `KEPT_RUNS`; the keys rise with the time."""
        keys = [info.key for info in self.store.list(_AREA)]
        for key in keys[:-KEPT_RUNS]:
            self.store.delete(key)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, oldest first, each with its `id`; of one that is damaged, outcome and error say so."""
        keys = [info.key for info in self.store.list(_AREA)]
        with ThreadPoolExecutor(16) as threads:
            for key, record in zip(keys, threads.map(self._read, keys), strict=True):
                if record is not None:
                    yield {"id": key.removeprefix(_AREA).removesuffix(".json"), **record}

    def _read(self, key: str) -> dict[str, Any] | None:
        """None for one that was forgotten in the meantime."""
        try:
            record = load_json(self.store.read(key), self.store.place(key))
            if record.pop("sha256") != sha256_of(dump_json(record)):
                raise ArtifactError(f"{self.store.place(key)} is not as it was written")
            if record["format"] != FORMAT:
                return {"outcome": "unreadable", "error": f"format {record['format']}: update cbir"}
            if record["outcome"] == "running" and _age_s(record["renewed"]) > LOST_AFTER_S:
                record["outcome"] = "lost"
        except ObjectMissing:
            return None
        except (ArtifactError, KeyError, ValueError):
            return {"outcome": "unreadable", "error": f"{self.store.place(key)} is damaged; delete it"}
        return record


def _age_s(instant: str) -> float:
    return time.time() - calendar.timegm(time.strptime(instant, "%Y-%m-%dT%H:%M:%SZ"))


def _plain(value: Any) -> Any:
    """A number of numpy as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)
