"""A pool of query actors: each holds some partitions of the published version, memory-mapped, and swaps in memory.

The same `Searcher` as in one process does the work; here its partitions live in actors. A query takes all its
partitions from one version: the searcher that it starts with. `refresh` opens a newer version beside the one that
answers and swaps the searcher when every actor has it, so that no query fails or sees a mixture. The version before is
closed when its last query has ended.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from cbir.artifacts import sha256_of
from cbir.config import Config, parse_config
from cbir.errors import CbirError, ConfigError
from cbir.layout import Layout
from cbir.partition import LocalFiles, Partition
from cbir.queries import Box, QueryEncoder
from cbir.search import Answer, Result, Searcher
from cbir.storage import open_store
from cbir.types import FeatureBatch, Hits, Int64s
from cbir.versions import Manifest, Versions
from pipelines.cluster import connect, ray

__all__ = ["QueryPool"]

T = TypeVar("T")

_CALLS_AT_ONCE = 64
_RETRIES = 3


@dataclass(frozen=True)
class _Opening:
    """One opening of a version. A version that is opened again (roll-back) while old queries still use it is another
    opening, so that their end closes nothing but their own."""

    serial: int
    version: int
    manifest_sha256: str


class _Holder:
    """Partitions by opening, in a process of their own. Ray gives it as many OpenMP threads as it has processors.

    It opens what it is asked for and does not hold yet, so that an actor which died and was started again goes on.
    """

    def __init__(self, store_uri: str) -> None:
        self._store = open_store(store_uri)
        self._partitions: dict[_Opening, dict[int, Partition]] = {}

    def open(self, opening: _Opening, numbers: Sequence[int]) -> None:
        """Open these partitions of a version."""
        held = self._partitions.setdefault(opening, {})
        missing = [number for number in numbers if number not in held]
        if missing:
            manifest = Versions(self._store).load(opening.version, opening.manifest_sha256)
            config, layout = _parsed(manifest)
            files = LocalFiles(self._store, manifest)
            held.update({number: Partition(config, layout.partitions[number], files) for number in missing})

    def call(self, opening: _Opening, number: int, method: str, arguments: Sequence[Any]) -> Any:
        """Call a method of one partition."""
        self.open(opening, [number])
        return getattr(self._partitions[opening][number], method)(*arguments)

    def close(self, opening: _Opening) -> None:
        """Let go of what no query uses any more."""
        self._partitions.pop(opening, None)

    def versions(self) -> list[int]:
        """The versions that it holds, in the order in which they were opened."""
        return [opening.version for opening in sorted(self._partitions, key=lambda opening: opening.serial)]


def _parsed(manifest: Manifest) -> tuple[Config, Layout]:
    return parse_config(manifest.config, f"version {manifest.version}"), Layout.from_json(manifest.layout)


@dataclass(frozen=True)
class _RemotePartition:
    """A partition that lives in an actor; what `cbir.search` calls `PartitionLike`."""

    low: int
    actor: Any
    opening: _Opening
    number: int

    def _call(self, method: str, *arguments: Any) -> Any:
        """The method's result, or its own error."""
        try:
            return ray.get(self.actor.call.remote(self.opening, self.number, method, arguments))
        except ray.exceptions.RayTaskError as error:
            raise _own_error(error) from None

    def search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Mapping[str, Hits]:
        """Hits by channel for encoded queries by channel."""
        hits: Mapping[str, Hits] = self._call("search", dict(queries), depth)
        return hits

    def matches(self, queries: Mapping[str, FeatureBatch]) -> Mapping[str, Int64s]:
        """How much each row of the encoded queries matches, by channel."""
        matches: Mapping[str, Int64s] = self._call("matches", dict(queries))
        return matches

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of these images."""
        batch: FeatureBatch = self._call("features", channel, image_ids)
        return batch

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored signatures of these images."""
        batch: FeatureBatch = self._call("signatures", channel, image_ids)
        return batch

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The rows of the id map of these images."""
        rows: list[dict[str, Any]] = self._call("records", image_ids)
        return rows

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition."""
        keys: dict[int, str] = self._call("keys")
        return keys


def _own_error(error: Any) -> Exception:
    """An expected error as the actor raised it; any other with the actor's traceback."""
    own: Exception = error.cause if isinstance(error.cause, CbirError) else error
    return own


class _ParallelSearcher(Searcher):
    """A searcher that asks its partitions all at once."""

    def __init__(self, manifest: Manifest, config: Config, encoder: QueryEncoder, parts: Sequence[_RemotePartition]):
        super().__init__(manifest, config, encoder, parts)
        self._threads = ThreadPoolExecutor(min(_CALLS_AT_ONCE, 4 * len(parts)))

    def _ask(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        return list(self._threads.map(lambda call: call(), calls))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)


@dataclass
class _Opened:
    """An opening with its searcher and the number of queries that are under way on it."""

    opening: _Opening
    searcher: _ParallelSearcher
    queries: int = 0


class QueryPool:
    """Answers queries with the published version of a store; safe to use from several threads.

    `num_actors` actors of `cpus` processors each share the partitions, on the Ray cluster at `address` or on one that
    is started on this machine. Queries are encoded in the caller's process. An actor that dies is started again.
    ConfigError if the cluster has no room for the actors within `start_s` seconds.
    """

    def __init__(
        self,
        store_uri: str,
        num_actors: int = 1,
        cpus: float = 1.0,
        address: str | None = None,
        start_s: float = 300.0,
    ) -> None:
        self._store = open_store(store_uri)
        manifest = Versions(self._store).load()
        self._serials = itertools.count()
        self._refreshing = threading.Lock()
        self._counting = threading.Lock()
        self._started_ray = connect(address, max(1, round(num_actors * cpus)))
        actor = ray.remote(_Holder).options(num_cpus=cpus, max_restarts=-1, max_task_retries=_RETRIES)
        self._actors = [actor.remote(store_uri) for _ in range(num_actors)]
        with contextlib.ExitStack() as undo:
            undo.callback(self._end_actors)
            self._await_actors(start_s)
            self._current = self._open(manifest)
            undo.pop_all()

    def _await_actors(self, seconds: float) -> None:
        try:
            ray.get([actor.versions.remote() for actor in self._actors], timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                f"the Ray cluster had no room for {len(self._actors)} query actor(s) within {seconds:g} s: it has "
                f"{ray.cluster_resources().get('CPU', 0):g} processors; ask for fewer, or end what else runs there"
            ) from None

    @property
    def version(self) -> int:
        """The version that new queries use."""
        return self._current.opening.version

    def held_versions(self) -> list[list[int]]:
        """The versions that each actor holds now: the one in use, and older ones whose queries have not ended."""
        held: list[list[int]] = ray.get([actor.versions.remote() for actor in self._actors])
        return held

    def refresh(self) -> bool:
        """Swap to the version that CURRENT names; False if it is the one in use. Queries go on meanwhile.

        If the new version cannot be opened, the one in use stays, and the error says why.
        """
        with self._refreshing:
            manifest = Versions(self._store).load()
            if manifest.version == self.version:
                return False
            opened = self._open(manifest)
            with self._counting:
                before, self._current = self._current, opened
                self._close_if_unused(before)
            return True

    def _open(self, manifest: Manifest) -> _Opened:
        opening = _Opening(next(self._serials), manifest.version, sha256_of(manifest.to_json()))
        config, layout = _parsed(manifest)
        encoder = QueryEncoder(config, layout, LocalFiles(self._store, manifest))
        parts = [
            _RemotePartition(part.low, self._actors[number % len(self._actors)], opening, number)
            for number, part in enumerate(layout.partitions)
        ]
        with contextlib.ExitStack() as undo:
            undo.callback(self._close_in_actors, opening)
            self._open_in_actors(opening, len(parts))
            undo.pop_all()
        return _Opened(opening, _ParallelSearcher(manifest, config, encoder, parts))

    def _open_in_actors(self, opening: _Opening, num_partitions: int) -> None:
        step = len(self._actors)
        shares = [list(range(first, num_partitions, step)) for first in range(step)]
        try:
            ray.get([actor.open.remote(opening, share) for actor, share in zip(self._actors, shares, strict=True)])
        except ray.exceptions.RayTaskError as error:
            raise _own_error(error) from None

    def _close_in_actors(self, opening: _Opening) -> None:
        for actor in self._actors:
            actor.close.remote(opening)

    def _close_if_unused(self, opened: _Opened) -> None:
        """To be called with `_counting` held; no query can begin on a version that is not the current one."""
        if opened is not self._current and not opened.queries:
            opened.searcher.close()
            self._close_in_actors(opened.opening)

    @contextlib.contextmanager
    def _query(self) -> Iterator[Searcher]:
        """The searcher of the current version, which stays open until the block ends."""
        with self._counting:
            opened = self._current
            opened.queries += 1
        try:
            yield opened.searcher
        finally:
            with self._counting:
                opened.queries -= 1
                self._close_if_unused(opened)

    def search(self, picture: bytes | str | Path, depth: int = 10, box: Box | None = None) -> list[Result]:
        """The best `depth` images for one picture, or for a box in it."""
        with self._query() as searcher:
            return searcher.search(picture, depth, box)

    def answer(
        self, pictures: Sequence[bytes | str | Path], boxes: Sequence[Box | None] | None = None, depth: int = 10
    ) -> Answer:
        """The same for several pictures at once; `Answer.version` says which version answered."""
        with self._query() as searcher:
            return searcher.answer(pictures, boxes, depth)

    def close(self) -> None:
        """End the actors, and the Ray cluster if this pool started it; queries that are under way fail."""
        self._current.searcher.close()
        self._end_actors()

    def _end_actors(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
