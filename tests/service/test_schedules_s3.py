"""Schedules of the simulation on a real radosgw, which is killed in the middle of requests and started again."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cbir.storage import S3Settings
from cbir.storage.s3 import _client
from cbir.storage.s3_errors import S3_ERRORS
from tests.service.conftest import new_bucket, point_at, running_radosgw
from tests.service.radosgw import Radosgw
from tests.simulation.schedule import Schedule, in_simulation
from tests.simulation.server import Change, Server

__all__ = ["in_simulation"]

SCHEDULES = 20
KILLS = 2
LONGEST_REQUEST_S = 0.02

pytestmark = [pytest.mark.service, pytest.mark.usefixtures("in_simulation")]

real_client = _client
"""Of cbir; the simulation puts its own in its place."""


class KilledServer(Server):
    """Every request goes to radosgw; what it holds is followed in `objects`, by its answers and by reading."""

    def __init__(self, *arguments: Any, radosgw: Radosgw, bucket: str, seed: int) -> None:
        super().__init__(*arguments)
        self._radosgw = radosgw
        self._s3 = real_client(f"s3://{bucket}", S3Settings())
        self._bucket = bucket
        self._folder = f"schedule {seed}/"
        self._chance = random.Random(seed)
        self._kills = KILLS

    def put(self, key: str, data: bytes) -> None:
        """Without a condition."""
        self._s3.put_object(**self._where(key), Body=data)
        super().put(key, data)

    def _where(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._folder + key}

    def apply(self, change: Change, *, answer: bool = True) -> None:
        """Send it; what became of it if no answer came is seen by reading."""
        try:
            with self._perhaps_killed():
                self._send(change)
        except ClientError:
            if answer:
                raise
        except S3_ERRORS:
            self._look(change)
            if answer:
                raise
        else:
            self._note(change, change.data)

    def _send(self, change: Change) -> None:
        if change.data is None:
            self._s3.delete_object(**self._where(change.key))
        else:
            self._s3.put_object(**self._where(change.key), Body=change.data, **change.condition)

    @contextlib.contextmanager
    def _perhaps_killed(self) -> Iterator[None]:
        """Kill the server at any moment of the request, and start it again afterwards."""
        if not self._kills or self._chance.random() > 0.1:
            yield
            return
        self._kills -= 1
        self.happened["kills"] += 1
        commands: list[list[str]] = []
        killing = threading.Timer(
            LONGEST_REQUEST_S * self._chance.random(), lambda: commands.append(self._radosgw.kill())
        )
        killing.start()
        try:
            yield
        finally:
            killing.join()
            self._radosgw.start(commands[0])

    def _look(self, change: Change) -> None:
        self.happened["unknown outcomes"] += 1
        try:
            found = self._s3.get_object(**self._where(change.key))["Body"].read()
        except ClientError:
            found = None
        if found != self.objects.get(change.key):
            assert found == change.data
            self.happened["applied, and the server died"] += 1
            self._note(change, found)

    def _note(self, change: Change, data: bytes | None) -> None:
        if data is None:
            self.objects.pop(change.key, None)
            self.tags.pop(change.key, None)
        else:
            super().put(change.key, data)
        self.watch(change.machine, change.token, change.key, data)

    def find(self, key: str, operation: str) -> tuple[bytes, str]:
        """What radosgw holds must be what its answers say."""
        try:
            found = self._s3.get_object(**self._where(key))
        except ClientError as error:
            assert key not in self.objects, f"radosgw lost {key}"
            raise ClientError(error.response, operation) from error
        data = found["Body"].read()
        assert data == self.objects[key], f"radosgw holds another {key}"
        return data, found["ETag"].strip('"')

    def page(self, prefix: str, after: str) -> Mapping[str, Any]:
        """A page of its listing."""
        more: dict[str, Any] = {"ContinuationToken": after} if after else {}
        found = self._s3.list_objects_v2(Bucket=self._bucket, Prefix=self._folder + prefix, MaxKeys=8, **more)
        for entry in found.get("Contents", []):
            entry["Key"] = entry["Key"].removeprefix(self._folder)
        return dict(found)


def _listed(server: Server) -> Iterator[str]:
    page: Mapping[str, Any] = {"NextContinuationToken": ""}
    while "NextContinuationToken" in page:
        page = server.page("", page["NextContinuationToken"])
        yield from (entry["Key"] for entry in page["Contents"])


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Radosgw]:
    """A radosgw of our own: for half a minute after a kill it is slow to make buckets, which others need."""
    with running_radosgw(tmp_path_factory.mktemp("mortal")) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(mortal: Radosgw, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket for all schedules."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, tmp_path_factory.mktemp("aws"), mortal.endpoint)
        return new_bucket()


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_schedule_with_a_server_that_is_killed(
    seed: int, mortal: Radosgw, bucket: str, use_endpoint: Callable[[str], None]
) -> None:
    use_endpoint(mortal.endpoint)
    schedule = Schedule(seed, partial(KilledServer, radosgw=mortal, bucket=bucket, seed=seed))
    try:
        schedule.run()
    except BaseException as error:
        error.add_note("\n".join(["What changed when:", *schedule.log]))
        raise
    assert set(_listed(schedule.server)) == set(schedule.server.objects)
    assert schedule.happened["kills"] >= 1
