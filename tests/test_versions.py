"""Publishing, roll-back and pins; see `test_garbage.py` for what gc does to them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cbir.lease
from cbir.artifacts import Done, create_done, find_done, put_part
from cbir.errors import ArtifactError, LeaseError
from cbir.lease import Lease
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def candidate(store: Store, content: str) -> Manifest:
    """A version of one file."""
    part = put_part(store, "merge", content, "index", content.encode(), "faiss")
    create_done(store, Done("merge", content, (part,), {}))
    return Manifest(0, content, {}, (part,), {}, {"indexed": 1}, (f"stages/merge/{content}/",))


def publish(store: Store, content: str) -> Manifest:
    """What a run does at its end."""
    versions = Versions(store)
    with versions.writing("cbir index") as held:
        return versions.publish(candidate(store, content), held)


def taken_over(store: Store, owner: str) -> Lease:
    """The lease of a run that takes over from one that gave no sign of life."""
    cbir.lease._held.clear()
    with Versions(store).writing(owner) as held:
        return held


def test_versions_count_up_and_current_follows(store: Store) -> None:
    versions = Versions(store)
    assert versions.current() is None
    first, second = publish(store, "a"), publish(store, "b")
    assert (first.version, first.parent, second.version, second.parent) == (1, None, 2, 1)
    assert versions.numbers() == [1, 2]
    assert versions.load() == second
    current = versions.current()
    assert current is not None
    assert (current.version, current.epoch, current.fence) == (2, 2, 2)


def test_publishing_the_same_content_again_changes_nothing(store: Store) -> None:
    first = publish(store, "a")
    assert publish(store, "a") == first
    assert Versions(store).numbers() == [1]


def test_a_version_that_was_committed_but_not_pointed_at_is_taken_up(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    orphan = replace(candidate(store, "b"), version=2, parent=1, write_id="of a run that died")
    assert store.create(versions.key(2), orphan.to_json())
    assert (versions.load().content, versions.numbers()) == ("a", [1])
    with pytest.raises(ArtifactError, match="no version 2; published are: 1"):
        versions.rollback(2)
    assert publish(store, "b") == orphan
    assert versions.numbers() == [1, 2]
    assert versions.load() == orphan


@pytest.mark.parametrize("at", ["publish", "_commit", "_check_presence", "_swap"])
def test_a_run_that_was_taken_over_publishes_nothing_whenever_it_wakes(
    at: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Versions(store)
    publish(store, "a")
    original = getattr(Versions, at)

    def asleep(self: Versions, *arguments: object, **changes: object) -> object:
        monkeypatch.undo()
        taken_over(store, "cbir index, later")
        return original(self, *arguments, **changes)

    with versions.writing("cbir index") as held:
        manifest = candidate(store, "b")
        monkeypatch.setattr(Versions, at, asleep)
        with pytest.raises(
            LeaseError, match=r"taken over \(fence 3 in CURRENT, the token of this run is 2\).*Run again"
        ):
            versions.publish(manifest, held)
    assert versions.load().content == "a"
    assert versions.numbers() == [1]


def test_the_first_version_of_a_store_is_fenced_too(store: Store) -> None:
    versions = Versions(store)
    with versions.writing("cbir index") as held:
        taken_over(store, "cbir index, later")
        with pytest.raises(LeaseError, match="taken over"):
            versions.publish(candidate(store, "a"), held)
    assert versions.current() is None


def test_a_roll_back_in_between_does_not_stop_a_run(store: Store) -> None:
    versions = Versions(store)
    for content in "ab":
        publish(store, content)
    with versions.writing("cbir index") as held:
        versions.rollback(1)
        assert versions.publish(candidate(store, "c"), held).parent == 1
    assert versions.load().content == "c"


def test_a_version_whose_file_is_gone_is_not_published_and_the_next_run_makes_it(store: Store) -> None:
    versions = Versions(store)
    with versions.writing("cbir index") as held:
        manifest = candidate(store, "a")
        store.delete(manifest.files[0].key)
        with pytest.raises(ArtifactError, match=r"part-\w+\.faiss, .*was deleted .* the same command makes it again"):
            versions.publish(manifest, held)
    assert versions.current() is None
    assert find_done(store, "merge", "a") is None
    assert publish(store, "a").version == 1


def test_a_file_that_a_silent_gc_may_still_delete_is_not_published(store: Store) -> None:
    versions, manifest = Versions(store), candidate(store, "a")
    with versions.writing("cbir index") as held:
        held.doomed = frozenset({manifest.files[0].key})
        with pytest.raises(ArtifactError, match=r"cbir gc.* deleted stages/merge/a/part-.*run `cbir unlock`"):
            versions.publish(manifest, held)
    assert versions.current() is None
    assert publish(store, "a").version == 1


def test_a_held_version_is_there_to_roll_to_and_readers_stay(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    with versions.writing("cbir index") as held:
        manifest = versions.publish(candidate(store, "b"), held, hold=True)
        assert versions.publish(candidate(store, "b"), held, hold=True).version == manifest.version == 2
    assert versions.load().content == "a"
    assert versions.numbers() == [1, 2]
    versions.rollback(2)
    assert versions.load().content == "b"


def test_the_same_content_without_hold_publishes_the_held_version(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    with versions.writing("cbir index") as held:
        versions.publish(candidate(store, "b"), held, hold=True)
        assert versions.publish(candidate(store, "b"), held).version == 2
    assert versions.load().version == 2


def test_roll_back_is_one_swap_with_a_higher_epoch(store: Store) -> None:
    versions = Versions(store)
    for content in "abc":
        publish(store, content)
    assert versions.rollback(1).content == "a"
    current = versions.current()
    assert current is not None
    assert (current.version, current.epoch) == (1, 4)
    assert publish(store, "d").version == 4
    assert versions.load().content == "d"
    with pytest.raises(ArtifactError, match="no version 9; published are: 1, 2, 3, 4"):
        versions.rollback(9)


def test_publishing_after_a_roll_back_takes_up_the_version_with_that_content(store: Store) -> None:
    versions = Versions(store)
    for content in "ab":
        publish(store, content)
    versions.rollback(1)
    assert publish(store, "b").version == 2
    assert versions.load().version == 2


def test_pins_need_a_version_and_are_set_once(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    for _ in range(2):
        versions.pin(1)
        assert versions.pinned() == [1]
    with pytest.raises(ArtifactError, match="no version 2; published are: 1"):
        versions.pin(2)
    for _ in range(2):
        versions.unpin(1)
        assert versions.pinned() == []


@pytest.mark.parametrize("change", [lambda v: v.rollback(1), lambda v: v.pin(1), lambda v: v.unpin(2)])
def test_a_change_of_current_in_between_is_seen(
    change: Callable[[Versions], object], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, swap = Versions(store), Versions._swap
    for content in "abc":
        publish(store, content)
    versions.pin(2)

    def overtaken(self: Versions, *arguments: object, **changes: object) -> bool:
        monkeypatch.undo()
        publish(store, "d")
        return swap(self, *arguments, **changes)  # type: ignore[arg-type]

    monkeypatch.setattr(Versions, "_swap", overtaken)
    change(versions)
    assert versions.numbers() == [1, 2, 3, 4]


def test_a_store_without_a_list_of_published_versions_has_all_that_are_committed(store: Store) -> None:
    versions = Versions(store)
    for content in "ab":
        publish(store, content)
    record = json.loads(store.read("CURRENT"))
    store.write(
        "CURRENT",
        json.dumps({name: record[name] for name in ("version", "manifest_sha256", "epoch", "write_id")}).encode(),
    )
    assert versions.numbers() == [1, 2]
    assert publish(store, "c").version == 3
    assert versions.numbers() == [1, 2, 3]


def test_a_current_that_was_deleted_is_made_again_and_forgets_no_version(store: Store) -> None:
    versions = Versions(store)
    for content in "ab":
        publish(store, content)
    store.delete("CURRENT")
    assert publish(store, "a").version == 1
    assert versions.rollback(2).content == "b"


def test_a_manifest_that_was_tampered_with_is_refused(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    store.write(versions.key(1), store.read(versions.key(1)).replace(b'"indexed": 1', b'"indexed": 2'))
    with pytest.raises(Exception, match="sha256"):
        versions.load()


def test_an_empty_store_says_what_to_do(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no published version; run `cbir index`"):
        Versions(store).load()


def test_a_roll_back_is_not_undone_by_a_run_whose_answer_was_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, swap = Versions(store), Versions._swap
    publish(store, "a")

    def answer_lost(self: Versions, *arguments: object, **changes: object) -> bool:
        monkeypatch.undo()
        assert swap(self, *arguments, **changes)  # type: ignore[arg-type]
        Versions(store).rollback(1)
        return False

    with versions.writing("cbir index") as held:
        manifest = candidate(store, "b")
        monkeypatch.setattr(Versions, "_swap", answer_lost)
        assert versions.publish(manifest, held).version == 2
    assert (versions.load().version, versions.numbers()) == (1, [1, 2])
