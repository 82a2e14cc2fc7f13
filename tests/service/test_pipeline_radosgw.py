"""The whole pipeline on a real radosgw while processes, a Ray node, credentials and the server itself are lost.

A night is `cbir index` of a few pictures, and `cbir reindex` after one was deleted and one was added. It passes through
every stage there is. Whatever happens, it ends with the bytes of a night that nothing disturbs.
"""

import functools
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cbir.config import Config, parse_config
from cbir.errors import StorageError
from cbir.storage import Store, open_store
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.reindex import reindex
from pipelines.run import Silent
from pipelines.work import Report, Task
from tests.service.conftest import new_bucket, point_at, running_radosgw
from tests.service.radosgw import Radosgw
from tests.service.runs import Recorder, assert_current_is_whole, run_in_child, stages_of
from tests.service.test_crashes import WORDS
from tests.service.test_nodes import DENSE, two_nodes

pytestmark = pytest.mark.service

Command = Callable[..., Any]

INDEXED = ("extract", "sample", "codebook", "train", "build", "totals", "catalog", "merge", "background", "evaluate")
REINDEXED = ("verify bytes", "drift", "changes")
"""Those that only a re-index has."""
PUBLISHED = [f"publish.{what}.{when}" for what in ("manifest", "current") for when in ("before", "after")]
COMMANDS: Sequence[tuple[Command, Sequence[str]]] = (
    (index, INDEXED),
    (functools.partial(reindex, verify_bytes=True), REINDEXED),
)

PICTURES = 20
AWAY_S = 60.0


@dataclass(frozen=True)
class Collection:
    """The pictures of before and after, in the same place."""

    store: Store
    pictures: dict[str, bytes]

    def lay_out(self, night: int) -> None:
        """Bring it to the state before `cbir index` (0) or `cbir reindex` (1)."""
        keys = list(self.pictures)[night : PICTURES + night]
        for gone in {info.key for info in self.store.list()}.difference(keys):
            self.store.delete(gone)
        for key in keys:
            self.store.write(key, self.pictures[key])


@dataclass(frozen=True)
class Night:
    """Key and sha256 of what lies in a store after a command: the stages, and the files of the published version.

    Not the looks at the bytes of unchanged shards: every run has its own.
    """

    stages: set[tuple[str, str]]
    files: set[tuple[str, str]]

    @classmethod
    def of(cls, store: Store) -> "Night":
        assert_current_is_whole(store)
        stages = {
            (key, digest) for key, digest in stages_of(store).items() if not key.startswith("stages/verify bytes/")
        }
        return cls(stages, {(file.key, file.sha256) for file in Versions(store).load().files})


def assert_ended_as(night: Night, uri: str) -> None:
    """The store holds what it would hold if nothing had happened."""
    found = Night.of(open_store(uri))
    assert found.stages ^ night.stages == set()
    assert found.files ^ night.files == set()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Radosgw]:
    """A radosgw of our own, because it is killed."""
    with running_radosgw(tmp_path_factory.mktemp("away")) as started:
        yield started


@pytest.fixture(scope="module")
def bucket(server: Radosgw, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket for all nights."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, tmp_path_factory.mktemp("aws"), server.endpoint)
        return new_bucket()


@pytest.fixture(autouse=True)
def at_server(
    server: Radosgw, use_endpoint: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of a run, with a cache of its own."""
    use_endpoint(server.endpoint)
    monkeypatch.setenv("CBIR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def collection(bucket: str, pictures: dict[str, bytes]) -> Collection:
    return Collection(open_store(f"s3://{bucket}/photos"), pictures)


@pytest.fixture
def night_of(settings: Callable[..., dict[str, Any]], bucket: str) -> Callable[..., dict[str, Any]]:
    """Plain settings of two channels, by which every stage is needed."""

    def make(store: str, **changes: Any) -> dict[str, Any]:
        return settings(
            images=f"s3://{bucket}/photos",
            store=store,
            input={"shard_images": 10},
            channels={"local": WORDS, "global": DENSE},
            sample={"images": PICTURES},
            search={"fuse": {"name": "adaptive"}},
            **changes,
        )

    return make


@pytest.fixture(scope="module")
def nights() -> list[Night]:
    """Filled by `undisturbed`, once."""
    return []


@pytest.fixture
def undisturbed(
    nights: list[Night],
    collection: Collection,
    night_of: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Night]:
    """After `cbir index` and after `cbir reindex`, on a disk; leaves the collection as before them."""
    if not nights:
        config = configured(night_of(str(tmp_path_factory.mktemp("undisturbed"))))
        for number, (command, _) in enumerate(COMMANDS):
            collection.lay_out(number)
            command(config)
            nights.append(Night.of(open_store(config.store)))
    collection.lay_out(0)
    return nights


def configured(settings: dict[str, Any]) -> Config:
    return parse_config(settings, "the test")


def tokens_of(folder: Path, number: int, points: Sequence[str]) -> dict[str, Path]:
    """The file by which a failpoint shows that somebody died there, in the run of this number."""
    (folder / "died").mkdir(exist_ok=True)
    return {point: folder / "died" / f"{number} {point}" for point in points}


def failpoints(tokens: dict[str, Path]) -> str:
    return ",".join(f"{point}={token}" for point, token in tokens.items())


class At(Silent):
    """Does something when the first task of a stage has ended."""

    def __init__(self, stage: str, action: Callable[[], None]) -> None:
        self._stage, self._action = stage, action
        self.has_acted = False

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        """Once."""
        if task.stage == self._stage and not self.has_acted:
            self.has_acted = True
            self._action()


class TestKills:
    def test_the_driver_is_killed_in_every_stage(
        self,
        undisturbed: list[Night],
        collection: Collection,
        night_of: Callable[..., dict[str, Any]],
        bucket: str,
        tmp_path: Path,
    ) -> None:
        settings = night_of(f"s3://{bucket}/driver")
        for number, (command, stages) in enumerate(COMMANDS):
            collection.lay_out(number)
            tokens = tokens_of(tmp_path, number, [*(f"{stage}.done.after" for stage in stages), *PUBLISHED])
            for deaths in range(1, len(tokens) + 1):
                child = run_in_child(command, settings, failpoints(tokens))
                assert child.exitcode == -signal.SIGKILL
                assert sum(token.exists() for token in tokens.values()) == deaths
            command(configured(settings))
            assert_ended_as(undisturbed[number], settings["store"])

    def test_a_worker_is_killed_in_every_stage_and_a_node_in_the_middle(
        self,
        undisturbed: list[Night],
        collection: Collection,
        night_of: Callable[..., dict[str, Any]],
        bucket: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        runs = [
            tokens_of(tmp_path, number, [f"{stage}.done.before" for stage in stages])
            for number, (_, stages) in enumerate(COMMANDS)
        ]
        for token in runs[1].values():
            token.touch()  # nobody dies there in the first run
        monkeypatch.setenv("CBIR_FAILPOINT", ",".join(map(failpoints, runs)))
        with two_nodes() as (cluster, node):
            settings = night_of(f"s3://{bucket}/worker", workers=2, ray=cluster.address)

            def lose() -> None:
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

            watch = At("build", lose)
            for number, (command, _) in enumerate(COMMANDS):
                collection.lay_out(number)
                command(configured(settings), watch)
                assert all(token.exists() for token in runs[number].values()), "a worker died in each of these stages"
                assert_ended_as(undisturbed[number], settings["store"])
                for token in runs[1].values():
                    token.unlink()
        assert watch.has_acted


def test_the_server_is_away_for_a_minute(
    undisturbed: list[Night],
    night_of: Callable[..., dict[str, Any]],
    server: Radosgw,
    bucket: str,
) -> None:
    settings = night_of(f"s3://{bucket}/away", workers=2)
    returns: list[threading.Timer] = []

    def go_away() -> None:
        returns.append(threading.Timer(AWAY_S, server.start, [server.kill()]))
        returns[0].start()

    watch = At("extract", go_away)
    try:
        index(configured(settings), watch)
    finally:
        for timer in returns:
            timer.join()
    assert watch.has_acted
    assert_ended_as(undisturbed[0], settings["store"])


class TestExpiringCredentials:
    @pytest.fixture
    def sign_with(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Let the environment name a profile that holds this key, with a secret of the same name."""
        file, answer = tmp_path / kind, tmp_path / "answer.json"

        def write(key: str) -> None:
            for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(variable, raising=False)
            monkeypatch.setenv("AWS_PROFILE", "nightly")
            monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE" if kind == "file" else "AWS_CONFIG_FILE", str(file))
            if kind == "file":
                file.write_text(f"[nightly]\naws_access_key_id = {key}\naws_secret_access_key = {key}\n")
            else:
                file.write_text(f"[profile nightly]\ncredential_process = cat {answer}\n")
                keys = {"AccessKeyId": key, "SecretAccessKey": key, "Expiration": "2999-01-01T00:00:00Z"}
                answer.write_text(json.dumps({"Version": 1, **keys}))

        return write

    @pytest.mark.parametrize("kind", ["file", "process"])
    def test_a_run_goes_on_with_those_that_are_there_now(
        self,
        kind: str,
        sign_with: Callable[[str], None],
        undisturbed: list[Night],
        night_of: Callable[..., dict[str, Any]],
        server: Radosgw,
        bucket: str,
    ) -> None:
        def renew() -> None:
            server.add_key(f"{kind}-new", f"{kind}-new")
            sign_with(f"{kind}-new")
            server.remove_key(f"{kind}-old")

        server.add_key(f"{kind}-old", f"{kind}-old")
        sign_with(f"{kind}-old")
        watch = At("extract", renew)
        settings = night_of(f"s3://{bucket}/{kind}")
        index(configured(settings), watch)
        assert watch.has_acted
        assert_ended_as(undisturbed[0], settings["store"])

    @pytest.mark.parametrize("kind", ["file"])
    def test_without_others_it_says_so_and_the_same_command_goes_on(
        self,
        sign_with: Callable[[str], None],
        undisturbed: list[Night],
        night_of: Callable[..., dict[str, Any]],
        server: Radosgw,
        bucket: str,
    ) -> None:
        settings = night_of(f"s3://{bucket}/expired")
        server.add_key("expiring", "expiring")
        sign_with("expiring")
        with pytest.raises(StorageError, match=r"InvalidAccessKeyId.*wrong or expired, see AWS_ACCESS_KEY_ID.*PROFILE"):
            index(configured(settings), At("extract", lambda: server.remove_key("expiring")))
        server.add_key("fresh", "fresh")
        sign_with("fresh")
        again = Recorder()
        index(configured(settings), again)
        assert [record.split("/")[1] for record in again.reused if record not in again.done][:1] == ["extract"]
        assert_ended_as(undisturbed[0], settings["store"])
