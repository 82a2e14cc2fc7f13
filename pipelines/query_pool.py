"""A pool of query actors: each holds some partitions of one version, memory-mapped; versions are swapped in memory.

The same `Searcher` as in one process does the work; here its partitions live in actors. A query takes all its
partitions from one version: the searcher object that it starts with. `refresh` opens a newer version beside the one
that answers, and swaps the searcher when every actor has it, so no query fails or sees a mixture.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbir.config import parse_config
from cbir.layout import Layout
from cbir.search import Answer, Box, LocalFiles, Partition, QueryEncoder, Result, Searcher
from cbir.storage import open_store
from cbir.types import FeatureBatch, Hits, Int64s
from cbir.versions import Manifest, Versions
from pipelines.cluster import ray
from pipelines.work import limit_threads

__all__ = ["QueryPool"]

KEPT_VERSIONS = 2


class _Holder:
    """Partitions by version, in a process of their own."""

    def __init__(self, store_uri: str) -> None:
        limit_threads()
        self._store = open_store(store_uri)
        self._partitions: dict[int, dict[int, Partition]] = {}

    def open(self, version: int, manifest: bytes, numbers: Sequence[int]) -> None:
        """Open these partitions of a version; the oldest version makes room once there are too many."""
        parsed = Manifest.from_json(manifest, f"version {version}")
        config, layout = parse_config(parsed.config, f"version {version}"), Layout.from_json(parsed.layout)
        files = LocalFiles(self._store, parsed)
        self._partitions[version] = {number: Partition(config, layout.partitions[number], files) for number in numbers}

    def close(self, version: int) -> None:
        """Let go of a version that no query uses any more."""
        self._partitions.pop(version, None)

    def call(self, version: int, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of one partition of one version."""
        return getattr(self._partitions[version][number], method)(*arguments)


class _RemotePartition:
    """A partition that lives in an actor; what `cbir.search` calls `PartitionLike`."""

    def __init__(self, actor: Any, version: int, number: int, low: int, high: int) -> None:
        self.low, self.high = low, high
        self._actor, self._address = actor, (version, number)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._actor.call.remote(*self._address, method, *arguments)

    def start_search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Any:
        """Begin a search; `ray.get` gives its hits by channel."""
        return self._call("search", dict(queries), depth)

    def search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Mapping[str, Hits]:
        """Hits by channel for encoded queries by channel."""
        hits: Mapping[str, Hits] = ray.get(self.start_search(queries, depth))
        return hits

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of these images."""
        batch: FeatureBatch = ray.get(self._call("features", channel, image_ids))
        return batch

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The rows of the id map of these images."""
        rows: list[dict[str, Any]] = ray.get(self._call("records", image_ids))
        return rows

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition."""
        keys: dict[int, str] = ray.get(self._call("keys"))
        return keys


class _ParallelSearcher(Searcher):
    """A searcher whose partitions search at the same time."""

    def channel_hits(self, encoded: Mapping[str, FeatureBatch], depth: int) -> dict[str, Hits]:
        """The best `depth` images of each channel over all partitions, asked all at once."""
        parts = [part for part in self.partitions if isinstance(part, _RemotePartition)]
        found = ray.get([part.start_search(encoded, depth) for part in parts])
        return {name: Hits.merge([hits[name] for hits in found], depth) for name in encoded}


class QueryPool:
    """Answers queries with the current version of a store; safe to use from several threads."""

    def __init__(self, store_uri: str, num_actors: int = 1, cpus: float = 1.0) -> None:
        if not ray.is_initialized():
            ray.init(num_cpus=max(1, round(num_actors * cpus)), include_dashboard=False, log_to_driver=False)
        self._uri = store_uri
        self._store = open_store(store_uri)
        actor = ray.remote(_Holder).options(num_cpus=cpus, max_concurrency=1)
        self._actors = [actor.remote(store_uri) for _ in range(num_actors)]
        self._opened: deque[int] = deque()
        self._swap = threading.Lock()
        self._searcher = self._open(Versions(self._store).load())

    @property
    def version(self) -> int:
        """The version that new queries use."""
        return self._searcher.manifest.version

    def _open(self, manifest: Manifest) -> Searcher:
        version = manifest.version
        config = parse_config(manifest.config, f"version {version} of {self._uri}")
        layout = Layout.from_json(manifest.layout)
        owned = [range(first, len(layout.partitions), len(self._actors)) for first in range(len(self._actors))]
        ray.get(
            [
                actor.open.remote(version, manifest.to_json(), list(numbers))
                for actor, numbers in zip(self._actors, owned, strict=True)
            ]
        )
        parts = [
            _RemotePartition(self._actors[number % len(self._actors)], version, number, part.low, part.high)
            for number, part in enumerate(layout.partitions)
        ]
        self._opened.append(version)
        encoder = QueryEncoder(config, layout, LocalFiles(self._store, manifest))
        return _ParallelSearcher(manifest, config, encoder, parts)

    def refresh(self) -> bool:
        """Swap to the version that CURRENT names; False if it is the one in use. Queries go on meanwhile.

        The version before stays open for queries that are under way; the one before that is closed.
        """
        with self._swap:
            manifest = Versions(self._store).load()
            if manifest.version == self.version:
                return False
            self._searcher = self._open(manifest)
            while len(self._opened) > KEPT_VERSIONS:
                old = self._opened.popleft()
                if old not in self._opened:
                    ray.get([actor.close.remote(old) for actor in self._actors])
            return True

    def search(self, picture: bytes | str | Path, depth: int = 10, box: Box | None = None) -> list[Result]:
        """The best `depth` images for one picture, or for a box in it."""
        return self._searcher.search(picture, depth, box)

    def answer(
        self, pictures: Sequence[bytes | str | Path], boxes: Sequence[Box | None] | None = None, depth: int = 10
    ) -> Answer:
        """The same for several pictures at once."""
        return self._searcher.answer(pictures, boxes, depth)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
