"""The HTTP service: the pool's answers, refusals that say why, figures, and the command that starts it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import cbir
from cbir.config import parse_config
from cbir.errors import ConfigError, DataError, StorageError
from cbir.layout import Labels
from cbir.search import Answer
from cbir.storage import open_store
from cbir.types import Hits
from cbir.versions import Versions
from pipelines import service
from pipelines.indexing import index
from pipelines.query_pool import QueryPool
from pipelines.serve import listen, read_token
from pipelines.service import Service, Settings
from tests.pipelines.test_cli import cbir as command

pytestmark = pytest.mark.service

KEY = "object3/view1.jpg"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Client:
    """A service of this machine, asked over HTTP."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, {**self.headers, **named})
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read().decode())

    def search(self, body: bytes, query: str = "", **headers: str) -> Reply:
        return self.ask("POST", f"/search{query}", body, **headers)

    def metrics(self) -> dict[str, float]:
        """Values by name, with the status where there is one."""
        families = text_string_to_metric_families(self.ask("GET", "/metrics").text)
        return {
            f"{sample.name}{sample.labels.get('status', '')}": sample.value
            for family in families
            for sample in family.samples
            if "le" not in sample.labels
        }


@contextlib.contextmanager
def running(pool: Any, settings: Settings) -> Iterator[Client]:
    """A service on a free port of loopback, in a thread."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(Service(pool, settings).app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions: 1 ranks by RANSAC's inliers, 2 by the VLAD vectors alone."""
    uri = str(tmp_path_factory.mktemp("serve") / "store")
    index(parse_config(settings(store=uri), "version 1"))
    index(parse_config(settings(store=uri, search={"depth": 50}), "version 2"))
    Versions(open_store(uri)).rollback(1)
    return uri


@pytest.fixture(scope="module")
def pool(store: str) -> Iterator[QueryPool]:
    with QueryPool(store) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(pool: QueryPool) -> Iterator[Client]:
    with running(pool, Settings(deadline_s=60, max_body_bytes=50_000, poll_s=0.05)) as found:
        yield found


@pytest.fixture(scope="module")
def vector(store: str, pictures: dict[str, bytes]) -> list[float]:
    encoder = cbir.open(store, 1).encoder
    rows = encoder.encode(encoder.extract([pictures[KEY]], [None]))["local"].descriptors
    return [float(value) for value in rows[0]]


def test_a_picture_finds_what_it_finds_in_this_process(client: Client, store: str, pictures: dict[str, bytes]) -> None:
    searcher = cbir.open(store, 1)
    for query, expected in (
        ("?depth=5", searcher.search(pictures[KEY], 5)),
        ("", searcher.search(pictures[KEY], 10)),
        ("?depth=4&box=20,20,120,120", searcher.search(pictures[KEY], 4, (20, 20, 120, 120))),
    ):
        reply = client.search(pictures[KEY], query)
        assert reply.status == 200
        found = [(result["key"], result["score"], result["channels"]) for result in reply.json["results"]]
        assert found == [(result.key, result.score, dict(result.channels)) for result in expected]
        assert (reply.json["version"], reply.json["missing"]) == (1, [])


def test_a_vector_finds_what_it_finds_in_this_process(client: Client, store: str, vector: list[float]) -> None:
    expected = cbir.open(store, 1).search(np.array(vector, np.float32), 6)
    for body in ({"vector": vector}, {"vector": vector, "channel": "local"}):
        reply = client.search(json.dumps(body).encode(), "?depth=6", Content_Type="application/json; charset=utf-8")
        assert [result["key"] for result in reply.json["results"]] == [result.key for result in expected]
        assert [result["score"] for result in reply.json["results"]] == [result.score for result in expected]


@pytest.mark.parametrize(
    ("body", "kind", "query", "status", "message"),
    [
        (b"", "image/jpeg", "", 400, "the body is empty"),
        (b"{", "application/json", "", 400, "not valid JSON"),
        (b"\xff", "application/json", "", 400, "not valid JSON"),
        (b"[" * 40_000, "application/json", "", 400, "not valid JSON"),
        (b"[1]", "application/json", "", 422, "body: "),
        (b"{}", "application/json", "", 422, "vector: Field required"),
        (b'{"vector": []}', "application/json", "", 422, "vector: "),
        (b'{"vector": ["a"]}', "application/json", "", 422, "vector.0: "),
        (b'{"vector": [NaN]}', "application/json", "", 422, "NaN or infinite"),
        (b'{"vector": [1e300]}', "application/json", "", 422, "NaN or infinite"),
        (b'{"vector": [1], "chanel": "x"}', "application/json", "", 422, "chanel: "),
        (b'{"vector": [1, 2]}', "application/json", "", 422, "have D = 2, but the index was trained on D = "),
        (b'{"vector": [1], "channel": "lcal"}', "application/json", "", 422, "no channel 'lcal'; did you mean 'local'"),
        (b"no picture", "image/jpeg", "", 422, "not_an_image"),
        (b"no picture", "application/x-www-form-urlencoded", "", 422, "not_an_image"),
        (b"x", "image/jpeg", "?depth=0", 422, "depth"),
        (b"x", "image/jpeg", "?deadline=-1", 422, "deadline"),
        (b"x", "image/jpeg", "?box=1,2,3", 422, "box must be X,Y,W,H in pixels, found '1,2,3'"),
        (b'{"vector": [1]}', "application/json", "?box=1,2,3,4", 422, "a vector has none"),
        (b"x", "multipart/form-data; boundary=x", "", 415, "curl --data-binary"),
        (b"x" * 50_001, "image/jpeg", "", 413, "50001 bytes, this service accepts 50000"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(
    client: Client, body: bytes, kind: str, query: str, status: int, message: str
) -> None:
    reply = client.search(body, query, Content_Type=kind)
    assert reply.status == status
    assert message in str(reply.json["detail"])


def test_a_body_without_a_length_is_refused_once_it_is_too_large(client: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/search", iter([b"x" * 30_000, b"x" * 30_000]), encode_chunked=True)
        assert connection.getresponse().status == 413


def test_a_box_outside_of_the_picture_is_refused(client: Client, pictures: dict[str, bytes]) -> None:
    reply = client.search(pictures[KEY], "?box=900,0,9,9")
    assert (reply.status, "lies outside the query picture" in reply.json["detail"]) == (422, True)


def test_figures_count_what_was_asked(client: Client, pictures: dict[str, bytes]) -> None:
    before = client.metrics()
    client.search(pictures[KEY])
    client.search(pictures[KEY], "?depth=0")
    client.search(b"no picture")
    after = client.metrics()
    for name, more in (("requests_total200", 1), ("requests_total422", 2), ("search_seconds_count", 3)):
        assert after[f"cbir_{name}"] - before.get(f"cbir_{name}", 0) == more
    assert after["cbir_search_seconds_sum"] > before.get("cbir_search_seconds_sum", 0)
    assert (after["cbir_version"], after["cbir_partitions"], after["cbir_errors_total"]) == (1, 1, 0)


def test_the_api_describes_itself(client: Client) -> None:
    described = client.ask("GET", "/openapi.json").json
    search = described["paths"]["/search"]["post"]
    assert set(search["requestBody"]["content"]) == {"image/*", "application/json"}
    assert {"depth", "box", "deadline"} == {parameter["name"] for parameter in search["parameters"]}
    assert {"200", "413", "422"} <= set(search["responses"])
    assert client.ask("GET", "/docs").status == 200


def test_it_follows_current_and_survives_a_version_that_cannot_be_opened(
    client: Client, store: str, pictures: dict[str, bytes]
) -> None:
    versions = Versions(open_store(store))
    part = versions.load(2).layout["partitions"][0]
    path = Path(store) / part["ids"]
    kept = path.rename(path.with_suffix(".gone"))
    try:
        versions.rollback(2)
        wait_until(lambda: client.metrics()["cbir_refresh_errors_total"] > 0)
        assert client.ask("GET", "/health").json == {"version": 1, "partitions": 1}
        assert client.search(pictures[KEY]).json["version"] == 1
        kept.rename(path)
        wait_until(lambda: bool(client.ask("GET", "/health").json["version"] == 2))
        assert client.search(pictures[KEY]).json["version"] == 2
    finally:
        if kept.exists():
            kept.rename(path)
        versions.rollback(1)
        wait_until(lambda: bool(client.ask("GET", "/health").json["version"] == 1))


def test_load_can_be_put_on_it(
    client: Client, store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, target = f"http://127.0.0.1:{client.port}", tmp_path / "load.json"
    options = ["--rate", 40, "--seconds", 1, "--depth", 10, "--json", target]
    assert command("bench-query", url, "--vectors-of", store, *options).code == 0
    found = json.loads(target.read_text())
    assert found["recall"] == {"1": 1.0, "10": 1.0}
    assert (found["errors"], found["partial"], found["versions"]) == (0, 0, [1])
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= found["max_ms"]
    outcome = command("bench-query", url, "--pictures", folder / "images" / "broken", *options)
    assert outcome.code == 1
    assert "answered 422" in outcome.err
    assert "--vectors-of INDEX" in command("bench-query", url).err


@dataclass
class Stub:
    """A pool that says what it is told to."""

    says: Answer | Exception
    version: int = 7
    num_partitions: int = 2
    asked: list[Any] = field(default_factory=list)

    def refresh(self) -> bool:
        return False

    def answer(self, *arguments: Any) -> Answer:
        self.asked.append(arguments)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


def answer_without(*missing: int) -> Answer:
    hits = Hits(np.array([[5]]), np.array([[0.5]], np.float32))
    labels = Labels(np.array([5]), ["five"], np.ones((1, 2), np.int32))
    return Answer(hits, {"one": hits}, {}, labels, 7, hits, 0.0, missing)


@pytest.mark.parametrize(
    ("says", "status", "message"),
    [
        (answer_without(0, 1), 504, "no partition answered before the deadline"),
        (StorageError("s3://secret/place is down"), 503, "the index cannot answer now"),
        (DataError("no such thing"), 422, "no such thing"),
    ],
)
def test_failures_are_told_apart(says: Any, status: int, message: str) -> None:
    with running(Stub(says), Settings()) as client:
        reply = client.search(b"picture")
        assert reply.status == status
        assert message in reply.json["detail"]
        assert "secret" not in reply.text
        assert client.metrics()["cbir_errors_total"] == (status >= 500)


def test_a_partial_answer_says_what_is_missing() -> None:
    stub = Stub(answer_without(1))
    with running(stub, Settings(deadline_s=3)) as client:
        assert client.search(b"picture", "?deadline=0.5").json == {
            "version": 7,
            "missing": [1],
            "results": [{"key": "five", "score": 0.5, "channels": {"one": 0.5}}],
        }
        client.search(b"picture", "?deadline=99")
        client.search(b"picture")
        assert client.metrics()["cbir_partial_answers_total"] == 3
    assert [arguments[-1] for arguments in stub.asked] == [0.5, 3, 3]


def test_too_many_queries_at_once_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may be under way; both wait in the pool when the third comes."""
    monkeypatch.setattr(service, "_MOST_AT_ONCE", 2)
    began, go_on = threading.Semaphore(0), threading.Event()

    class Slow(Stub):
        def answer(self, *arguments: Any) -> Answer:
            began.release()
            assert go_on.wait(60)
            return super().answer(*arguments)

    with running(Slow(answer_without()), Settings()) as client, ThreadPoolExecutor(2) as threads:
        two = [threads.submit(client.search, b"picture") for _ in range(2)]
        try:
            assert began.acquire(timeout=60)
            assert began.acquire(timeout=60)
            third = client.search(b"picture")
            assert (third.status, third.headers["retry-after"]) == (503, "1")
            assert client.ask("GET", "/health").status == 200
        finally:
            go_on.set()
        assert [future.result().status for future in two] == [200, 200]
        assert client.search(b"picture").status == 200


def test_a_token_is_asked_for_where_there_is_one() -> None:
    with running(Stub(answer_without()), Settings(token="söcret")) as client:
        for path, method in (("/search", "POST"), ("/metrics", "GET")):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic c8O2Y3JldA=="}):
                reply = client.ask(method, path, b"picture", **given)
                assert reply.status == 401
                assert reply.headers["www-authenticate"] == "Bearer"
        assert client.ask("GET", "/health").status == 200
    with running(Stub(answer_without()), Settings(token="secret")) as client:
        assert client.search(b"picture", Authorization="Bearer secret").status == 200


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CBIR_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("CBIR_TOKEN", "one")
    assert read_token(None) == "one"
    (tmp_path / "token").write_text("two\n")
    assert read_token(tmp_path / "token") == "two"
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_token(tmp_path / "token")


class TestCommand:
    def test_serves_until_it_is_told_to_end(self, store: str, tmp_path: Path, pictures: dict[str, bytes]) -> None:
        (tmp_path / "token").write_text("secret")
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "serve", store, "--port", "0", "--token-file", tmp_path / "token"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            port = re.search(r"serving version 1 of .* at http://127\.0\.0\.1:(\d+)", line)
            assert port is not None, line
            client = Client(int(port[1]), {"Authorization": "Bearer secret"})
            wait_until(lambda: is_up(client))
            assert client.search(pictures[KEY]).json["results"][0]["key"] == KEY
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--port", "{taken}"], 2, "cannot listen on 127.0.0.1 port {taken}: Address already in use"),
            (["--host", "no.such.host.invalid"], 2, "cannot listen on no.such.host.invalid"),
            (["--token-file", "/nowhere/token"], 1, "/nowhere/token: No such file"),
            (["--actors", "0"], 2, "--actors"),
        ],
    )
    def test_what_cannot_be_served_is_an_error(self, store: str, options: list[str], code: int, message: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            outcome = command("serve", store, *(option.format(taken=port) for option in options))
        assert outcome.code == code
        assert message.format(taken=port) in outcome.err

    def test_an_empty_store_has_nothing_to_serve(self, tmp_path: Path) -> None:
        outcome = command("serve", tmp_path, "--port", 0)
        assert outcome.code == 1
        assert "run `cbir index` first" in outcome.err


def is_up(client: Client) -> bool:
    try:
        return client.ask("GET", "/health").status == 200
    except OSError:
        return False
