"""Publishing, roll-back, pins and garbage."""

from dataclasses import replace
from pathlib import Path

import pytest

from cbir.artifacts import StoredFile, lease, put_part
from cbir.errors import ArtifactError
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def candidate(store: Store, content: str) -> Manifest:
    """A version of one file."""
    part = put_part(store, "merge", content, "index", content.encode(), "faiss")
    return Manifest(0, content, {}, (part,), {}, {"indexed": 1}, (f"stages/merge/{content}/",))


def test_versions_count_up_and_current_follows(store: Store) -> None:
    versions = Versions(store)
    assert versions.current() is None
    first = versions.publish(candidate(store, "a"))
    second = versions.publish(candidate(store, "b"))
    assert (first.version, first.parent, second.version, second.parent) == (1, None, 2, 1)
    assert versions.numbers() == [1, 2]
    assert versions.load() == second
    current = versions.current()
    assert current is not None
    assert (current.version, current.epoch) == (2, 2)


def test_publishing_the_same_content_again_changes_nothing(store: Store) -> None:
    versions = Versions(store)
    first = versions.publish(candidate(store, "a"))
    assert versions.publish(candidate(store, "a")) == first
    assert versions.numbers() == [1]


def test_a_version_that_was_committed_but_not_pointed_at_is_taken_up(store: Store) -> None:
    versions = Versions(store)
    versions.publish(candidate(store, "a"))
    orphan = replace(candidate(store, "b"), version=2, parent=1, write_id="of a run that died")
    assert store.create(versions.key(2), orphan.to_json())
    assert versions.load().content == "a"
    assert versions.publish(candidate(store, "b")) == orphan
    assert versions.numbers() == [1, 2]
    assert versions.load() == orphan


def test_a_slow_publisher_does_not_move_current_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Versions(store), Versions(store)
    swap = Versions._swap

    def overtaken(self: Versions, *arguments: object) -> bool:
        monkeypatch.setattr(Versions, "_swap", swap)
        fast.publish(candidate(store, "fast"))
        return swap(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Versions, "_swap", overtaken)
    assert slow.publish(candidate(store, "slow")).version == 1
    assert slow.load().content == "fast"
    assert slow.numbers() == [1, 2]


def test_roll_back_is_one_swap_with_a_higher_epoch(store: Store) -> None:
    versions = Versions(store)
    for content in "abc":
        versions.publish(candidate(store, content))
    assert versions.rollback(1).content == "a"
    current = versions.current()
    assert current is not None
    assert (current.version, current.epoch) == (1, 4)
    assert versions.publish(candidate(store, "d")).version == 4
    assert versions.load().content == "d"
    with pytest.raises(ArtifactError, match="no version 9; published are: 1, 2, 3, 4"):
        versions.rollback(9)


def test_publishing_after_a_roll_back_takes_up_the_version_with_that_content(store: Store) -> None:
    versions = Versions(store)
    for content in "ab":
        versions.publish(candidate(store, content))
    versions.rollback(1)
    assert versions.publish(candidate(store, "b")).version == 2
    assert versions.load().version == 2


def test_a_manifest_that_was_tampered_with_is_refused(store: Store) -> None:
    versions = Versions(store)
    versions.publish(candidate(store, "a"))
    store.write(versions.key(1), store.read(versions.key(1)).replace(b'"indexed": 1', b'"indexed": 2'))
    with pytest.raises(Exception, match="sha256"):
        versions.load()


def garbage(versions: Versions, keep: int) -> set[str]:
    return {key for key, _ in versions.garbage(keep)}


def test_garbage_is_what_no_kept_version_needs(store: Store) -> None:
    versions = Versions(store)
    files: dict[str, StoredFile] = {}
    for content in "abcd":
        files[content] = versions.publish(candidate(store, content)).files[0]
    store.write("stages/extract/unfinished/part-0.parquet", b"?")
    versions.pin(1)
    versions.rollback(2)
    assert garbage(versions, keep=1) == {
        versions.key(3),
        files["c"].key,
        "stages/extract/unfinished/part-0.parquet",
    }
    versions.unpin(1)
    assert files["a"].key in garbage(versions, keep=1)
    for key in garbage(versions, keep=0):
        store.delete(key)
    assert versions.numbers() == [2]
    assert versions.load().content == "b"
    assert garbage(versions, keep=0) == set()


def test_gc_waits_for_a_run_that_is_alive(store: Store) -> None:
    versions = Versions(store)
    versions.publish(candidate(store, "a"))
    with lease(store, "cbir index of somebody"), pytest.raises(ArtifactError, match="cbir index of somebody"):
        garbage(versions, keep=1)


def test_an_empty_store_says_what_to_do(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no published version; run `cbir index`"):
        Versions(store).load()
