"""The actor of a query pool: partitions of the versions in use, memory-mapped, in a process of their own."""

import pickle
import threading
import traceback
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cbir.config import Config, parse_config
from cbir.errors import CbirError
from cbir.layout import Layout
from cbir.partition import LocalFiles, Partition, Partitions
from cbir.search import Question
from cbir.storage import open_store
from cbir.types import FeatureBatch
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
    """One question to one partition of an opening, or a search of several."""

    opening: Opening
    numbers: tuple[int, ...]
    question: Question
    arguments: tuple[Any, ...]

    @property
    def kind(self) -> Hashable:
        """What searches have in common that can be made together; nothing for other questions."""
        if self.question != "search":
            return None
        queries, *how = self.arguments
        return self.opening, self.numbers, tuple(queries), *how


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

    def __init__(self, store_uri: str, *, verify: bool = True) -> None:
        self._store, self._verify = open_store(store_uri), verify
        self._held: dict[Opening, Partitions] = {}
        self._closed: set[int] = set()
        self._opening = threading.Lock()

    def open(self, opening: Opening, numbers: Sequence[int]) -> None:
        """Open these partitions of a version; nothing if it was closed in the meantime."""
        with self._opening:
            held = self._parts(opening)
            missing = [number for number in numbers if number not in held]
            if missing and opening.serial not in self._closed:
                manifest = Versions(self._store).load(opening.version, opening.manifest_sha256)
                config, layout = parsed(manifest)
                files = LocalFiles(self._store, manifest, verify=self._verify)
                opened = {number: Partition(config, layout.partitions[number], files) for number in missing}
                self._held[opening] = Partitions({**held, **opened})

    def _parts(self, opening: Opening) -> Mapping[int, Partition]:
        held = self._held.get(opening)
        return held.parts if held else {}

    def call(self, calls: bytes) -> bytes:
        """Several calls in one, and their outcomes, pickled: Ray's own pickler takes far longer than a search."""
        return pickle.dumps(self.outcomes(pickle.loads(calls)), pickle.HIGHEST_PROTOCOL)

    def outcomes(self, calls: Sequence[Call]) -> list[Outcome]:
        """What each of several calls came to: the error of one is none of the others.

        Searches that differ in their queries alone are one search, at a fraction of what it takes one by one.
        """
        alike: dict[Hashable, list[int]] = {}
        for place, call in enumerate(calls):
            alike.setdefault(call.kind or place, []).append(place)
        outcomes: dict[int, Outcome] = {}
        for places in alike.values():
            some = [calls[place] for place in places]
            together = self._searched(some) if len(some) > 1 else None
            outcomes.update(zip(places, together or map(self._outcome, some), strict=True))
        return [outcomes[place] for place in range(len(calls))]

    def _searched(self, calls: Sequence[Call]) -> list[Outcome] | None:
        """The outcomes of searches of one kind, made together; None if that fails, so that each meets its own error."""
        every, (_, depth, labelled) = [call.arguments[0] for call in calls], calls[0].arguments
        try:
            queries = {name: FeatureBatch.concatenate([one[name] for one in every]) for name in every[0]}
            found = self._holding(calls[0]).only(calls[0].numbers).search(queries, depth, labelled)
        except Exception:  # noqa: BLE001 - what it was is found when they are made one by one
            return None
        outcomes, begins = [], dict.fromkeys(queries, 0)
        for one in every:
            ends = {name: begin + len(one[name]) for name, begin in begins.items()}
            outcomes.append(Outcome(found.of_queries({name: slice(begins[name], ends[name]) for name in ends})))
            begins = ends
        return outcomes

    def _outcome(self, call: Call) -> Outcome:
        try:
            held = self._holding(call)
            asked = held.only(call.numbers) if call.question == "search" else held.parts[call.numbers[0]]
            return Outcome(getattr(asked, call.question)(*call.arguments))
        except CbirError as error:
            return Outcome(error=error)
        except Exception:  # noqa: BLE001 - a defect that one query meets is raised where that query was asked
            return Outcome(error=RuntimeError(f"a query actor failed:\n{traceback.format_exc()}"))

    def _holding(self, call: Call) -> Partitions:
        """What is held of an opening, with at least the partitions that a call is for."""
        if not self._parts(call.opening).keys() >= set(call.numbers):
            self.open(call.opening, call.numbers)
        try:
            return self._held[call.opening]
        except KeyError:
            raise CbirError(f"version {call.opening.version} was closed before its query was answered") from None

    def close(self, opening: Opening) -> None:
        """Let go of what no query uses any more, and never open it again for a query that was given up."""
        with self._opening:
            self._closed.add(opening.serial)
            self._held.pop(opening, None)

    def versions(self) -> list[int]:
        """The versions that it holds, in the order in which they were opened."""
        return [opening.version for opening in sorted(self._held, key=lambda opening: opening.serial)]


def parsed(manifest: Manifest) -> tuple[Config, Layout]:
    """The configuration and the files of a version."""
    return parse_config(manifest.config, f"version {manifest.version}"), Layout.from_json(manifest.layout)
