"""Load on a search: when queries are due, what their time is, and the command that puts it on."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cbir
from cbir.config import parse_config
from cbir.errors import DataError
from cbir.index.dense import exact_search
from cbir.storage import open_store
from cbir.types import FeatureBatch
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.load import Reply, Sent, Truth, figures, poisson_arrivals, send
from pipelines.query_targets import pictures_in, probes_of
from tests.pipelines.test_cli import cbir as command

FOUND = Reply(np.array([1, 2, 3]), 4)


def test_arrivals_are_a_poisson_process_of_their_seed() -> None:
    arrivals = poisson_arrivals(200, 50, seed=1)
    gaps = np.diff(arrivals)
    assert abs(len(arrivals) - 10_000) < 400, "four standard deviations"
    assert (gaps > 0).all()
    assert arrivals[-1] < 50
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05, "exponential gaps deviate by their mean"
    assert np.array_equal(arrivals, poisson_arrivals(200, 50, seed=1))
    assert not np.array_equal(arrivals[:100], poisson_arrivals(200, 50, seed=2)[:100])
    assert len(poisson_arrivals(0.001, 0.001, seed=0)) == 1, "there is always one"


def test_a_query_that_finds_no_thread_free_has_waited() -> None:
    """Ten queries are due at once, one thread asks them, 20 ms each: the last one took all of the time."""

    def ask(_: int) -> Reply:
        time.sleep(0.02)
        return FOUND

    sent = send(ask, np.zeros(10), num_queries=3, threads=1)
    assert [one.query for one in sent] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    times = sorted(one.seconds for one in sent)
    assert all(seconds >= 0.02 * (number + 1) for number, seconds in enumerate(times))


def test_queries_are_sent_while_others_are_not_answered() -> None:
    """Every query waits until all have begun, which a closed loop would never see."""
    begun = threading.Barrier(5)

    def ask(_: int) -> Reply:
        begun.wait(60)
        return FOUND

    assert len(send(ask, np.linspace(0, 0.02, 5), num_queries=5)) == 5


def test_figures_of_known_times() -> None:
    truth = Truth(np.array([[1, 2, 9], [1, 2, 3]]), own=np.array([1, 5]))
    partial = Reply(np.array([1]), 5, partial=True)
    sent = [
        Sent(0, 0.010, 1.0, FOUND),
        Sent(1, 0.020, 2.0, FOUND),
        Sent(0, 0.030, 3.0, partial),
        Sent(1, 9.0, 4.0, None, "OSError: gone"),
    ]
    found = figures(sent, np.array([0.5, 1, 1.5, 2.0]), truth, depth=2)
    assert (found.queries, found.errors, found.partial, found.first_error) == (4, 1, 1, "OSError: gone")
    assert (found.offered_qps, found.achieved_qps) == (2.0, 0.75)
    assert (found.p50_ms, found.max_ms) == (pytest.approx(20), pytest.approx(30))
    assert found.versions == [4, 5]
    # Query 0 is image 1, so that 2 is to be found first; the partial reply has nothing but the query itself.
    assert found.recall == {"1": pytest.approx(2 / 3)}
    none = figures(sent[3:], np.array([1.0]), truth, depth=2)
    assert (none.p50_ms, none.recall, none.errors) == (None, {}, 1)


def test_errors_of_queries_are_counted_and_defects_are_raised() -> None:
    def refused(number: int) -> Reply:
        raise DataError(f"query {number}")

    def broken(number: int) -> Reply:
        raise ZeroDivisionError

    assert [one.error for one in send(refused, np.zeros(2), 2)] == ["DataError: query 0", "DataError: query 1"]
    with pytest.raises(ZeroDivisionError):
        send(broken, np.zeros(1), 1)


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """One channel with vectors of two, with its own probes; and a second version without any."""
    uri = str(tmp_path_factory.mktemp("load") / "store")
    words = {"extractor": {"name": "sift", "max_features": 60}, "index": {"name": "asmk", "words": 16}}
    channels = {"words": words, "local": settings()["channels"]["local"]}
    search = {"fuse": {"name": "late"}}
    index(parse_config(settings(store=uri, channels=channels, search=search), "the test"))
    index(parse_config(settings(store=uri, channels=channels, search=search, evaluate={"probes": 0}), "the test"))
    return uri


def test_probes_come_with_their_exact_neighbours(store: str, pictures: dict[str, bytes]) -> None:
    versions, searcher = Versions(open_store(store)), cbir.open(store, 1)
    probes = probes_of(open_store(store), versions.load(1))
    assert (len(probes), probes.channel) == (10, "local")
    assert probes.vectors is not None
    assert probes.truth is not None
    found = searcher.answer_vectors(probes.vectors, 5).hits
    assert np.array_equal(probes.truth.exact[:, :5], found.image_ids)
    assert np.array_equal(probes.truth.own, found.image_ids[:, 0])
    keys = [key for key in pictures if key.startswith("object")]
    raw = searcher.encoder.extract([pictures[key] for key in keys], [None] * len(keys))
    queries, database = FeatureBatch.of_global(np.arange(10), probes.vectors), searcher.encoder.encode(raw)["local"]
    assert np.array_equal(exact_search(queries, database, "ip", 5).scores, found.scores)
    with pytest.raises(DataError, match="was built without probe vectors; use --pictures"):
        probes_of(open_store(store), versions.load(2))
    with pytest.raises(DataError, match="no vectors of a channel 'words' to ask; channels with vectors are: local"):
        probes_of(open_store(store), versions.load(1), "words")


class TestCommand:
    def test_a_store_is_asked_with_its_vectors(self, store: str, tmp_path: Path) -> None:
        Versions(open_store(store)).rollback(1)
        target = tmp_path / "load.json"
        outcome = command("bench-query", store, "--rate", 50, "--seconds", 1, "--seed", 3, "--json", target)
        assert outcome.code == 0, outcome.err
        rows = dict(line.split() for line in outcome.out.splitlines() if len(line.split()) == 2)
        found = json.loads(target.read_text())
        assert rows["recall@10"] == "1.0000"
        assert found["recall"]["10"] == 1.0
        assert (found["queries"], found["errors"]) == (len(poisson_arrivals(50, 1, 3)), 0)

    def test_a_store_is_asked_with_pictures(self, store: str, folder: Path, tmp_path: Path) -> None:
        Versions(open_store(store)).rollback(1)
        options = ["--rate", 20, "--seconds", 0.5, "--json", tmp_path / "load.json"]
        assert command("bench-query", store, "--pictures", folder / "images" / "object1", *options).code == 0
        found = json.loads((tmp_path / "load.json").read_text())
        assert (found["errors"], found["recall"]) == (0, {})

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["http://127.0.0.1:9"], 2, "--pictures FOLDER"),
            (["{store}", "--pictures", "/nowhere"], 1, "/nowhere is no folder with pictures"),
            (["http://127.0.0.1:9", "--vectors-of", "{store}", "--seconds", "0.1"], 1, "did not answer"),
            (["http://:80", "--vectors-of", "{store}"], 2, "is no http:// or https:// address"),
            (["{store}", "--rate", "0"], 2, "--rate"),
        ],
    )
    def test_what_cannot_be_measured_is_an_error(
        self, store: str, arguments: list[str], code: int, message: str
    ) -> None:
        Versions(open_store(store)).rollback(1)
        outcome = command("bench-query", *(argument.format(store=store) for argument in arguments))
        assert outcome.code == code
        assert message in outcome.err


def test_a_folder_of_pictures_is_read_in_order(folder: Path, pictures: dict[str, bytes]) -> None:
    found = pictures_in(folder / "images" / "object2")
    assert list(found.pictures) == [pictures[f"object2/view{number}.jpg"] for number in range(5)]
