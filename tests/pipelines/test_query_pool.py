"""The pool of query actors: the answers of one process, from one version at a time, through swaps and deaths."""

import os
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
from cbir.config import parse_config
from cbir.errors import ArtifactError, ConfigError, DataError, ObjectMissing
from cbir.search import Answer, Result
from cbir.storage import open_store
from cbir.versions import Versions
from pipelines.cluster import ray
from pipelines.indexing import _Run, index
from pipelines.query_pool import QueryPool, _Holder

pytestmark = pytest.mark.service

NUM_PARTITIONS, NUM_ACTORS = 5, 2
QUERIES = ("object1/view0.jpg", "object4/view2.jpg", "object6/view3.jpg")


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of five partitions: 1 ranks by RANSAC's inliers, 2 by the VLAD vectors alone."""
    uri = str(tmp_path_factory.mktemp("pool") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_num_partitions", lambda *_: NUM_PARTITIONS)
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
    os.kill(ray.get(pool._actors[1].__ray_call__.remote(lambda _holder: os.getpid())), signal.SIGKILL)
    assert pool.search(pictures[QUERIES[0]], depth=20) == expected[1][QUERIES[0]]


def test_partitions_are_opened_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder keeps what it has opened, and opens what it lacks when it is asked."""
    from cbir.artifacts import sha256_of
    from pipelines import query_pool

    opened: list[int] = []
    original = query_pool.Partition
    monkeypatch.setattr(
        query_pool, "Partition", lambda config, part, files: (opened.append(part.low), original(config, part, files))[1]
    )
    manifest = Versions(open_store(store)).load(1)
    opening = query_pool._Opening(0, 1, sha256_of(manifest.to_json()))
    holder = _Holder(store)
    holder.open(opening, [0, 2])
    holder.open(opening, [0, 2])
    assert len(holder.call(opening, 1, "keys", ())) == manifest.layout["partitions"][1]["num_images"]
    assert len(opened) == 3
    assert holder.versions() == [1]
    holder.close(opening)
    holder.close(opening)
    assert holder.versions() == []
