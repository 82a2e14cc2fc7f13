"""Thousands of schedules of the real commit protocol: the store fails, processes die, sleep and wake too late."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import pytest

import cbir.lease
import cbir.versions
from cbir.artifacts import dump_json
from cbir.lease import Lease, Writer
from cbir.storage import Store
from cbir.versions import CURRENT, Current, Manifest, Versions
from tests.simulation.schedule import Schedule, in_simulation
from tests.simulation.server import MISFORTUNES

__all__ = ["in_simulation"]

SCHEDULES, AT_ONCE = 5000, 500

pytestmark = pytest.mark.usefixtures("in_simulation")


def run(seed: int) -> Schedule:
    """A failure says which seed makes it again."""
    schedule = Schedule(seed)
    try:
        schedule.run()
    except BaseException as error:
        error.add_note(f"This makes it again: Schedule({seed}).run(); its `log` says what changed when.")
        raise
    return schedule


def run_all(seeds: Iterable[int]) -> Counter[str]:
    """What happened in these schedules, added up."""
    happened: Counter[str] = Counter()
    for seed in seeds:
        happened += run(seed).happened
    return happened


@pytest.mark.parametrize("first", range(0, SCHEDULES, AT_ONCE))
def test_no_schedule_breaks_the_store(first: int) -> None:
    happened = run_all(range(first, first + AT_ONCE))
    usual = ("crashes", "sleeps", "publications", "deletions", "operations", "reads")
    refused = [f"refused because {why}" for why in ("taken over", "another is alive")]
    assert [kind for kind in (*usual, *refused, *MISFORTUNES) if happened[kind] < 3] == [], "they try everything"


def test_a_seed_makes_the_same_schedule_again() -> None:
    for seed in range(20):
        assert run(seed).log == run(seed).log


def publish_without_if_match(self: Versions, current: Current, tag: str, **changes: Any) -> bool:
    pointer = replace(current, write_id=cbir.versions.uuid.uuid4().hex, **changes)
    self.store.write(CURRENT, dump_json(asdict(pointer)))
    return True


def take_the_lease_without_if_match(store: Store, writer: Writer, tag: str) -> bool:
    store.write(cbir.lease.WRITER, dump_json(asdict(writer)))
    return True


def collect_without_giving_up(self: Versions, keep: int, held: Lease) -> list[int]:
    return self.kept(keep)


def number_by_what_is_there(self: Versions, manifest: Manifest, current: Current) -> Manifest:
    number = max([*self._committed(), current.version])
    while True:
        number += 1
        numbered = replace(manifest, version=number, write_id=cbir.versions.uuid.uuid4().hex)
        if self.store.create(self.key(number), numbered.to_json()):
            return numbered


def do_nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (Versions, "_swap", publish_without_if_match),
        (Versions, "_refuse_fenced", do_nothing),
        (Versions, "_refuse_doomed", do_nothing),
        (Versions, "_commit", number_by_what_is_there),
        (Versions, "give_up", collect_without_giving_up),
        (Lease, "_announce", do_nothing),
        (cbir.lease, "_swap", take_the_lease_without_if_match),
    ],
)
def test_a_planted_bug_is_found(
    where: object, name: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, bug)
    with pytest.raises(AssertionError) as found:
        run_all(range(SCHEDULES))
    assert "This makes it again: Schedule(" in found.value.__notes__[-1]
