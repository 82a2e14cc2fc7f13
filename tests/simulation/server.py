"""An S3 server in memory that fails like real ones, under the real S3 client code of cbir (`cbir.storage.s3`).

A request may be lost on the way, be answered although it changed nothing, change something although no answer comes, be
applied twice, or much later. Deletions are the exception that `cbir.lease` names: once one was answered, an earlier
request to delete the same object has no effect any more.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import ClientError, ReadTimeoutError

from tests.simulation.world import Machine, World

__all__ = ["MISFORTUNES", "Change", "Client", "Faults", "Server"]

_TIME_OUT_S = 20.0
_LATEST_S = 600.0
_PAGE = 8
MISFORTUNES = (
    "error",
    "silence",
    "late",
    "conflict",
    "applied, error",
    "applied, silence",
    "applied twice",
    "applied, and again late",
)


@dataclass(frozen=True)
class Faults:
    """How likely a request meets each kind of misfortune."""

    fault: float = 0.0
    """The answer is lost, late or wrong."""
    crash: float = 0.0
    """The process that sends it dies."""
    stall: float = 0.0
    """The process that sends it sleeps for long, before the request arrives."""
    away: tuple[float, float] = (0.0, 0.0)
    """From when until when no request is answered at all."""


@dataclass(frozen=True)
class Change:
    """What changes an object."""

    machine: Machine
    token: int
    key: str
    data: bytes | None
    """None: delete."""
    condition: Mapping[str, str] = field(default_factory=dict)
    """IfMatch or IfNoneMatch, as it was sent."""

    def holds(self, tag: str | None) -> bool:
        """Whether the condition holds for an object with this tag, or for none."""
        if "IfNoneMatch" in self.condition:
            return tag is None
        return "IfMatch" not in self.condition or self.condition["IfMatch"].strip('"') == tag


class Server:
    """The objects and the requests that are still on their way; `watch` sees every change."""

    def __init__(
        self,
        world: World,
        faults: Faults,
        watch: Callable[[Machine, int, str, bytes | None], None],
        happened: Counter[str],
    ) -> None:
        self.world = world
        self.happened = happened
        self.faults = faults
        self.watch = watch
        self.objects: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self._late: list[tuple[float, Change]] = []

    def request(self, apply: Callable[[], Any], change: Change | None = None) -> Any:
        """One request of the running process, with all that may happen to it."""
        world, faults, chance = self.world, self.faults, self.world.random
        worse = 4 if world.machine.collects else 1
        if chance.random() < faults.stall * worse:
            self.happened["sleeps"] += 1
            world.machine.asleep_until = world.now + chance.choice((5, 60, 400, 2000)) * chance.random()
        world.sleep(0.02 * chance.random())
        self._apply_late(world.now)
        if chance.random() < faults.crash * worse:
            self._crash(change)
        if faults.away[0] <= world.now < faults.away[1]:
            raise self._time_out()
        if chance.random() < faults.fault:
            return self._fail(apply, change)
        return apply()

    def _crash(self, change: Change | None) -> None:
        self.happened["crashes"] += 1
        if change is not None:
            self._perhaps_later(change)
        self.world.crash()

    def _fail(self, apply: Callable[[], Any], change: Change | None) -> Any:
        kind = self.world.random.choice(MISFORTUNES)
        self.happened[kind] += 1
        if kind.startswith("applied"):
            answer = apply()
        if kind == "applied twice":  # a proxy repeats the request; the answer is that to the repetition
            return apply()
        if kind == "applied, and again late" and change is not None and change.data is not None:
            self._later(change)
            return answer
        if kind == "late" and change is not None:
            self._later(change)
        if kind == "conflict" and change is not None and change.data is not None:
            raise _error(409, "ConditionalRequestConflict")
        if kind.endswith("error"):
            raise _error(500, "InternalError")
        raise self._time_out()

    def _later(self, change: Change) -> None:
        self._late.append((self.world.now + _LATEST_S * self.world.random.random(), change))

    def _time_out(self) -> ReadTimeoutError:
        self.world.sleep(_TIME_OUT_S)
        return ReadTimeoutError(endpoint_url="simulated")

    def _perhaps_later(self, change: Change) -> None:
        fate = self.world.random.random()
        if fate < 0.3:
            self.apply(change, answer=False)
        elif fate < 0.6:
            self._later(change)

    def settle(self) -> None:
        """Apply all that is still on its way, and be well from now on."""
        self.faults = Faults()
        self._apply_late(until=float("inf"))

    def _apply_late(self, until: float) -> None:
        due = [entry for entry in self._late if entry[0] <= until]
        for entry in due:
            self._late.remove(entry)
            self.apply(entry[1], answer=False)

    def put(self, key: str, data: bytes) -> None:
        """Without a request."""
        self.objects[key] = data
        self.tags[key] = hashlib.md5(data, usedforsecurity=False).hexdigest()

    def apply(self, change: Change, *, answer: bool = True) -> None:
        """Do what a request says; ClientError if its condition does not hold, unless nobody waits for the answer."""
        found = self.tags.get(change.key)
        if not change.holds(found):
            if answer:
                raise _error(412, "PreconditionFailed") if found else _error(404, "NoSuchKey")
            return
        if change.data is None:
            if answer:
                self._late = [late for late in self._late if late[1].key != change.key or late[1].data is not None]
            if found is None:
                return
            del self.objects[change.key], self.tags[change.key]
        else:
            self.put(change.key, change.data)
        self.watch(change.machine, change.token, change.key, change.data)

    def find(self, key: str, operation: str) -> tuple[bytes, str]:
        """The object and its tag."""
        if key not in self.objects:
            raise _error(404, "NoSuchKey", operation)
        return self.objects[key], self.tags[key]

    def page(self, prefix: str, after: str) -> Mapping[str, Any]:
        """Some keys of a listing."""
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        page, more = keys[:_PAGE], len(keys) > _PAGE
        contents = [{"Key": key, "Size": len(self.objects[key]), "ETag": f'"{self.tags[key]}"'} for key in page]
        return {"Contents": contents, "IsTruncated": more, **({"NextContinuationToken": page[-1]} if more else {})}


class Client:
    """What `cbir.storage.s3` uses of a boto3 client."""

    meta = SimpleNamespace(endpoint_url="http://simulated")

    def __init__(self, server: Server) -> None:
        self._server = server

    def put_object(self, *, Key: str, Body: bytes, **more: Any) -> dict[str, Any]:
        """Conditional or not."""
        condition = {name: value for name, value in more.items() if name in ("IfMatch", "IfNoneMatch")}
        self._change(Change(*self._sender(), Key, Body, condition))
        return {}

    def delete_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        """Unconditional."""
        self._change(Change(*self._sender(), Key, None))
        return {}

    def _sender(self) -> tuple[Machine, int]:
        machine = self._server.world.machine
        return machine, machine.token

    def _change(self, change: Change) -> None:
        self._server.request(lambda: self._server.apply(change), change)

    def get_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        """Whole objects only."""
        data, tag = self._server.request(lambda: self._server.find(Key, "GetObject"))
        return {"Body": io.BytesIO(data), "ETag": f'"{tag}"'}

    def head_object(self, *, Key: str, **_: Any) -> dict[str, Any]:
        """Size and tag."""
        data, tag = self._server.request(lambda: self._server.find(Key, "HeadObject"))
        return {"ContentLength": len(data), "ETag": f'"{tag}"'}

    def head_bucket(self, **_: Any) -> dict[str, Any]:
        """It is always there."""
        return {}

    def list_objects_v2(self, *, Prefix: str, ContinuationToken: str = "", **_: Any) -> dict[str, Any]:
        """In pages of a few keys."""
        return dict(self._server.request(lambda: self._server.page(Prefix, ContinuationToken)))


def _error(status: int, code: str, operation: str = "PutObject") -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, operation)
