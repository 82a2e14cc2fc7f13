"""The actor of a query pool: partitions of the versions in use, memory-mapped, in a process of their own."""

import pickle
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cbir.config import Config, parse_config
from cbir.errors import CbirError
from cbir.layout import Layout
from cbir.partition import LocalFiles, Partition
from cbir.search import Question
from cbir.storage import open_store
from cbir.versions import Manifest, Versions

__all__ = ["Call", "Holder", "Opening", "Outcome", "parsed"]


@dataclass(frozen=True)
class Opening:
    """One opening of a version. A version that is opened again (roll-back) while old queries still use it is another
    opening, so that their end closes nothing but their own."""

    serial: int
    version: int
    manifest_sha256: str


@dataclass(frozen=True)
class Call:
    """One question to one partition of an opening."""

    opening: Opening
    number: int
    question: Question
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What a call came to: its value, or its error."""

    value: Any = None
    error: Exception | None = None


class Holder:
    """Partitions by opening. Ray gives its process as many OpenMP threads as it has processors.

    It opens what it is asked for and does not hold yet, so that an actor which died and was started again goes on.
    Calls and the other methods run in two threads: a version is opened while another answers.
    """

    def __init__(self, store_uri: str) -> None:
        self._store = open_store(store_uri)
        self._partitions: dict[Opening, dict[int, Partition]] = {}
        self._closed: set[int] = set()
        self._opening = threading.Lock()

    def open(self, opening: Opening, numbers: Sequence[int]) -> None:
        """Open these partitions of a version; nothing if it was closed in the meantime."""
        with self._opening:
            held = self._partitions.get(opening, {})
            missing = [number for number in numbers if number not in held]
            if missing and opening.serial not in self._closed:
                manifest = Versions(self._store).load(opening.version, opening.manifest_sha256)
                config, layout = parsed(manifest)
                files = LocalFiles(self._store, manifest)
                opened = {number: Partition(config, layout.partitions[number], files) for number in missing}
                self._partitions[opening] = {**held, **opened}

    def call(self, calls: bytes) -> bytes:
        """Several calls in one, and their outcomes, pickled: Ray's own pickler takes far longer than a search."""
        return pickle.dumps(self.outcomes(pickle.loads(calls)), pickle.HIGHEST_PROTOCOL)

    def outcomes(self, calls: Sequence[Call]) -> list[Outcome]:
        """What each of several calls came to: the error of one is none of the others."""
        return [self._outcome(call) for call in calls]

    def _outcome(self, call: Call) -> Outcome:
        try:
            return Outcome(getattr(self._partition(call), call.question)(*call.arguments))
        except CbirError as error:
            return Outcome(error=error)
        except Exception:  # noqa: BLE001 - a defect that one query meets is raised where that query was asked
            return Outcome(error=RuntimeError(f"a query actor failed:\n{traceback.format_exc()}"))

    def _partition(self, call: Call) -> Partition:
        if call.number not in self._partitions.get(call.opening, {}):
            self.open(call.opening, [call.number])
        try:
            return self._partitions[call.opening][call.number]
        except KeyError:
            raise CbirError(f"version {call.opening.version} was closed before its query was answered") from None

    def close(self, opening: Opening) -> None:
        """Let go of what no query uses any more, and never open it again for a query that was given up."""
        with self._opening:
            self._closed.add(opening.serial)
            self._partitions.pop(opening, None)

    def versions(self) -> list[int]:
        """The versions that it holds, in the order in which they were opened."""
        return [opening.version for opening in sorted(self._partitions, key=lambda opening: opening.serial)]


def parsed(manifest: Manifest) -> tuple[Config, Layout]:
    """The configuration and the files of a version."""
    return parse_config(manifest.config, f"version {manifest.version}"), Layout.from_json(manifest.layout)
