"""Records of finished work and leases."""

from pathlib import Path

import pytest

from cbir.artifacts import Done, create_done, find_done, lease, live_leases, put_part, sha256_of
from cbir.errors import ArtifactError
from cbir.storage import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_a_part_lies_under_its_own_hash(store: Store) -> None:
    part = put_part(store, "extract", "f" * 64, "features", b"content", "parquet")
    assert part.sha256 == sha256_of(b"content")
    assert part.key == f"stages/extract/{'f' * 64}/part-{part.sha256}.parquet"
    assert part.num_bytes == 7
    assert store.read(part.key, sha256=part.sha256) == b"content"


def test_a_record_survives_the_store(store: Store) -> None:
    part = put_part(store, "extract", "a", "features", b"x", "parquet")
    done = Done("extract", "a", (part,), {"images": 3}, {"dim": 4})
    assert find_done(store, "extract", "a") is None
    assert create_done(store, done) == done
    assert find_done(store, "extract", "a") == done
    assert done.file("features") == part
    with pytest.raises(ArtifactError, match="no file of role 'index'"):
        done.file("index")


def test_the_first_attempt_wins_and_the_second_takes_its_record(store: Store) -> None:
    first = Done("extract", "a", (), {"images": 1})
    create_done(store, first)
    assert create_done(store, Done("extract", "a", (), {"images": 2})) == first


def test_a_lease_lives_as_long_as_its_run(store: Store) -> None:
    with lease(store, "cbir index"):
        assert live_leases(store) == ["cbir index"]
        assert live_leases(store, now=4e9) == []
    assert live_leases(store) == []
