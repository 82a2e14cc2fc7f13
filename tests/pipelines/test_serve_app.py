"""The service as an application of Ray Serve: deployed here by the configuration of the RayService, and asked."""

import contextlib
import http.client
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import cbir
from cbir.config import parse_config
from pipelines.indexing import index
from pipelines.serve import TOKEN_VARIABLE, serve
from pipelines.serve_app import Arguments
from tests.conftest import PROJECT

pytestmark = pytest.mark.service

KEY = "object3/view1.jpg"


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("served") / "store")
    index(parse_config(settings(store=path), "the test"))
    return path


@pytest.fixture(scope="module")
def port(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a deployment as that of the RayService, but of one small replica, on this machine."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    (folder / "serve.yaml").write_text(yaml.safe_dump(small_config(store, number)))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml"), "--app-dir", str(PROJECT)]
    log = folder / "log"
    with log.open("w") as opened:
        environment = os.environ | {TOKEN_VARIABLE: "secret", "RAY_ADDRESS": "local"}  # not that of another test
        process = subprocess.Popen(command, stdout=opened, stderr=opened, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 180
        while status_of(number) != 200:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield number
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(180)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started, should it not have ended


def small_config(store: str, port: int) -> Any:
    """The configuration in the manifest, for this store and one replica that needs no resource of its own."""
    manifest = next(yaml.safe_load_all((PROJECT / "deploy" / "kuberay" / "rayservice.yaml").read_text()))
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    [application] = config["applications"]
    application["args"] |= {"store": store, "actors": 1, "replicas": 1, "poll": 0.2}
    application["deployments"][0] |= {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    return config


def ask(port: int, method: str, path: str, body: bytes | None = None, token: str = "secret") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        return response.status, response.read().decode()


def status_of(port: int) -> int | None:
    """What the path of the readiness probe answers; None while nothing listens."""
    try:
        return ask(port, "GET", "/health")[0]
    except ConnectionError:
        return None


def test_it_answers_as_the_searcher_does(port: int, store: str, pictures: dict[str, bytes]) -> None:
    status, text = ask(port, "POST", "/search?depth=5", pictures[KEY])
    expected = [(result.key, result.score) for result in cbir.open(store).search(pictures[KEY], 5)]
    assert status == 200
    assert [(found["key"], found["score"]) for found in json.loads(text)["results"]] == expected


def test_the_token_is_asked_for_and_searches_are_counted(port: int, pictures: dict[str, bytes]) -> None:
    assert ask(port, "POST", "/search", pictures[KEY], token="wrong")[0] == 401
    assert 'cbir_requests_total{status="401"} 1.0' in ask(port, "GET", "/metrics")[1]


def test_it_swaps_to_what_is_published(port: int, store: str, settings: Callable[..., dict[str, Any]]) -> None:
    """The service's own thread, which Ray Serve starts with the application, follows CURRENT."""
    before = json.loads(ask(port, "GET", "/health")[1])["version"]
    published = index(parse_config(settings(store=store, search={"depth": 20}), "the test")).version
    assert published > before
    end = time.monotonic() + 60
    while json.loads(ask(port, "GET", "/health")[1])["version"] != published:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("wrong", [{}, {"store": "index", "actor": 2}, {"store": "index", "replicas": 0}])
def test_arguments_are_checked_before_anything_is_deployed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Arguments.model_validate(wrong)


def test_arguments_are_the_options_of_the_command() -> None:
    options = {name: option.default for name, option in inspect.signature(serve).parameters.items()}
    arguments = {name: field.default for name, field in Arguments.model_fields.items() if name != "store"}
    others = {"index", "host", "port", "ray", "token_file"}
    assert arguments == {name: default for name, default in options.items() if name not in others}
