"""The S3 store against real servers, and against a server that misbehaves."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cbir.errors import ConfigError, ObjectMissing, StorageError, UnsafeStore
from cbir.storage import S3Settings, Store, open_store
from tests.service.conftest import MOTO_PAGE, free_port, plain_client
from tests.service.faults import ALWAYS, FaultServer, Kind
from tests.test_storage import StoreLaws, keys, race

pytestmark = pytest.mark.service

IMPATIENT = S3Settings(
    connect_s=1, read_s=0.5, attempts=4, patience_s=0.01, pause_s=0.01, block_bytes=64 << 10, part_bytes=5 << 20
)
PATIENT = S3Settings(pause_s=0.01, part_bytes=5 << 20)
DATA = os.urandom(200_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
BODY_FAULTS: list[Kind] = ["truncate", "stall", "reset", "error"]
LOST_ANSWERS: list[Kind] = ["applied_then_silence", "applied_then_reset", "applied_then_error"]


class TestMoto(StoreLaws):
    @pytest.fixture
    def store(self, moto_bucket: str) -> Store:
        return open_store(f"s3://{moto_bucket}/pre fix/of", replace(PATIENT, block_bytes=100_000))


class TestRadosgw(StoreLaws):
    @pytest.fixture
    def store(self, radosgw_bucket: str) -> Store:
        return open_store(f"s3://{radosgw_bucket}", PATIENT)

    def test_a_large_object_goes_up_in_parts(self, store: Store) -> None:
        data = os.urandom((12 << 20) + 1)
        store.write("large", data)
        assert store.read("large") == data
        assert store.stat("large").tag.endswith("-3")

    def test_wrong_credentials_are_named(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.write("key", b"x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError, match=r"SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"):
            open_store(store.uri).read("key")
        with pytest.raises(StorageError, match=r"403.*may not do this"):
            open_store(store.uri).stat("key")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(StorageError, match=r"InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"):
            keys(open_store(store.uri))

    def test_a_process_that_did_not_probe_finds_the_quotes_itself(self, store: Store) -> None:
        store.create("key", b"first")
        _, tag = store.read_tagged("key")
        won = race(lambda me: open_store(store.uri).swap("key", f"by {me}".encode(), tag), threads=8)
        assert len(won) == 1
        assert store.read("key") == f"by {won[0]}".encode()


@pytest.fixture
def store(faults: FaultServer, moto_bucket: str) -> Store:
    """An S3 store behind the fault server, with little patience."""
    return open_store(f"s3://{moto_bucket}/store", IMPATIENT)


@pytest.mark.parametrize("kind", BODY_FAULTS)
def test_a_bad_answer_is_asked_for_again(store: Store, faults: FaultServer, kind: Kind) -> None:
    store.write("key", DATA)
    faults.plan(kind, method="GET", key="key", times=2, status=503)
    assert store.read("key") == DATA
    assert (faults.hits, faults.count("GET", "key")) == (2, 3)


@pytest.mark.parametrize("kind", [*BODY_FAULTS, "flip"])
def test_fetch_survives_it(store: Store, faults: FaultServer, tmp_path: Path, kind: Kind) -> None:
    store.write("key", DATA)
    faults.plan(kind, method="GET", key="key", times=1, status=503)
    assert store.fetch("key", tmp_path / "file", SHA256).read_bytes() == DATA
    assert faults.hits == 1


@pytest.mark.parametrize("kind", BODY_FAULTS)
def test_a_reader_survives_it(store: Store, faults: FaultServer, kind: Kind) -> None:
    store.write("key", DATA)
    faults.plan(kind, method="GET", key="key", times=2, status=503)
    with store.open("key") as file:
        assert file.read() == DATA
    assert faults.hits == 2


def test_a_flipped_byte_is_seen_by_its_hash(store: Store, faults: FaultServer) -> None:
    store.write("key", DATA)
    faults.plan("flip", method="GET", key="key", times=2)
    assert store.read("key", sha256=SHA256) == DATA
    faults.plan("flip", method="GET", key="key", times=ALWAYS)
    with pytest.raises(StorageError, match=rf"{store.uri}/key: .*recorded is {SHA256}.* made anew"):
        store.read("key", sha256=SHA256)


def test_a_flipped_byte_is_seen_by_the_etag(store: Store, faults: FaultServer) -> None:
    store.write("key", DATA)
    assert store.read("key") == DATA
    faults.plan("flip", method="GET", key="key", times=2)
    assert store.read("key") == DATA
    faults.plan("flip", method="GET", key="key")
    assert open_store(store.uri, IMPATIENT).read("key") == DATA, "also where it is the first answer of a server"
    assert faults.hits == 3
    faults.plan("flip", method="GET", key="key", times=ALWAYS)
    with pytest.raises(StorageError, match=rf"{store.uri}/key: .*do not have the MD5.*https"):
        store.read("key")


def test_an_etag_that_is_no_md5_is_believed_after_a_second_look(store: Store, faults: FaultServer) -> None:
    for key in ("one", "two"):
        store.write(key, DATA)
    faults.plan("flip", method="GET", times=ALWAYS)
    flipped = store.read("one")
    assert (flipped != DATA, faults.hits) == (True, 2)
    assert (store.read("two"), faults.hits) == (flipped, 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncate", "the answers of http.* break off"),
        ("stall", "no answer from http.*ReadTimeout"),
        ("reset", "no answer from http"),
        ("error", "503 SlowDown.*again and again; wait"),
    ],
)
def test_what_never_gets_better_is_a_clear_error(store: Store, faults: FaultServer, kind: Kind, message: str) -> None:
    store.write("key", DATA)
    faults.plan(kind, method="GET", key="key", times=ALWAYS, status=503)
    with pytest.raises(StorageError, match=rf"{store.uri}/key: .*({message})"):
        store.read("key")
    assert faults.hits == IMPATIENT.attempts


def test_a_404_of_one_key_is_not_asked_again(store: Store, faults: FaultServer) -> None:
    store.write("key", DATA)
    faults.plan("error", method="GET", key="key", times=ALWAYS, status=404)
    with pytest.raises(ObjectMissing, match=f"{store.uri}/key"):
        store.read("key")
    assert faults.hits == 1


@pytest.mark.parametrize("kind", ["error", "reset", "truncate", "stall"])
def test_listing_goes_on_after_it(store: Store, faults: FaultServer, kind: Kind) -> None:
    for number in range(5):
        store.write(f"{number}", b"x")
    faults.plan(kind, method="GET", key="list-type=2", times=2)
    assert keys(store) == ["0", "1", "2", "3", "4"]
    assert faults.hits == 2


@pytest.mark.parametrize("kind", [*LOST_ANSWERS, "error", "reset"])
def test_write_survives_it(store: Store, faults: FaultServer, kind: Kind) -> None:
    faults.plan(kind, method="PUT", key="key", times=2)
    store.write("key", DATA)
    assert faults.hits == 2
    assert store.read("key") == DATA


@pytest.mark.parametrize("kind", [*LOST_ANSWERS, "error", "reset"])
def test_an_unknown_create_is_settled(store: Store, faults: FaultServer, kind: Kind) -> None:
    faults.plan(kind, method="PUT", key="ours", times=1)
    assert store.create("ours", b"ours"), "it was applied or could be repeated"
    store.create("theirs", b"theirs")
    faults.plan(kind, method="PUT", key="theirs", times=1)
    assert not store.create("theirs", b"ours")
    assert (faults.hits, store.read("ours"), store.read("theirs")) == (2, b"ours", b"theirs")


@pytest.mark.parametrize("kind", [*LOST_ANSWERS, "error", "reset"])
def test_an_unknown_swap_is_settled(store: Store, faults: FaultServer, kind: Kind) -> None:
    store.create("key", b"first")
    _, tag = store.read_tagged("key")
    faults.plan(kind, method="PUT", key="key", times=1)
    assert store.swap("key", b"ours", tag)
    faults.plan(kind, method="PUT", key="key", times=1)
    assert not store.swap("key", b"late", tag)
    assert (faults.hits, store.read("key")) == (2, b"ours")


@pytest.mark.parametrize("call", ["create", "swap"])
def test_a_conditional_write_without_an_outcome_says_so(store: Store, faults: FaultServer, call: str) -> None:
    store.create("key", b"first")
    _, tag = store.read_tagged("key")
    faults.plan("error", method="PUT", key="store/", times=ALWAYS, status=500)
    with pytest.raises(StorageError, match=r"500 InternalError.*again and again"):
        store.create("new", b"new") if call == "create" else store.swap("key", b"new", tag)
    assert store.read("key") == b"first"


@pytest.mark.parametrize("kind", [*LOST_ANSWERS, "error", "reset"])
@pytest.mark.parametrize(("method", "request_"), [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId=")])
def test_an_upload_in_parts_survives_it(
    store: Store, faults: FaultServer, tmp_path: Path, kind: Kind, method: str, request_: str
) -> None:
    (tmp_path / "large").write_bytes(data := os.urandom(IMPATIENT.part_bytes * 2 + 1))
    faults.plan(kind, method=method, key=request_)
    store.write("large", tmp_path / "large")
    assert faults.hits == 1
    assert store.read("large") == data


def test_an_upload_that_was_completed_and_forgotten_is_done(store: Store, faults: FaultServer) -> None:
    data = bytes(IMPATIENT.part_bytes + 1)
    faults.plan("applied_then_reset", method="POST", key="uploadId=")
    faults.plan("error", method="POST", key="uploadId=", status=404, code="NoSuchUpload")
    store.write("large", data)
    assert (faults.hits, store.read("large")) == (2, data)
    faults.plan("error", method="POST", key="uploadId=", status=404, code="NoSuchUpload")
    with pytest.raises(StorageError, match="NoSuchUpload"):
        store.write("other", data)


def test_a_failed_upload_is_taken_back(store: Store, faults: FaultServer, moto: str, moto_bucket: str) -> None:
    faults.plan("error", method="PUT", key="partNumber=2", times=ALWAYS, status=403)
    with pytest.raises(StorageError, match=f"{store.uri}/large.*s3:PutObject"):
        store.write("large", bytes(IMPATIENT.part_bytes * 2 + 1))
    left = plain_client(moto).list_multipart_uploads(Bucket=moto_bucket)
    assert ("Uploads" in left, keys(store)) == (False, [])


@pytest.mark.parametrize("header", ["create", "swap"])
def test_the_probe_refuses_a_server_that_ignores_conditions(store: Store, faults: FaultServer, header: str) -> None:
    if header == "swap":  # the two PUTs of create pass, those of swap do not
        faults.plan("pass", method="PUT", times=2)
    faults.plan("ignore_conditions", method="PUT", times=ALWAYS)
    ignored = {"create": "If-None-Match is ignored", "swap": "If-Match is ignored"}
    with pytest.raises(UnsafeStore, match=rf"{store.uri}: {ignored[header]}.*could be lost"):
        store.probe()
    assert keys(store) == []
    assert faults.count("DELETE", "probe") == 1


def test_the_probe_refuses_a_server_without_conditions(store: Store, faults: FaultServer) -> None:
    faults.plan("error", method="PUT", times=ALWAYS, status=501)
    with pytest.raises(UnsafeStore, match=r"501.*conditional PUT"):
        store.probe()


def test_a_reader_refuses_an_object_that_changes(store: Store) -> None:
    store.write("key", DATA)
    with store.open("key") as file:
        assert file.read(10) == DATA[:10]
        store.write("key", DATA[::-1])
        with pytest.raises(StorageError, match="replaced while it was read"):
            file.read()


def test_a_reader_fetches_each_block_once(store: Store, faults: FaultServer) -> None:
    store.write("key", DATA)
    with store.open("key") as file:
        while file.read(1_000):
            pass
    assert faults.count("GET", "key") == -(-len(DATA) // IMPATIENT.block_bytes)


def test_a_long_listing_is_a_stream_of_pages(store: Store, faults: FaultServer) -> None:
    for number in range(3 * MOTO_PAGE):
        store.write(f"{number:05}", b"x")
    listing = store.list()
    assert next(listing).key == "00000"
    assert faults.count("GET", "list-type=2") == 1
    assert [found.key for found in listing] == [f"{number:05}" for number in range(1, 3 * MOTO_PAGE)]
    assert faults.count("GET", "list-type=2") == 3


def test_markers_of_folders_are_not_listed(store: Store, moto: str, moto_bucket: str) -> None:
    client = plain_client(moto)
    for key in ("store/", "store/a/", "store/a/b", "store2/c", "other"):
        client.put_object(Bucket=moto_bucket, Key=key, Body=b"")
    assert keys(store) == ["a/b"]


def test_a_missing_bucket_is_named(use_endpoint: Callable[[str], None], moto: str, tmp_path: Path) -> None:
    use_endpoint(moto)
    store = open_store("s3://no-such-bucket/store", IMPATIENT)
    calls: list[Callable[[], object]] = [
        lambda: store.read("key"),
        lambda: store.stat("key"),
        lambda: keys(store),
        lambda: store.write("key", b"x"),
        lambda: store.create("key", b"x"),
        lambda: store.swap("key", b"x", "tag"),
        lambda: store.delete("key"),
        store.probe,
    ]
    for call in calls:
        with pytest.raises(
            StorageError, match=r"s3://no-such-bucket/store.*bucket does not exist.*correct the URI"
        ) as e:
            call()
        assert not isinstance(e.value, ObjectMissing)


def test_an_unreadable_bucket_is_named(store: Store, faults: FaultServer) -> None:
    faults.plan("error", times=ALWAYS, status=403)
    with pytest.raises(StorageError, match=rf"{store.uri}: .*403 AccessDenied.*allow s3:ListBucket"):
        keys(store)
    assert faults.hits == 1


def test_missing_credentials_are_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"no usable credentials.*set AWS_ACCESS_KEY_ID"):
        open_store(store.uri).read("key")


def test_a_missing_profile_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"nobody.*AWS_PROFILE"):
        open_store(store.uri)


def test_an_endpoint_that_is_no_url_is_named(use_endpoint: Callable[[str], None]) -> None:
    use_endpoint("nonsense")
    with pytest.raises(ConfigError, match=r"nonsense.*AWS_ENDPOINT_URL"):
        open_store("s3://bucket/store")


def test_an_unreachable_endpoint_is_named(use_endpoint: Callable[[str], None]) -> None:
    use_endpoint(endpoint := f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match=f"no answer from {endpoint}.*AWS_ENDPOINT_URL"):
        open_store("s3://bucket/store", IMPATIENT).read("key")


def test_an_impossible_bucket_is_named(use_endpoint: Callable[[str], None], moto: str) -> None:
    use_endpoint(moto)
    with pytest.raises(StorageError, match="not a possible bucket or key"):
        open_store("s3://Not A Bucket/store", IMPATIENT).read("key")


def test_a_local_disk_that_is_full_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    store.write("key", DATA)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=f"{tmp_path}/file: no space is left"):
        store.fetch("key", tmp_path / "file", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CBIR_S3_READ_S", "2.5")
    monkeypatch.setenv("CBIR_S3_ATTEMPTS", "3")
    assert S3Settings.from_environment() == S3Settings(read_s=2.5, attempts=3)
    monkeypatch.setenv("CBIR_S3_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="CBIR_S3_ATTEMPTS must be a number, found 'many'"):
        S3Settings.from_environment()
    monkeypatch.setenv("CBIR_S3_ATTEMPTS", "0")
    with pytest.raises(ConfigError, match="attempts must be positive"):
        S3Settings.from_environment()
