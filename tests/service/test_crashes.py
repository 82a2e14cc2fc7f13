"""SIGKILL at every step of the commit protocol: the same command again gives the bytes of an undisturbed run."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cbir.config import parse_config
from cbir.storage import Store, open_store
from cbir.verification import check_files
from cbir.versions import Versions
from pipelines.indexing import Silent, index
from pipelines.work import Report, Task

STAGES = ("extract", "sample", "train", "build", "catalog", "merge", "evaluate")
FAILPOINTS = [
    *(f"{stage}.{what}.{when}" for stage in STAGES for what in ("part", "done") for when in ("before", "after")),
    *(f"publish.{what}.{when}" for what in ("manifest", "current") for when in ("before", "after")),
]

pytestmark = pytest.mark.service

spawned = multiprocessing.get_context("forkserver")
spawned.set_forkserver_preload(["pipelines.indexing"])


class Recorder(Silent):
    def __init__(self) -> None:
        self.done: list[str] = []
        self.reused: list[str] = []

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        (self.reused if reused else self.done).append(f"{task.stage} {task.fingerprint}")


@pytest.fixture(scope="session")
def small(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures and a broken one."""
    root = tmp_path_factory.mktemp("small")
    for key in [*list(pictures)[:11], "broken/text.jpg"]:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(pictures[key])
    return root


@pytest.fixture
def small_settings(settings: Callable[..., dict[str, Any]], small: Path) -> Callable[..., dict[str, Any]]:
    def make(store: str, **changes: Any) -> dict[str, Any]:
        return settings(images=str(small), store=store, input={"shard_images": 4}, **changes)

    return make


def run(settings: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    index(parse_config(settings, "the child"))


def stages_of(store: Store) -> dict[str, str]:
    return {info.key: hashlib.sha256(store.read(info.key)).hexdigest() for info in store.list("stages/")}


@pytest.fixture(scope="session")
def undisturbed(
    settings: Callable[..., dict[str, Any]], small: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The bytes of all stages after a run that nothing disturbs."""
    uri = str(tmp_path_factory.mktemp("undisturbed"))
    index(parse_config(settings(images=str(small), store=uri, input={"shard_images": 4}), "the reference"))
    return stages_of(open_store(uri))


@pytest.fixture(params=["file", "moto"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store."""
    if request.param == "file":
        return str(tmp_path / "store")
    uri: str = request.getfixturevalue("moto_bucket")
    return uri


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_killed_driver_goes_on_where_it_was(
    failpoint: str,
    store_uri: str,
    small_settings: Callable[..., dict[str, Any]],
    undisturbed: dict[str, str],
) -> None:
    settings = small_settings(store_uri)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    child = spawned.Process(target=run, args=(settings, {**environment, "CBIR_FAILPOINT": failpoint}))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, f"{failpoint} was never reached"
    store = open_store(store_uri)
    assert_current_is_whole(store)
    finished = {key for key in stages_of(store) if key.endswith("DONE.json")}
    again = Recorder()
    manifest = index(parse_config(settings, "again"), again)
    assert len(again.reused) == len(finished)
    assert manifest.version == 1
    assert Versions(store).numbers() == [1]
    assert stages_of(store) == undisturbed
    assert_current_is_whole(store)


def assert_current_is_whole(store: Store) -> None:
    versions = Versions(store)
    if versions.current() is not None:
        check_files(store, versions.load())


def test_a_worker_killed_in_every_stage_is_replaced(
    small_settings: Callable[..., dict[str, Any]],
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [f"{stage}.done.before={tmp_path / stage}" for stage in STAGES]
    monkeypatch.setenv("CBIR_FAILPOINT", ",".join(points))
    manifest = index(parse_config(small_settings(str(tmp_path / "store"), workers=2), "on Ray"))
    assert all((tmp_path / stage).exists() for stage in STAGES), "a worker died in every stage"
    assert manifest.version == 1
    assert stages_of(open_store(str(tmp_path / "store"))) == undisturbed
