"""The whole pipeline on bad storage: right bytes in the end, or a clear error and an unchanged CURRENT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import cbir
from cbir.config import parse_config
from cbir.errors import ArtifactError, CbirError, DataError, StorageError, UnsafeStore
from cbir.lease import writer_of
from cbir.storage import Store, open_store
from cbir.versions import Versions
from pipelines.indexing import index
from tests.service.conftest import new_bucket, point_at
from tests.service.faults import ALWAYS, FaultServer, Kind
from tests.service.runs import assert_current_is_whole, stages_of

pytestmark = pytest.mark.service

Settings = Callable[..., dict[str, Any]]

BURST = 3
ATTEMPTS = 4
IMAGE = "photos/object0/view3.jpg"
QUERY = "object0/view1.jpg"
CHANGES: dict[str, Any] = {"sample": {"seed": 1}}
"""Settings of another version: everything after `extract` is to be done again."""


@pytest.fixture(scope="session")
def photos(moto: str, small: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small collection on S3."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, tmp_path_factory.mktemp("aws"), moto)
        store = open_store(f"s3://{new_bucket()}/photos")
        for path in sorted(small.rglob("*.jpg")):
            store.write(path.relative_to(small).as_posix(), path)
    return store.uri


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short time-outs and pauses, and a cache of the test's own."""
    monkeypatch.setenv("CBIR_S3_READ_S", "0.5")
    monkeypatch.setenv("CBIR_S3_ATTEMPTS", str(ATTEMPTS))
    monkeypatch.setenv("CBIR_S3_PATIENCE_S", "0.01")
    monkeypatch.setenv("CBIR_S3_PAUSE_S", "0.01")
    monkeypatch.setenv("CBIR_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Reference:
    """A first version and a second one after it, made on a local disk out of images on S3 that nothing disturbs."""

    first: dict[str, bytes]
    first_bytes: dict[str, str]
    both_bytes: dict[str, str]


@pytest.fixture(scope="session")
def reference(moto: str, photos: str, small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, folder, moto)
        settings = small_settings(str(folder / "store"), images=photos)
        store = open_store(settings["store"])
        run(settings)
        first = {info.key: store.read(info.key) for info in store.list()}
        first_bytes = stages_of(store)
        run(settings | CHANGES)
        return Reference(first, first_bytes, stages_of(store))


@pytest.fixture
def on_s3(faults: FaultServer, moto_bucket: str, photos: str, small_settings: Settings) -> dict[str, Any]:
    """Settings with images and store behind the fault server."""
    return small_settings(f"s3://{moto_bucket}/index", images=photos)


@pytest.fixture
def store(on_s3: dict[str, Any]) -> Store:
    return open_store(on_s3["store"])


@pytest.fixture
def published(store: Store, reference: Reference) -> Store:
    """The store with the first version in it."""
    for key, data in reference.first.items():
        store.write(key, data)
    return store


def run(settings: dict[str, Any]) -> int:
    return index(parse_config(settings, "the test")).version


@pytest.mark.parametrize("kind", ["burst", "reset", "truncate", "stall", "flip"])
def test_bad_answers_to_reads_leave_the_right_bytes(
    kind: Any,
    on_s3: dict[str, Any],
    store: Store,
    faults: FaultServer,
    reference: Reference,
    pictures: dict[str, bytes],
) -> None:
    def disturb(*keys: str) -> None:
        for key in keys:
            if kind == "burst":
                faults.plan("error", method="GET", key=key, status=500)
                faults.plan("error", method="GET", key=key, status=503, times=BURST - 1)
            else:
                faults.plan(kind, method="GET", key=key)

    # no client can see a flipped byte of a listing
    listing = () if kind == "flip" else ("photos/&",)
    disturb(*listing, IMAGE, ".parquet", ".safetensors", ".faiss", ".arrow")
    assert run(on_s3) == 1
    assert stages_of(store) == reference.first_bytes
    disturb("DONE.json", "versions/0", "index/CURRENT")
    assert run(on_s3) == 1, "all is there"
    disturb("versions/0", "index/CURRENT")
    assert cbir.open(store.uri).search(pictures[QUERY], depth=1)[0].key == QUERY
    assert faults.hits == (len(listing) + 10) * (BURST if kind == "burst" else 1)
    assert_current_is_whole(store)


COMMITS = ("DONE.json", "versions/0", "index/CURRENT")
WRITES = ("index/WRITER", ".parquet", ".safetensors", ".faiss", *COMMITS)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("error", WRITES),
        ("reset", WRITES),
        ("applied_then_error", WRITES),
        ("applied_then_reset", WRITES),
        ("applied_then_silence", COMMITS),
    ],
)
def test_bad_answers_to_writes_leave_the_right_bytes(
    kind: Kind,
    keys: Sequence[str],
    on_s3: dict[str, Any],
    published: Store,
    faults: FaultServer,
    reference: Reference,
) -> None:
    faults.plan("pass", method="PUT", key="index/CURRENT")  # the fence of the lease
    for key in keys:
        faults.plan(kind, method="PUT", key=key)
    assert run(on_s3 | CHANGES) == 2
    assert faults.hits == 1 + len(keys)
    assert stages_of(published) == reference.both_bytes
    versions = Versions(published)
    current = versions.current()
    assert current is not None
    assert (versions.numbers(), current.version, current.epoch) == ([1, 2], 2, 2)
    assert_current_is_whole(published)


def test_a_first_version_whose_answers_are_lost_is_ours(
    on_s3: dict[str, Any], store: Store, faults: FaultServer
) -> None:
    faults.plan("pass", method="PUT", key="index/CURRENT")  # the fence of the lease
    for key in COMMITS:
        faults.plan("applied_then_silence", method="PUT", key=key)
    assert run(on_s3) == 1
    assert faults.hits == 1 + len(COMMITS)
    assert Versions(store).numbers() == [1]
    assert_current_is_whole(store)


@pytest.mark.parametrize(
    ("method", "key", "kind", "status", "message"),
    [
        ("GET", "photos/&", "error", 503, r"/photos: .*503 SlowDown.*wait until the server is well and run again"),
        ("GET", "photos/&", "error", 403, r"/photos: .*403 AccessDenied.*allow s3:ListBucket"),
        ("GET", IMAGE, "reset", 0, r"extract .*/photos/object0/view3.jpg: no answer from"),
        ("GET", IMAGE, "truncate", 0, r"extract .*/photos/object0/view3.jpg: the answers .* break off"),
        ("GET", IMAGE, "error", 404, r"extract .*/photos/object0/view3.jpg changed .*it is gone.*run again"),
        ("GET", ".parquet", "error", 404, r"part-\S+ is missing, but the record DONE.json.*delete that record"),
        ("GET", ".parquet", "truncate", 0, r"/index/stages/plan/\S+: the answers .* break off"),
        ("GET", ".safetensors", "flip", 0, r"build .*/index/stages/train/\S+: .*do not have the MD5"),
        ("GET", ".faiss", "flip", 0, r"damaged before they could be published(.|\n)*stages/merge/\S+ has other bytes"),
        ("GET", ".faiss", "stall", 0, r"evaluate .*/index/stages/merge/\S+: no answer from"),
        ("PUT", ".faiss", "error", 500, r"merge .*/index/stages/merge/\S+: .*500 InternalError.*run again"),
        ("PUT", ".faiss", "error", 507, r"merge .*/index/stages/merge/\S+: .*the store is full, free some space"),
        ("PUT", "DONE.json", "error", 503, r"extract .*/index/stages/extract/\S+/DONE.json: .*503 SlowDown.*again"),
        ("PUT", "versions/0", "error", 500, r"/index/versions/0+2.json: .*500 InternalError"),
        ("PUT", "index/CURRENT", "error", 500, r"/index/CURRENT: .*500 InternalError"),
        ("GET", "index/CURRENT", "error", 500, r"/index/CURRENT: .*500 InternalError"),
    ],
)
def test_what_never_gets_better_is_a_clear_error_and_current_stays(
    method: str,
    key: str,
    kind: Kind,
    status: int,
    message: str,
    on_s3: dict[str, Any],
    published: Store,
    faults: FaultServer,
) -> None:
    concerns_extraction = key in (IMAGE, "DONE.json")
    changed = on_s3 | ({"limits": {"megabytes": 50}} if concerns_extraction else CHANGES)
    before = named(published)
    if method == "PUT":
        faults.plan("pass", method="PUT", key="index/CURRENT")  # the fence of the lease
    faults.plan(kind, method=method, key=key, times=ALWAYS, status=status)
    with pytest.raises((StorageError, DataError, ArtifactError), match=message):
        run(changed)
    assert faults.hits >= 1
    faults.get_well()
    assert named(published) == before
    assert_current_is_whole(published)
    writer = writer_of(published)
    assert writer is not None
    assert writer.has_ended()


def test_the_same_command_goes_on_once_the_store_is_well(
    on_s3: dict[str, Any], published: Store, faults: FaultServer, reference: Reference
) -> None:
    for method, key in (("GET", ".parquet"), ("PUT", ".faiss"), ("PUT", "versions/0"), ("PUT", "index/CURRENT")):
        faults.plan("pass", method="PUT", key="index/CURRENT")  # the fence of the lease
        faults.plan("error", method=method, key=key, times=ALWAYS, status=503)
        with pytest.raises(StorageError, match="503 SlowDown"):
            run(on_s3 | CHANGES)
        faults.get_well()
        assert_current_is_whole(published)
    assert run(on_s3 | CHANGES) == 2
    assert Versions(published).numbers() == [1, 2], "the version that was committed and not named is taken up"
    assert stages_of(published) == reference.both_bytes
    assert_current_is_whole(published)


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_written(
    on_s3: dict[str, Any], published: Store, faults: FaultServer
) -> None:
    before = {info.key: info.tag for info in published.list()}
    faults.plan("ignore_conditions", method="PUT", times=ALWAYS)
    with pytest.raises(UnsafeStore, match=r"/index: If-None-Match is ignored.*Use an S3 server with conditional PUT"):
        run(on_s3 | CHANGES)
    assert {info.key: info.tag for info in published.list()} == before


class TestDisk:
    """The same on a local disk, where bits rot and people delete files."""

    STAGES = ("extract", "sample", "train", "build", "catalog", "merge", "evaluate")

    @pytest.fixture
    def on_disk(self, small_settings: Settings, tmp_path: Path) -> dict[str, Any]:
        settings = small_settings(str(tmp_path / "store"))
        assert run(settings) == 1
        return settings

    def forget_after(self, stage: str, store: Path) -> None:
        for later in self.STAGES[self.STAGES.index(stage) + 1 :]:
            for record in (store / "stages" / later).glob("*/DONE.json"):
                record.unlink()

    @pytest.mark.parametrize(
        ("stage", "harm"),
        [*((stage, "flip") for stage in STAGES[:-1]), ("train", "cut"), ("build", "delete"), ("merge", "delete")],
    )
    def test_a_damaged_part_is_named_and_made_anew(
        self, stage: str, harm: str, on_disk: dict[str, Any], undisturbed: dict[str, str]
    ) -> None:
        folder = Path(on_disk["store"])
        store = open_store(on_disk["store"])
        before = named(store)
        self.forget_after(stage, folder)
        for part in (folder / "stages" / stage).glob("*/part-*"):
            damage(part, harm)
        with pytest.raises(CbirError, match=rf"stages/{stage}/\w+/part-") as caught:
            run(on_disk)
        assert "DONE.json" in str(caught.value)
        assert named(store) == before
        for record in (folder / "stages" / stage).glob("*/DONE.json"):
            record.unlink()
        assert run(on_disk) == 1
        assert stages_of(store) == undisturbed

    @pytest.mark.parametrize("key", ["CURRENT", "DONE.json"])
    @pytest.mark.parametrize("content", [b'{"version": 1, ', b"\xff\xfe"])
    def test_a_damaged_record_is_named(self, key: str, content: bytes, on_disk: dict[str, Any]) -> None:
        path, *_ = sorted(Path(on_disk["store"]).glob(f"**/merge/*/{key}")) or [Path(on_disk["store"]) / key]
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"{path} is damaged .*delete it and run `cbir index` again"):
            run(on_disk)
        path.unlink()
        assert run(on_disk) == 1
        assert_current_is_whole(open_store(on_disk["store"]))


def named(store: Store) -> tuple[int, str, int]:
    """The version that CURRENT names; not who may write."""
    current = Versions(store).current()
    assert current is not None
    return current.version, current.manifest_sha256, current.epoch


def damage(path: Path, harm: str) -> None:
    data = path.read_bytes()
    half = len(data) // 2
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(data[:half] + (bytes([data[half] ^ 1]) + data[half + 1 :] if harm == "flip" else b""))
