"""A dense index under load: ten thousand queries while replicas die and versions are swapped."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cbir
from cbir.config import parse_config
from cbir.errors import ArtifactError
from cbir.search import Answer, Result
from cbir.storage import open_store
from cbir.types import Floats
from cbir.versions import Versions
from pipelines.cluster import ray
from pipelines.indexing import index
from pipelines.query_pool import QueryPool
from pipelines.run import Run

pytestmark = pytest.mark.service

NUM_QUERIES, NUM_THREADS, NUM_VECTORS, DEPTH = 10_000, 4, 8, 10
DENSE = {
    "extractor": {"name": "sift", "max_features": 60},
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 8}, {"name": "pca", "dim": 8}],
    "index": {"name": "ivfpq", "lists": 2, "bits": 4, "bytes": 4, "probes": 2},
}


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of three partitions, whose codebooks differ and so do all scores; the first is current."""
    uri = str(tmp_path_factory.mktemp("swap") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: 3)
        for seed in (0, 1):
            dense = settings(store=uri, channels={"global": DENSE}, search={}, evaluate={"probes": 0})
            index(parse_config({**dense, "sample": {"images": 20, "seed": seed}}, f"seed {seed}"))
    Versions(open_store(uri)).rollback(1)
    return uri


@pytest.fixture(scope="module")
def pool(store: str) -> Any:
    with QueryPool(store, num_actors=1, cpus=0, replicas=2) as opened:
        yield opened


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")


class Askers:
    """Threads that ask vectors in turn until so many answers are there; errors are raised by `answers`."""

    def __init__(self, pool: QueryPool, vectors: Floats) -> None:
        self.num = 0
        self._pool, self._vectors, self._numbers = pool, vectors, itertools.count()
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(NUM_THREADS)
        self._asked = [self._threads.submit(self._ask) for _ in range(NUM_THREADS)]

    def _ask(self) -> list[tuple[int, Answer]]:
        answers = []
        while not self._stop.is_set() and (number := next(self._numbers)) < NUM_QUERIES:
            which = number % len(self._vectors)
            answers.append((which, self._pool.answer_vectors(self._vectors[which : which + 1], DEPTH)))
            self.num = number
        return answers

    def answers(self) -> list[tuple[int, Answer]]:
        return [pair for future in self._asked for pair in future.result()]

    def __enter__(self) -> "Askers":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self._threads.shutdown()


def test_no_query_of_ten_thousand_fails_or_mixes_versions_through_deaths_and_swaps(store: str, pool: QueryPool) -> None:
    vectors = np.random.default_rng(0).standard_normal((NUM_VECTORS, 8)).astype(np.float32)
    expected: dict[int, list[list[Result]]] = {}
    for version in (1, 2):
        answer = cbir.open(store, version).answer_vectors(vectors, DEPTH)
        expected[version] = [answer.results(number) for number in range(NUM_VECTORS)]
    assert all(one != other for one, other in zip(expected[1], expected[2], strict=True))
    versions, events = Versions(open_store(store)), 8
    with Askers(pool, vectors) as askers:
        for number in range(events):
            wait_until(lambda number=number: askers.num >= (number + 1) * NUM_QUERIES // (events + 2))
            if number % 4 == 3:
                wait_until(lambda: all(pool.version in held for held in pool.held_versions()))
                actor = pool._shares[0].actors[number // 4]
                os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
            else:
                versions.rollback(2 if pool.version == 1 else 1)
                assert pool.refresh()
        answers = askers.answers()
    assert len(answers) == NUM_QUERIES
    assert {answer.version for _, answer in answers} == {1, 2}
    for which, answer in answers:
        assert answer.missing == ()
        assert answer.results(0) == expected[answer.version][which]


def test_a_damaged_version_is_not_served_while_the_one_before_goes_on(store: str, pool: QueryPool) -> None:
    versions = Versions(open_store(store))
    versions.rollback(1)
    pool.refresh()
    part = versions.load(2).layout["partitions"][1]
    for key in (part["ids"], part["indexes"]["global"][0]):
        path = Path(store) / key
        good = path.read_bytes()
        half = len(good) // 2
        path.write_bytes(good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :])
        versions.rollback(2)
        try:
            with pytest.raises(ArtifactError, match=f"{path.name} has other bytes than its record says"):
                pool.refresh()
        finally:
            path.write_bytes(good)
            versions.rollback(1)
        assert pool.version == 1
        assert len(pool.search(np.ones(8, np.float32), DEPTH)) == DEPTH
