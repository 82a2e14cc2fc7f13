"""Records of finished work."""

from pathlib import Path

import pytest

from cbir.artifacts import Done, create_done, find_done, put_part, sha256_of
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


@pytest.mark.parametrize(
    "content",
    [
        b'{"stage": ',
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"stage": "extract"}',
        b'{"files": 1}',
        b'{"files": [], "stbge": 1}',
    ],
    ids=["cut", "list", "binary", "deep", "few fields", "another type", "misspelt"],
)
def test_a_damaged_record_is_named(store: Store, content: bytes) -> None:
    store.write("stages/extract/a/DONE.json", content)
    with pytest.raises(
        ArtifactError, match=r"extract/a/DONE\.json is damaged \(.*; delete it and run `cbir index` again"
    ):
        find_done(store, "extract", "a")


def test_the_first_attempt_wins_and_the_second_takes_its_record(store: Store) -> None:
    first = Done("extract", "a", (), {"images": 1})
    create_done(store, first)
    assert create_done(store, Done("extract", "a", (), {"images": 2})) == first
