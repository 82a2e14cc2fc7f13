"""Real servers for tests: moto for speed, Ceph's radosgw for evidence."""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from cbir.config import parse_config
from cbir.storage import open_store
from pipelines.indexing import index
from tests.service.faults import FaultServer
from tests.service.radosgw import Radosgw
from tests.service.runs import stages_of

PROJECT = Path(__file__).resolve().parents[2]
LONGEST = ("test_real_photographs", "test_pipeline_radosgw", "test_crashes", "test_planted_secrets", "test_nodes")
MOTO_PAGE = 10  # keys per page of a listing, so that small tests turn pages
RADOSGW_UP = PROJECT / "deploy" / "s3" / "radosgw-up"
RADOSGW_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool", "curl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of a moto server, a child process."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(MOTO_PAGE)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_port(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextlib.contextmanager
def running_radosgw(folder: Path) -> Iterator[Radosgw]:
    """A radosgw that is started by the project's own script; about 15 s."""
    missing = [program for program in RADOSGW_PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install radosgw ceph-mon ceph-osd ceph-common curl")
    port = free_port()
    started = subprocess.run([RADOSGW_UP, folder, str(port)], capture_output=True, text=True, timeout=300)
    assert started.returncode == 0, started.stderr
    try:
        yield Radosgw(folder, port)
    finally:
        subprocess.run([RADOSGW_UP, "--stop", folder], check=True, timeout=60)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a radosgw that nobody kills."""
    with running_radosgw(tmp_path_factory.mktemp("radosgw")) as server:
        yield server.endpoint


@pytest.fixture
def use_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Point boto3, and the processes that the test starts, at an endpoint with the test servers' credentials."""

    return functools.partial(point_at, monkeypatch, tmp_path)


def point_at(monkeypatch: pytest.MonkeyPatch, folder: Path, endpoint: str) -> None:
    """Point the environment at an endpoint; `folder` has no AWS configuration."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "cbirkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "cbirsecret123")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "no-credentials"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


@pytest.fixture
def moto_bucket(moto: str, use_endpoint: Callable[[str], None]) -> str:
    """A new bucket on moto, with the environment pointing there."""
    use_endpoint(moto)
    return new_bucket()


@pytest.fixture
def radosgw_bucket(radosgw: str, use_endpoint: Callable[[str], None]) -> str:
    """A new bucket on radosgw, with the environment pointing there."""
    use_endpoint(radosgw)
    return new_bucket()


@pytest.fixture
def faults(moto: str, moto_bucket: str, use_endpoint: Callable[[str], None]) -> Iterator[FaultServer]:
    """A fault server before moto, with the environment pointing to it; it passes everything on until told otherwise."""
    with FaultServer(moto) as server:
        use_endpoint(server.endpoint)
        yield server


@pytest.fixture(scope="session")
def small(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures and a broken one."""
    root = tmp_path_factory.mktemp("small")
    for key in [*list(pictures)[:11], "broken/text.jpg"]:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(pictures[key])
    return root


@pytest.fixture(scope="session")
def small_settings(settings: Callable[..., dict[str, Any]], small: Path) -> Callable[..., dict[str, Any]]:
    """Plain settings of an index of the small collection, in three shards, in this store."""

    def make(store: str, **changes: Any) -> dict[str, Any]:
        return settings(
            **{"images": str(small), "store": store, "input": {"shard_images": 10}, "sample": {"images": 10}, **changes}
        )

    return make


@pytest.fixture(scope="session")
def undisturbed(
    small_settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The bytes of all stages of the small collection after a run that nothing disturbs."""
    uri = str(tmp_path_factory.mktemp("undisturbed"))
    index(parse_config(small_settings(uri), "the reference"))
    return stages_of(open_store(uri))


def new_bucket() -> str:
    """Make a bucket at the endpoint of the environment."""
    name = f"test-{uuid.uuid4().hex}"
    plain_client(os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=name)
    return name


@functools.cache
def plain_client(endpoint: str) -> Any:
    """A boto3 client as anybody would make it; one for all tests of an endpoint, because making one takes 0.1 s."""
    return boto3.session.Session().client("s3", endpoint_url=endpoint)


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server has ended"
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")
