"""Credentials that are planted in the environment turn up nowhere: not in outputs, stores, logs or process lists."""

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbir.storage import open_store
from tests.service.conftest import free_port

pytestmark = pytest.mark.service

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key-3f1c",
    "AWS_SESSION_TOKEN": "planted-session-token-9b2e",
    "CBIR_TOKEN": "planted-bearer-token-77aa",
}
POLL_S = 0.2


@dataclass
class Watched:
    """Commands of one environment: what they print, and the command lines of all processes of the machine meanwhile."""

    environment: dict[str, str]
    said: list[str] = field(default_factory=list)
    command_lines: set[bytes] = field(default_factory=set)

    def run(self, *arguments: object, code: int = 0) -> str:
        with self.started(*arguments) as process:
            while process.poll() is None:
                self.look()
            assert process.stdout is not None
            self.said.append(process.stdout.read())
        assert process.returncode == code, self.said[-1]
        return self.said[-1]

    def started(self, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def look(self) -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                self.command_lines.add(path.read_bytes())
            except OSError:  # it has ended in the meantime
                continue
        time.sleep(POLL_S)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray logs; its path is short, as sockets lie there."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def watched(moto_bucket: str, ray_folder: Path) -> Watched:
    return Watched({**os.environ, **SECRETS, "RAY_TMPDIR": str(ray_folder), "COLUMNS": "240"})


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def test_they_turn_up_nowhere(
    watched: Watched,
    moto_bucket: str,
    ray_folder: Path,
    small_settings: Callable[..., dict[str, Any]],
    pictures: dict[str, bytes],
    tmp_path: Path,
) -> None:
    uri, config = f"s3://{moto_bucket}/index", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_settings(uri, workers=2)))
    (tmp_path / "query.jpg").write_bytes(pictures["object0/view0.jpg"])
    watched.run("index", config, "--report", tmp_path / "report")
    watched.run("search", uri, tmp_path / "query.jpg", "--html", tmp_path / "found.html")
    assert "s3://no-such-bucket" in watched.run("versions", "s3://no-such-bucket/index", code=1)
    endpoint = watched.environment["AWS_ENDPOINT_URL"]
    watched.environment |= {"AWS_ENDPOINT_URL": f"http://user:{SECRETS['CBIR_TOKEN']}@127.0.0.1:{free_port()}"}
    watched.environment |= {"CBIR_S3_ATTEMPTS": "1"}
    assert "no answer from http://***@127.0.0.1" in watched.run("versions", uri, code=1)
    watched.environment["AWS_ENDPOINT_URL"] = endpoint
    serve(watched, uri)

    places = {"said": "\n".join(watched.said).encode(), "command lines": b"\n".join(watched.command_lines)}
    assert b"pipelines.cli" in places["command lines"]
    store = open_store(uri)
    places |= {info.key: store.read(info.key) for info in store.list()}
    logs = read_all(ray_folder)
    assert any("worker-" in name for name in logs), "Ray's logs were read"
    places |= logs | read_all(tmp_path)
    for name, secret in SECRETS.items():
        assert [place for place, data in places.items() if secret.encode() in data] == [], name


def serve(watched: Watched, uri: str) -> None:
    """Serve for a moment, to one who knows the token and to one who does not."""
    with watched.started("serve", uri, "--port", 0) as process:
        assert process.stdout is not None
        try:
            line = ""
            while not (found := re.search(r"serving version 1 of .* at http://127\.0\.0\.1:(\d+)", line)):
                line = process.stdout.readline()
                assert line, "the service has ended"
                watched.said.append(line)
            watched.look()
            for token, status in ((SECRETS["CBIR_TOKEN"], 200), ("wrong", 401)):
                connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
                connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {token}"})
                answer = connection.getresponse()
                watched.said.append(answer.read().decode())
                assert answer.status == status
                connection.close()
        finally:
            process.send_signal(signal.SIGTERM)
            watched.said.append(process.stdout.read())
