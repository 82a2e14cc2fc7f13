"""What gc takes and what it leaves, and what nobody can do with what it gave up."""

from pathlib import Path

import pytest

from cbir.artifacts import StoredFile
from cbir.errors import ArtifactError, LeaseError
from cbir.garbage import garbage, sweep
from cbir.storage import Store, open_store
from cbir.versions import Versions
from tests.test_versions import candidate, publish, taken_over


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def would_go(store: Store, keep: int) -> set[str]:
    return {info.key for info in garbage(Versions(store), keep)}


def collect(store: Store, keep: int) -> set[str]:
    versions = Versions(store)
    with versions.writing("cbir gc") as held:
        return {info.key for info in sweep(versions, keep, held)}


def test_it_takes_what_no_kept_version_needs(store: Store) -> None:
    versions = Versions(store)
    files: dict[str, StoredFile] = {}
    for content in "abcd":
        files[content] = publish(store, content).files[0]
    store.write("stages/extract/unfinished/part-0.parquet", b"?")
    versions.pin(1)
    versions.rollback(2)
    gone = {
        versions.key(3),
        "stages/merge/c/DONE.json",
        files["c"].key,
        "stages/extract/unfinished/part-0.parquet",
    }
    assert would_go(store, keep=1) == gone
    assert collect(store, keep=1) == gone
    assert versions.numbers() == [1, 2, 4]
    versions.unpin(1)
    assert files["a"].key in would_go(store, keep=1)
    collect(store, keep=0)
    assert versions.numbers() == [2]
    assert versions.load().content == "b"
    assert would_go(store, keep=0) == collect(store, keep=0) == set()


def test_it_waits_for_a_run_that_is_alive(store: Store) -> None:
    publish(store, "a")
    publish(store, "b")
    with (
        Versions(store).writing("cbir index of somebody"),
        pytest.raises(LeaseError, match="being written by cbir index of somebody"),
    ):
        collect(store, keep=0)
    assert Versions(store).numbers() == [1, 2]


def test_nothing_leads_back_to_a_version_that_was_given_up(store: Store) -> None:
    versions = Versions(store)
    for content in "abc":
        publish(store, content)
    with versions.writing("cbir gc") as held:
        assert versions.give_up(1, held) == [3]
        assert store.read(versions.key(1)), "nothing is deleted yet"
        for go_back in (versions.rollback, versions.pin):
            with pytest.raises(ArtifactError, match="no version 1; published are: 3"):
                go_back(1)


def test_numbers_are_never_used_again(store: Store) -> None:
    versions = Versions(store)
    for content in "abc":
        publish(store, content)
    versions.rollback(1)
    orphan = candidate(store, "d")
    store.create(versions.key(4), orphan.to_json())
    collect(store, keep=0)
    assert [info.key for info in store.list("versions/")] == [versions.key(1)]
    assert publish(store, "c").version == 5


def test_it_stops_before_the_next_deletions_where_it_was_taken_over(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    publish(store, "b")
    with versions.writing("cbir gc") as held:
        collecting = sweep(versions, 0, held)
        assert next(collecting).key == versions.key(1)
        taken_over(store, "cbir index")
        with pytest.raises(LeaseError, match="taken over"):
            list(collecting)


def test_of_a_run_that_was_taken_over_nothing_is_given_up(store: Store) -> None:
    versions = Versions(store)
    publish(store, "a")
    publish(store, "b")
    with versions.writing("cbir gc") as held:
        taken_over(store, "cbir index")
        with pytest.raises(LeaseError, match="taken over"):
            list(sweep(versions, 0, held))
    assert versions.numbers() == [1, 2]


def test_a_record_that_is_written_late_goes_before_its_files(store: Store) -> None:
    versions, manifest = Versions(store), candidate(store, "late")
    record = store.read("stages/merge/late/DONE.json")
    store.delete("stages/merge/late/DONE.json")
    with versions.writing("cbir gc") as held:
        store.write("candidates/refused.json", b"")
        collecting = sweep(versions, 0, held)
        assert next(collecting).key == "candidates/refused.json"
        store.create("stages/merge/late/DONE.json", record)
        assert [info.key for info in collecting] == [manifest.files[0].key]
    assert list(store.list("stages/")) == []
