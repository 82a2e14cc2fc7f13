"""The whole pipeline from S3 to S3: it answers as on a disk, and goes on after a kill on a real server as well."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import cbir
from cbir.config import parse_config
from cbir.errors import StorageError
from cbir.lease import writer_of
from cbir.storage import Store, open_store
from cbir.versions import Versions
from pipelines.cli import app
from pipelines.indexing import index
from tests.service.faults import FaultServer
from tests.service.runs import assert_goes_on_after_kill, stages_of

pytestmark = pytest.mark.service

Settings = Callable[..., dict[str, Any]]
Answers = list[list[tuple[int, str, float]]]

QUERIES = ("object0/view1.jpg", "object1/view3.jpg", "object7/view0.jpg")
"""Two that are in the small collection, and one that is not."""
KILLED_AT = ("extract.done.after", "merge.part.after", "publish.manifest.after", "publish.current.before")


def answers(uri: str, pictures: dict[str, bytes]) -> Answers:
    searcher = cbir.open(uri)
    found = [searcher.search(pictures[key], depth=20) for key in QUERIES]
    return [[(result.image_id, result.key, result.score) for result in results] for results in found]


@pytest.fixture(scope="session")
def on_disk(small_settings: Settings, pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What an index of the same pictures answers, built from a folder into a folder."""
    uri = str(tmp_path_factory.mktemp("on-disk") / "store")
    index(parse_config(small_settings(uri), "the reference"))
    found = answers(uri, pictures)
    assert [results[0][1] for results in found[:2]] == list(QUERIES[:2])
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of a version are kept on this machine, out of the user's own."""
    monkeypatch.setenv("CBIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def upload_files(bucket: str, small: Path) -> str:
    store = open_store(f"s3://{bucket}/photos/small")
    for path in sorted(small.rglob("*.jpg")):
        store.write(path.relative_to(small).as_posix(), path)
    return store.uri


def upload_tars(bucket: str, small: Path) -> str:
    """Three tars, dealt in turn."""
    store, paths = open_store(f"s3://{bucket}/photos/shards"), sorted(small.rglob("*.jpg"))
    for number in range(3):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in paths[number::3]:
                archive.add(path, path.relative_to(small).as_posix())
        store.write(f"{number:03}.tar", buffer.getvalue())
    return store.uri


def assert_verified(uri: str) -> None:
    checked = CliRunner().invoke(app, ["verify", uri])
    assert checked.exit_code == 0, checked.output
    assert "version 1 is whole" in checked.output


def assert_published(store: Store, num_images: int = 12) -> None:
    versions = Versions(store)
    current = versions.current()
    assert current is not None
    assert (current.version, versions.numbers()) == (1, [1])
    counts = versions.load().counts
    assert (counts["images"], counts["indexed"], counts["quarantined"]) == (num_images, num_images - 1, 1)
    writer = writer_of(store)
    assert writer is not None
    assert writer.owner == "", "a run that has ended holds nothing"


@pytest.mark.parametrize("upload", [upload_files, upload_tars])
def test_from_s3_to_s3_is_as_from_disk_to_disk(
    upload: Callable[[str, Path], str],
    moto_bucket: str,
    small: Path,
    small_settings: Settings,
    pictures: dict[str, bytes],
    on_disk: Answers,
) -> None:
    store = open_store(f"s3://{moto_bucket}/index")
    index(parse_config(small_settings(store.uri, images=upload(moto_bucket, small)), "the test"))
    assert_published(store)
    assert_verified(store.uri)
    assert answers(store.uri, pictures) == on_disk
    searcher = cbir.open(store.uri)
    best = searcher.search(pictures[QUERIES[0]], depth=1)[0]
    assert searcher.picture(best.image_id) == pictures[best.key], "read again from where it lies on S3"


def test_on_ray_the_same_bytes_reach_s3(
    moto_bucket: str, small: Path, small_settings: Settings, pictures: dict[str, bytes], on_disk: Answers
) -> None:
    images = upload_tars(moto_bucket, small)
    inline, on_ray = (open_store(f"s3://{moto_bucket}/{name}") for name in ("inline", "ray"))
    index(parse_config(small_settings(inline.uri, images=images), "inline"))
    index(parse_config(small_settings(on_ray.uri, images=images, workers=2), "on Ray"))
    assert_published(on_ray)
    assert stages_of(on_ray) == stages_of(inline)
    assert answers(on_ray.uri, pictures) == on_disk


def test_the_files_of_a_version_are_fetched_once(
    faults: FaultServer, moto_bucket: str, small_settings: Settings, cache: Path
) -> None:
    uri = f"s3://{moto_bucket}/index"
    manifest = index(parse_config(small_settings(uri), "the test"))
    published = {file.sha256 for file in manifest.files}
    kept = {path.name.partition(".")[0] for path in cache.iterdir()}
    assert kept
    assert kept <= published, "the gate has opened the version, and nothing else lies there"
    before = faults.count("GET", ".arrow") + faults.count("GET", ".faiss")
    cbir.open(uri)
    assert faults.count("GET", ".arrow") + faults.count("GET", ".faiss") == before
    for path in cache.iterdir():
        path.unlink()
    cbir.open(uri)
    assert faults.count("GET", ".arrow") + faults.count("GET", ".faiss") == before + len(kept)


def test_a_cache_that_cannot_be_made_is_named(
    moto_bucket: str, small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(parse_config(small_settings(f"s3://{moto_bucket}/index"), "the test"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CBIR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"file/cache/\S+: a file lies where a folder is needed"):
        cbir.open(f"s3://{moto_bucket}/index")


def refused(settings: dict[str, Any], tmp_path: Path) -> str:
    """What `cbir index` says on stderr when it fails."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["index", str(path)])
    assert isinstance(result.exception, SystemExit)
    assert (result.exit_code, result.stderr.count("error: ")) == (1, 1)
    return result.stderr


@pytest.mark.parametrize("what", ["images", "store"])
def test_a_missing_bucket_is_named(what: str, moto_bucket: str, small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(f"s3://{moto_bucket}/index") | {what: "s3://no-such-bucket/here"}
    message = refused(settings, tmp_path)
    assert "s3://no-such-bucket" in message
    assert "the bucket does not exist at http" in message
    assert "create it or correct the URI" in message
    assert list(open_store(f"s3://{moto_bucket}").list()) == []


def test_an_empty_prefix_is_named(moto_bucket: str, small_settings: Settings, tmp_path: Path) -> None:
    images = f"s3://{moto_bucket}/nothing"
    message = refused(small_settings(f"s3://{moto_bucket}/index", images=images), tmp_path)
    assert f"nothing lies under {images}; check the path" in message
    assert list(open_store(f"s3://{moto_bucket}").list()) == []


class TestRadosgw:
    @pytest.mark.parametrize("what", ["images", "store"])
    @pytest.mark.parametrize(
        ("variable", "reason"),
        [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
    )
    def test_wrong_credentials_are_named(
        self,
        variable: str,
        reason: str,
        what: str,
        radosgw_bucket: str,
        small_settings: Settings,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv(variable, "wrong")
        settings = small_settings(str(tmp_path / "store")) | {what: f"s3://{radosgw_bucket}/here"}
        message = refused(settings, tmp_path)
        assert f"s3://{radosgw_bucket}" in message
        assert reason in message
        assert "the credentials are wrong or expired, see AWS_ACCESS_KEY_ID" in message

    def test_from_s3_to_s3_is_as_from_disk_to_disk(
        self,
        radosgw_bucket: str,
        small: Path,
        small_settings: Settings,
        pictures: dict[str, bytes],
        on_disk: Answers,
    ) -> None:
        uri = f"s3://{radosgw_bucket}/index"
        index(parse_config(small_settings(uri, images=upload_files(radosgw_bucket, small)), "the test"))
        assert_published(open_store(uri))
        assert_verified(uri)
        assert answers(uri, pictures) == on_disk

    @pytest.mark.parametrize("failpoint", KILLED_AT)
    def test_a_killed_driver_goes_on_where_it_was(
        self, failpoint: str, radosgw_bucket: str, small_settings: Settings, undisturbed: dict[str, str]
    ) -> None:
        assert_goes_on_after_kill(small_settings(f"s3://{radosgw_bucket}/index"), failpoint, undisturbed)
