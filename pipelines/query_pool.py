"""A pool of query actors: each holds some partitions of the published version, memory-mapped, and swaps in memory.

The same `Searcher` as in one process does the work; here its partitions live in actors, several of which may hold the
same ones. A query takes all its partitions from one version: the searcher that it starts with. `refresh` opens a newer
version beside the one that answers and swaps the searcher when the actors have it, so that no query fails or sees a
mixture. The version before is closed when its last query has ended.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any, Self

from cbir.artifacts import sha256_of
from cbir.config import Config
from cbir.errors import ConfigError
from cbir.partition import Found, LocalFiles
from cbir.queries import Box, QueryEncoder
from cbir.search import Answer, Patience, Picture, Question, Result, Searcher
from cbir.storage import open_store
from cbir.types import FeatureBatch, Floats
from cbir.versions import Manifest, Versions
from pipelines.cluster import connect, ray
from pipelines.query_actor import Call, Holder, Opening, parsed
from pipelines.replicas import CARE, Replicas, in_care

__all__ = ["QueryPool"]


class _RemoteSearcher(Searcher):
    """A searcher whose partitions live in actors, which are all asked at once."""

    def __init__(
        self, manifest: Manifest, config: Config, encoder: QueryEncoder, opening: Opening, shares: Sequence[Replicas]
    ) -> None:
        super().__init__(manifest, config, encoder, parts=())
        self._opening = opening
        self._shares = list(zip(shares, _divided(len(self._edges), len(shares)), strict=True))

    def _search(
        self, encoded: Mapping[str, FeatureBatch], depth: int, labelled: int, patience: Patience
    ) -> list[Found]:
        futures: dict[tuple[int, ...], Future[Found]] = {}
        for share, numbers in self._shares:
            if numbers:
                (futures[numbers],) = share.submit([Call(self._opening, numbers, "search", (encoded, depth, labelled))])
        wait(futures.values(), patience.seconds("search"), FIRST_EXCEPTION)
        late = {numbers for numbers, future in futures.items() if future.cancel()}
        patience.missing.update(*late)
        return [future.result() for numbers, future in futures.items() if numbers not in late]

    def _ask(self, question: Question, arguments: Mapping[int, tuple[Any, ...]], patience: Patience) -> dict[int, Any]:
        futures: dict[int, Future[Any]] = {}
        for share, numbers in self._shares:
            asked = [number for number in numbers if number in arguments]
            calls = [Call(self._opening, (number,), question, arguments[number]) for number in asked]
            futures.update(zip(asked, share.submit(calls), strict=True))
        wait(futures.values(), patience.seconds(question), FIRST_EXCEPTION)
        late = {number for number, future in futures.items() if future.cancel()}
        answers = {number: futures[number].result() for number in arguments if number not in late}
        patience.missing |= late
        return answers


def _divided(num_partitions: int, num_shares: int) -> list[tuple[int, ...]]:
    """The partitions of each share, of which there may be more than partitions."""
    return [tuple(range(first, num_partitions, num_shares)) for first in range(num_shares)]


@dataclass
class _Opened:
    """An opening with its searcher and the number of queries that are under way on it."""

    opening: Opening
    searcher: _RemoteSearcher
    queries: int = 0


class QueryPool:
    """Answers queries with the published version of a store; safe to use from several threads.

    The partitions are divided into `num_actors` shares; `replicas` actors of `cpus` processors each hold the same
    share, on the Ray cluster at `address` or on one that is started on this machine. No query fails while one replica
    of each share is alive; an actor that dies is started again, one that takes more than `slow_s` seconds for a call
    is helped out by another. Queries are encoded in the caller's process. ConfigError if the cluster has no room for
    the actors within `start_s` seconds.

    With `verify` an actor compares every file with its sha256 before it maps it [0.75 s per GiB, while the version
    before goes on answering]: a damaged version is refused, where a search in it could end the actor by a signal.
    """

    def __init__(
        self,
        store_uri: str,
        num_actors: int = 1,
        cpus: float = 1.0,
        address: str | None = None,
        start_s: float = 300.0,
        replicas: int = 1,
        slow_s: float = 0.5,
        *,
        verify: bool = True,
    ) -> None:
        self._store = open_store(store_uri)
        manifest = Versions(self._store).load()
        self._serials = itertools.count()
        self._refreshing = threading.Lock()
        self._counting = threading.Lock()
        self._start_s = start_s
        self._started_ray = connect(address, max(1, round(num_actors * replicas * cpus)))
        # Ray starts again what dies, but repeats no call: another replica takes it at once.
        options = {"num_cpus": cpus, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(concurrency_groups={CARE: 1})(Holder).options(**options)
        self._shares = [
            Replicas([actor.remote(store_uri, verify=verify) for _ in range(replicas)], slow_s)
            for _ in range(num_actors)
        ]
        with contextlib.ExitStack() as undo:
            undo.callback(self._end_actors)
            self._await_actors()
            self._current = self._open(manifest)
            undo.pop_all()

    def _await_actors(self) -> None:
        num = len(self._shares) * len(self._shares[0].actors)
        try:
            ray.get(self._ask_versions(), timeout=self._start_s)
        except ray.exceptions.GetTimeoutError:
            raise ConfigError(
                f"the Ray cluster had no room for {num} query actor(s) within {self._start_s:g} s: it has "
                f"{ray.cluster_resources().get('CPU', 0):g} processors; ask for fewer, or end what else runs there"
            ) from None

    @property
    def version(self) -> int:
        """The version that new queries use."""
        return self._current.opening.version

    @property
    def num_partitions(self) -> int:
        """The partitions of the version that new queries use."""
        return len(self._current.searcher.manifest.layout["partitions"])

    def held_versions(self) -> list[list[int]]:
        """The versions that each actor holds now: the one in use, and older ones whose queries have not ended.

        None of an actor that has died and is being started again.
        """
        held: list[list[int]] = []
        for asked in self._ask_versions():
            try:
                held.append(ray.get(asked))
            except ray.exceptions.RayActorError:
                held.append([])
        return held

    def _ask_versions(self) -> list[Any]:
        return [in_care(actor.versions).remote() for share in self._shares for actor in share.actors]

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
        opening = Opening(next(self._serials), manifest.version, sha256_of(manifest.to_json()))
        config, layout = parsed(manifest)
        encoder = QueryEncoder(config, layout, LocalFiles(self._store, manifest))
        with contextlib.ExitStack() as undo:
            undo.callback(self._close_in_actors, opening)
            self._open_in_actors(opening, len(layout.partitions))
            undo.pop_all()
        return _Opened(opening, _RemoteSearcher(manifest, config, encoder, opening, self._shares))

    def _open_in_actors(self, opening: Opening, num_partitions: int) -> None:
        end, divided = time.monotonic() + self._start_s, _divided(num_partitions, len(self._shares))
        begun = [share.begin_open(opening, numbers) for share, numbers in zip(self._shares, divided, strict=True)]
        for share, references in zip(self._shares, begun, strict=True):
            share.await_open(opening, references, end)

    def _close_in_actors(self, opening: Opening) -> None:
        for share in self._shares:
            share.close(opening)

    def _close_if_unused(self, opened: _Opened) -> None:
        """To be called with `_counting` held; no query can begin on a version that is not the current one."""
        if opened is not self._current and not opened.queries:
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

    def search(
        self, query: Picture | Floats, depth: int = 10, box: Box | None = None, channel: str | None = None
    ) -> list[Result]:
        """The best `depth` images for one picture, for a box in it, or for one descriptor of a channel."""
        with self._query() as searcher:
            return searcher.search(query, depth, box, channel)

    def answer(
        self,
        pictures: Sequence[Picture],
        boxes: Sequence[Box | None] | None = None,
        depth: int = 10,
        deadline_s: float | None = None,
    ) -> Answer:
        """The same for several pictures at once; `Answer.version` says which version answered.

        With a deadline, in seconds from now, partitions that are late are left out; `Answer.missing` names them.
        """
        with self._query() as searcher:
            return searcher.answer(pictures, boxes, depth, deadline_s)

    def answer_vectors(
        self, vectors: Floats, depth: int = 10, channel: str | None = None, deadline_s: float | None = None
    ) -> Answer:
        """The same for descriptors (Q, D) of a channel, as by `Searcher.answer_vectors`."""
        with self._query() as searcher:
            return searcher.answer_vectors(vectors, depth, channel, deadline_s)

    def close(self) -> None:
        """End the actors, and the Ray cluster if this pool started it; queries that are under way fail."""
        self._end_actors()

    def _end_actors(self) -> None:
        for share in self._shares:
            share.end()
        self._shares.clear()
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
