"""The pool of query actors: the answers of one process, from one version at a time, through swaps and deaths."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cbir
from cbir.artifacts import sha256_of
from cbir.config import parse_config
from cbir.errors import ArtifactError, CbirError, ConfigError, DataError, ObjectMissing
from cbir.partition import Partitions
from cbir.search import Answer, Result
from cbir.storage import open_store
from cbir.types import FeatureBatch
from cbir.versions import Versions
from pipelines import query_actor
from pipelines import replicas as replicas_module
from pipelines.cluster import ray
from pipelines.indexing import index
from pipelines.query_actor import Call, Holder, Opening
from pipelines.query_pool import QueryPool
from pipelines.replicas import CARE, Replicas
from pipelines.run import Run

pytestmark = pytest.mark.service

NUM_PARTITIONS, NUM_ACTORS = 5, 2
QUERIES = ("object1/view0.jpg", "object4/view2.jpg", "object6/view3.jpg")


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of five partitions: 1 ranks by RANSAC's inliers, 2 by the VLAD vectors alone."""
    uri = str(tmp_path_factory.mktemp("pool") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: NUM_PARTITIONS)
        index(parse_config(settings(store=uri), "version 1"))
        index(parse_config(settings(store=uri, search={"depth": 50}), "version 2"))
    return uri


@pytest.fixture
def versions(store: str) -> Iterator[Versions]:
    """The versions of the store, with the first as the current one before and after the test."""
    found = Versions(open_store(store))
    found.rollback(1)
    yield found
    found.rollback(1)


@pytest.fixture(scope="module")
def shared_pool(store: str) -> Iterator[QueryPool]:
    Versions(open_store(store)).rollback(1)
    with QueryPool(store, num_actors=NUM_ACTORS) as opened:
        yield opened


@pytest.fixture
def pool(shared_pool: QueryPool, versions: Versions) -> QueryPool:
    """The pool, answering from version 1 whatever the test before did to it."""
    shared_pool.refresh()
    assert shared_pool.version == 1
    return shared_pool


@pytest.fixture(scope="module")
def expected(store: str, pictures: dict[str, bytes]) -> dict[int, dict[str, list[Result]]]:
    """The answers of searchers in this process, by version and query."""
    searchers = {version: cbir.open(store, version) for version in (1, 2)}
    return {v: {key: s.search(pictures[key], depth=20) for key in QUERIES} for v, s in searchers.items()}


def pid_of(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda _holder: os.getpid()))
    return pid


def opening_of(store: str) -> Opening:
    """The first opening of version 1."""
    return Opening(0, 1, sha256_of(Versions(open_store(store)).load(1).to_json()))


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to hold")


def test_a_closed_pool_leaves_nothing_behind(store: str, pictures: dict[str, bytes], tmp_path: Path) -> None:
    """The first test, so that the pool of the others is one that follows it."""
    with pytest.raises(ArtifactError, match="no published version"):
        QueryPool(str(tmp_path))
    pool = QueryPool(store)
    assert pool.search(pictures[QUERIES[0]], depth=1)[0].key == QUERIES[0]
    pool.close()
    pool.close()
    assert not ray.is_initialized()


def test_a_cluster_without_room_is_an_error(pool: QueryPool, store: str) -> None:
    with pytest.raises(ConfigError, match=r"no room for 1 query actor.* has 2 processors"):
        QueryPool(store, start_s=0.5)
    assert pool.held_versions() == [[1]] * NUM_ACTORS


def test_several_actors_share_several_partitions(pool: QueryPool, versions: Versions) -> None:
    layout = versions.load(1).layout
    assert len(layout["partitions"]) == NUM_PARTITIONS
    assert sum(part["num_images"] > 0 for part in layout["partitions"]) >= 3
    assert pool.held_versions() == [[1]] * NUM_ACTORS


def test_answers_equal_those_of_one_process(
    pool: QueryPool, store: str, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    for key in QUERIES:
        assert pool.search(pictures[key], depth=20) == expected[1][key]
    box = (20.0, 20.0, 120.0, 120.0)
    assert pool.search(pictures[QUERIES[0]], 5, box) == cbir.open(store, 1).search(pictures[QUERIES[0]], 5, box)


def test_one_batch_of_queries_is_answered_like_its_queries(
    pool: QueryPool, store: str, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    answer = pool.answer([pictures[key] for key in QUERIES], depth=20)
    alone = cbir.open(store, 1).answer([pictures[key] for key in QUERIES], depth=20)
    assert np.array_equal(answer.hits.image_ids, alone.hits.image_ids)
    assert np.array_equal(answer.hits.scores, alone.hits.scores)
    assert answer.version == 1
    assert [answer.results(number) for number in range(3)] == [expected[1][key] for key in QUERIES]


def test_a_bad_query_is_an_error_of_its_own(pool: QueryPool, pictures: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match="not_an_image"):
        pool.search(b"no picture")
    assert pool.search(pictures[QUERIES[0]], depth=1)[0].key == QUERIES[0]


def test_refresh_follows_current_and_closes_the_version_before(
    pool: QueryPool, versions: Versions, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    assert expected[1][QUERIES[0]] != expected[2][QUERIES[0]]
    assert not pool.refresh()
    for version in (2, 1, 2):
        versions.rollback(version)
        assert pool.refresh()
        assert pool.version == version
        assert pool.search(pictures[QUERIES[0]], depth=20) == expected[version][QUERIES[0]]
        assert pool.held_versions() == [[version]] * NUM_ACTORS


def test_no_query_fails_or_mixes_versions_while_they_are_swapped(
    pool: QueryPool, versions: Versions, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    stop = threading.Event()

    def ask(number: int) -> list[tuple[str, Answer]]:
        answers = []
        while not stop.is_set():
            key = QUERIES[(number + len(answers)) % len(QUERIES)]
            answers.append((key, pool.answer([pictures[key]], depth=20)))
        return answers

    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask, number) for number in range(3)]
        try:
            for version in (2, 1, 2, 1):
                time.sleep(0.3)
                versions.rollback(version)
                assert pool.refresh()
                assert pool.answer([pictures[QUERIES[0]]], depth=1).version == version
        finally:
            stop.set()
        answers = [pair for future in asked for pair in future.result()]
    assert {answer.version for _, answer in answers} == {1, 2}
    for key, answer in answers:
        assert answer.results(0) == expected[answer.version][key]
    assert pool.held_versions() == [[1]] * NUM_ACTORS


def test_a_version_is_open_until_its_last_query_has_ended(
    pool: QueryPool, versions: Versions, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    """Three swaps pass while one query, which began before them, has yet to ask its partitions."""
    began, go_on = threading.Event(), threading.Event()
    encoder = pool._current.searcher.encoder
    extract = encoder.extract

    def slow_extract(*arguments: Any) -> Any:
        began.set()
        assert go_on.wait(60)
        return extract(*arguments)

    encoder.extract = slow_extract  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        old = threads.submit(pool.answer, [pictures[QUERIES[1]]], None, 20)
        try:
            assert began.wait(60)
            for version in (2, 1, 2):
                versions.rollback(version)
                assert pool.refresh()
            assert pool.held_versions() == [[1, 2]] * NUM_ACTORS
        finally:
            go_on.set()
        assert old.result().version == 1
        assert old.result().results(0) == expected[1][QUERIES[1]]
    assert pool.held_versions() == [[2]] * NUM_ACTORS


def test_a_version_that_cannot_be_opened_leaves_the_one_in_use(
    pool: QueryPool, versions: Versions, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    part = versions.load(2).layout["partitions"][1]
    path = Path(versions.store.uri.removeprefix("file://")) / part["indexes"]["local"][0]
    kept = path.rename(path.with_suffix(".gone"))
    versions.rollback(2)
    try:
        with pytest.raises(ObjectMissing, match=f"{path.name}: no such object"):
            pool.refresh()
        assert pool.version == 1
        assert pool.search(pictures[QUERIES[2]], depth=20) == expected[1][QUERIES[2]]
        assert pool.held_versions() == [[1]] * NUM_ACTORS
    finally:
        kept.rename(path)
    assert pool.refresh()
    assert pool.search(pictures[QUERIES[2]], depth=20) == expected[2][QUERIES[2]]


def test_an_actor_that_dies_is_started_again(
    pool: QueryPool, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    os.kill(pid_of(pool._shares[1].actors[0]), signal.SIGKILL)
    wait_until(lambda: [] in pool.held_versions())
    assert pool.search(pictures[QUERIES[0]], depth=20) == expected[1][QUERIES[0]]
    wait_until(lambda: pool.held_versions() == [[1]] * NUM_ACTORS)


def test_partitions_are_opened_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder keeps what it has opened, and opens what it lacks when it is asked."""
    opened: list[int] = []
    original = query_actor.Partition
    monkeypatch.setattr(
        query_actor,
        "Partition",
        lambda config, part, files: (opened.append(part.low), original(config, part, files))[1],
    )
    opening, holder = opening_of(store), Holder(store)
    holder.open(opening, [0, 2])
    holder.open(opening, [0, 2])
    (keys,) = holder.outcomes([Call(opening, (1,), "keys", ())])
    assert len(keys.value) == Versions(open_store(store)).load(1).layout["partitions"][1]["num_images"]
    assert len(opened) == 3
    assert holder.versions() == [1]
    holder.close(opening)
    holder.close(opening)
    assert holder.versions() == []


def test_what_was_closed_is_not_opened_again_for_a_query_that_was_given_up(store: str) -> None:
    opening, holder = opening_of(store), Holder(store)
    holder.close(opening)
    holder.open(opening, [0])
    (outcome,) = holder.outcomes([Call(opening, (0,), "keys", ())])
    assert isinstance(outcome.error, CbirError)
    assert "version 1 was closed" in str(outcome.error)
    assert holder.versions() == []


def test_the_error_of_one_call_is_none_of_those_that_it_was_joined_with(store: str) -> None:
    opening, holder = opening_of(store), Holder(store)
    bad = FeatureBatch.of_global(np.zeros(1, np.int64), np.ones((1, 3), np.float32))
    calls = [
        Call(opening, (0,), "keys", ()),
        Call(opening, (0,), "search", ({"local": bad}, 5, 0)),
        Call(opening, (0,), "search", ({"other": bad}, 5, 0)),
        Call(opening, (1,), "keys", ()),
    ]
    first, wrong, defect, last = holder.outcomes(calls)
    assert set(first.value).isdisjoint(last.value)
    assert isinstance(wrong.error, DataError)
    assert "D = 3" in str(wrong.error)
    assert isinstance(defect.error, RuntimeError)
    assert "KeyError: 'other'" in str(defect.error)


class Counted:
    """An actor that notes how many calls it is given at once; it gets none before `go_on` is set."""

    def __init__(self, actor: Any) -> None:
        self._actor, self.sizes, self.go_on, self.began = actor, list[int](), threading.Event(), threading.Event()
        self.call = self

    def remote(self, calls: bytes) -> Any:
        self.sizes.append(len(pickle.loads(calls)))
        self.began.set()
        assert self.go_on.wait(60)
        return self._actor.call.remote(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


def new_actor(store: str) -> Any:
    return ray.remote(concurrency_groups={CARE: 1})(Holder).options(num_cpus=0).remote(store)


def test_calls_that_wait_together_become_one(
    pool: QueryPool, store: str, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, bytes]
) -> None:
    """One call is on its way; more come, one by one, for several partitions, depths and queries."""
    actor, opening = Counted(new_actor(store)), opening_of(store)
    kill = ray.kill
    monkeypatch.setattr(ray, "kill", lambda counted: kill(counted._actor))
    replicas = Replicas([actor], slow_s=60)
    searcher = cbir.open(store, 1)
    queries = searcher.encoder.encode(searcher.encoder.extract([pictures[key] for key in QUERIES], [None] * 3))["local"]
    asked = [
        Call(opening, numbers, "search", ({"local": queries.take(np.arange(first, 3))}, depth, 2))
        for numbers in ((0,), (1, 3), (0, 1, 2, 3, 4))
        for depth in (3, 7)
        for first in (0, 1, 2)
    ]
    try:
        (first,) = replicas.submit([Call(opening, (0,), "keys", ())])
        assert actor.began.wait(60)
        futures = [future for call in asked for future in replicas.submit([call])]
        actor.go_on.set()
        assert len(first.result(60)) > 0
        answers = [future.result(60) for future in futures]
    finally:
        actor.go_on.set()
        replicas.end()
    assert actor.sizes == [1, len(asked)]
    keys = searcher.keys()
    for call, found in zip(asked, answers, strict=True):
        hits = found.hits["local"]
        alone = Partitions({number: searcher.partitions[number] for number in call.numbers}).search(*call.arguments)
        assert np.array_equal(hits.image_ids, alone.hits["local"].image_ids)
        assert np.array_equal(hits.scores, alone.hits["local"].scores)
        shown = hits.image_ids[:, :2]
        assert {image: found.labels.by_id[image][0] for image in shown[shown >= 0].tolist()}.items() <= keys.items()
    with pytest.raises(CbirError, match="the query pool is closed"):
        replicas.submit(asked)


def test_searches_are_made_together_unless_one_of_them_fails(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    original = Partitions.search

    def counted(self: Partitions, queries: Any, *rest: Any) -> Any:
        searched.append(len(queries["local"]))
        return original(self, queries, *rest)

    monkeypatch.setattr(Partitions, "search", counted)
    opening, holder, dim = opening_of(store), Holder(store), cbir.open(store, 1).partitions[0].indexes["local"].dim
    rows = np.random.default_rng(0).normal(size=(4, dim)).astype(np.float32)
    broken = np.where(np.arange(4)[:, None] == 2, np.nan, rows).astype(np.float32)

    def asked(rows: Any) -> list[Call]:
        batches = [FeatureBatch.of_global(np.zeros(1, np.int64), row[None]) for row in rows]
        return [Call(opening, (0, 1), "search", ({"local": batch}, 5, 0)) for batch in batches]

    alone = [holder.outcomes([call])[0].value.hits["local"] for call in asked(rows)]
    assert searched == [1] * 4
    together = holder.outcomes(asked(rows))
    assert searched == [1] * 4 + [4]
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.image_ids, other.value.hits["local"].image_ids)
        assert np.array_equal(one.scores, other.value.hits["local"].scores)
    errors = [outcome.error for outcome in holder.outcomes(asked(broken))]
    assert [error is None for error in errors] == [True, True, False, True]
    assert "NaN" in str(errors[2])


def test_a_call_that_ends_every_process_it_meets_is_given_up(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        """An actor that is dead whenever it is called, and alive in between."""

        def __init__(self) -> None:
            self.calls = 0
            self.call = self

        def remote(self, _calls: Any) -> Any:
            self.calls += 1
            raise ray.exceptions.RayActorError

    actor = Lost()
    monkeypatch.setattr(ray, "kill", lambda _: None)
    monkeypatch.setattr(replicas_module, "_RETRY_S", 0.001)
    replicas = Replicas([actor], slow_s=60)
    try:
        (future,) = replicas.submit([Call(opening_of(store), (0,), "keys", ())])
        with pytest.raises(CbirError, match="died 8 times while they had this query"):
            future.result(60)
    finally:
        replicas.end()
    assert actor.calls == 8


@pytest.fixture(scope="module")
def shared_replicas(shared_pool: QueryPool, store: str) -> Iterator[QueryPool]:
    """Two actors with the same partitions, beside the pool of the other tests."""
    with QueryPool(store, num_actors=1, cpus=0, replicas=2, slow_s=0.2) as opened:
        yield opened


@pytest.fixture
def replicas(shared_replicas: QueryPool, versions: Versions) -> QueryPool:
    shared_replicas.refresh()
    assert shared_replicas.version == 1
    return shared_replicas


def test_no_query_fails_while_one_replica_is_lost(
    replicas: QueryPool, versions: Versions, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    """Under load, each replica is killed once; between these deaths, and after them, versions are swapped."""
    stop, answers = threading.Event(), list[tuple[str, Answer]]()

    def ask(number: int) -> None:
        while not stop.is_set():
            key = QUERIES[(number + len(answers)) % len(QUERIES)]
            answers.append((key, replicas.answer([pictures[key]], depth=20)))

    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask, number) for number in range(3)]
        try:
            for actor, version in zip(replicas._shares[0].actors, (2, 1), strict=True):
                wait_until(lambda: replicas.held_versions() == [[replicas.version]] * 2)
                begun = len(answers)
                os.kill(pid_of(actor), signal.SIGKILL)
                wait_until(lambda begun=begun: len(answers) > begun + 20)
                versions.rollback(version)
                assert replicas.refresh()
        finally:
            stop.set()
        for future in asked:
            future.result()
    assert {answer.version for _, answer in answers} == {1, 2}
    for key, answer in answers:
        assert answer.missing == ()
        assert answer.results(0) == expected[answer.version][key]


def test_a_slow_replica_is_helped_out(
    replicas: QueryPool, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    """A stopped process is the slowest of all: its calls go to the other one, whichever of them was asked first."""
    wait_until(lambda: replicas.held_versions() == [[1]] * 2)
    for actor in replicas._shares[0].actors:
        pid = pid_of(actor)
        os.kill(pid, signal.SIGSTOP)
        try:
            for key in QUERIES:
                assert replicas.search(pictures[key], depth=20) == expected[1][key]
        finally:
            os.kill(pid, signal.SIGCONT)
    assert replicas.held_versions() == [[1]] * 2


def test_partitions_that_miss_the_deadline_are_named(
    pool: QueryPool, store: str, expected: dict[int, dict[str, list[Result]]], pictures: dict[str, bytes]
) -> None:
    """The second actor, which has partitions 1 and 3, is stopped."""
    key, edges = QUERIES[0], [part.low for part in cbir.open(store, 1).partitions]
    assert pool.answer([pictures[key]], depth=40, deadline_s=60).missing == ()
    pid = pid_of(pool._shares[1].actors[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        answer = pool.answer([pictures[key]], depth=40, deadline_s=3)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert answer.missing == (1, 3)
    owners = np.searchsorted(edges, [result.image_id for result in answer.results(0)], side="right") - 1
    assert set(owners) <= {0, 2, 4}
    held = Versions(open_store(store)).load(1).layout["partitions"]
    assert len(owners) == sum(held[number]["num_images"] for number in (0, 2, 4))
    assert pool.search(pictures[key], depth=20) == expected[1][key]


def test_vectors_are_asked_as_in_one_process(pool: QueryPool, store: str, pictures: dict[str, bytes]) -> None:
    searcher = cbir.open(store, 1)
    raw = searcher.encoder.extract([pictures[key] for key in QUERIES], [None] * 3)
    vectors = searcher.encoder.encode(raw)["local"].descriptors
    for number, vector in enumerate(vectors):
        assert pool.search(vector, depth=9) == searcher.search(vector, depth=9)
        assert pool.answer_vectors(vectors, 9).results(number) == searcher.search(vector, depth=9)
    with pytest.raises(DataError, match="have D = 3, but the index was trained on D = "):
        pool.search(np.ones(3, np.float32))


def test_a_closed_pool_answers_nothing(store: str, pool: QueryPool, pictures: dict[str, bytes]) -> None:
    closed = QueryPool(store, cpus=0)
    closed.close()
    with pytest.raises(CbirError, match="the query pool is closed"):
        closed.search(pictures[QUERIES[0]])
    assert pool.search(pictures[QUERIES[0]], depth=1)[0].key == QUERIES[0]
