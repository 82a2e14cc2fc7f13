"""What every store promises (`StoreLaws`), held against local folders here and against S3 servers in tests/service."""

import errno
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

import cbir.storage
import cbir.storage.retry
import cbir.storage.s3
from cbir.errors import ConfigError, ObjectMissing, StorageError, UnsafeStore
from cbir.storage import S3Settings, Store, open_store
from cbir.storage.disk import HIDDEN
from cbir.storage.retry import EVERYWHERE, answered, attempts

KEYS = [
    "a b",
    "a%41b",
    "a+b",
    "a-b",
    "a.b",
    "a/b",
    "a/b-c",
    "a/c/d",
    "a0",
    "Z",
    "é",
    "\uffee",
    "\U0001f600",
    "a=b&c?d#e",
]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keys(store: Store, prefix: str = "") -> list[str]:
    return [found.key for found in store.list(prefix)]


def race(action: Callable[[int], bool], threads: int = 16) -> list[int]:
    """Let threads act at once; the numbers of those to whom the action said True."""
    barrier, won = threading.Barrier(threads), []

    def act(number: int) -> None:
        barrier.wait()
        if action(number):
            won.append(number)

    racers = [threading.Thread(target=act, args=(number,)) for number in range(threads)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    return won


class StoreLaws:
    """A subclass gives a fixture `store`: an empty store."""

    def test_a_written_object_is_read_back(self, store: Store) -> None:
        data = bytes(range(256)) * 100
        store.write("deep/er/key", data)
        assert store.read("deep/er/key", sha256=sha256(data)) == data
        assert store.stat("deep/er/key").size == len(data)

    def test_a_file_is_written_like_bytes(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"from a file")
        store.write("key", tmp_path / "source")
        assert store.read("key") == b"from a file"

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        store.write("empty", b"")
        assert store.read("empty") == b""
        assert store.read("empty", start=0, length=10) == b""
        with store.open("empty") as file:
            assert file.read() == b""
        assert store.stat("empty").size == 0

    def test_write_replaces_and_the_tag_shows_it(self, store: Store) -> None:
        store.write("key", b"first")
        before = store.stat("key")
        store.write("key", b"seconds")
        after = store.stat("key")
        assert store.read("key") == b"seconds"
        assert (after.tag != before.tag, after.size) == (True, 7)

    def test_a_key_may_hold_any_character(self, store: Store) -> None:
        for key in KEYS:
            store.write(key, key.encode())
            assert store.read(key) == key.encode()
            assert keys(store, key)[0] == key

    def test_ranges_are_those_of_a_slice(self, store: Store) -> None:
        store.write("key", b"0123456789")
        for start, length in [(0, 3), (2, 3), (5, None), (8, 100), (10, 5), (99, None), (3, 0), (0, None)]:
            end = None if length is None else start + length
            assert store.read("key", start=start, length=length) == b"0123456789"[start:end]
        for start, length in [(-1, None), (0, -1)]:
            with pytest.raises(ValueError, match="a range begins at"):
                store.read("key", start=start, length=length)

    def test_a_missing_object_is_named(self, store: Store, tmp_path: Path) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.read("no/such"),
            lambda: store.read("no/such", start=1, length=0),
            lambda: store.read_tagged("no/such"),
            lambda: store.stat("no/such"),
            lambda: store.open("no/such").read(),
            lambda: store.fetch("no/such", tmp_path / "file", "0" * 64),
        ]
        for call in calls:
            with pytest.raises(ObjectMissing, match=f"{store.uri}/no/such"):
                call()
        assert not (tmp_path / "file").exists()
        assert store.local_path("no/such") is None

    def test_listing_is_in_byte_order(self, store: Store) -> None:
        for key in reversed(KEYS):
            store.write(key, key.encode())
        found = list(store.list())
        assert [info.key for info in found] == sorted(KEYS, key=str.encode)
        assert [info.size for info in found] == [len(info.key.encode()) for info in found]
        assert all(info == store.stat(info.key) for info in found)

    def test_a_prefix_is_the_beginning_of_the_key(self, store: Store) -> None:
        written = ["a/b", "a/b-c", "a/c/d", "a/c/e/f", "ab", "b/a"]
        for key in written:
            store.write(key, b"x")
        for prefix in ["", "a", "a/", "a/b", "a/b-", "a/c/", "a/c/d", "a/c/d/", "zz", "zz/y"]:
            assert keys(store, prefix) == [key for key in written if key.startswith(prefix)]

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert keys(store) == []

    def test_delete_removes_and_does_not_mind_what_is_missing(self, store: Store) -> None:
        store.write("a/b", b"x")
        store.delete("a/b")
        store.delete("a/b")
        store.delete("never/there")
        assert keys(store) == []

    def test_create_puts_once(self, store: Store) -> None:
        assert store.create("a/key", b"first")
        assert not store.create("a/key", b"other")
        assert store.create("a/key", b"first"), "the same bytes are there: an earlier attempt of ours was applied"
        assert store.read("a/key") == b"first"

    def test_swap_replaces_only_what_it_has_seen(self, store: Store) -> None:
        store.create("a/key", b"first")
        body, tag = store.read_tagged("a/key")
        assert body == b"first"
        assert store.swap("a/key", b"second", tag)
        assert not store.swap("a/key", b"third", tag)
        assert store.swap("a/key", b"second", tag), "the same bytes are there: an earlier attempt of ours was applied"
        assert store.read("a/key") == b"second"

    def test_swap_of_a_missing_object_is_lost(self, store: Store) -> None:
        store.create("a/key", b"first")
        _, tag = store.read_tagged("a/key")
        store.delete("a/key")
        assert not store.swap("a/key", b"second", tag)
        assert not store.swap("elsewhere/key", b"second", tag)
        assert keys(store) == []

    def test_of_racing_creates_exactly_one_wins(self, store: Store) -> None:
        for number in range(4):
            key = f"race-{number}"
            won = race(lambda me, key=key: store.create(key, f"written by {me}".encode()))
            assert len(won) == 1
            assert store.read(key) == f"written by {won[0]}".encode()

    def test_no_swap_is_lost(self, store: Store) -> None:
        """Every thread appends its name until it has won twice; each win must be seen in the end."""
        store.create("log", b"start")

        def append(me: int) -> bool:
            wins = 0
            while wins < 2:
                body, tag = store.read_tagged("log")
                wins += store.swap("log", body + f" {me}.{wins}".encode(), tag)
            return True

        race(append, threads=8)
        written = store.read("log").decode().split()
        assert sorted(written[1:]) == sorted(f"{me}.{win}" for me in range(8) for win in range(2))

    def test_racing_swaps_of_one_state_have_one_winner(self, store: Store) -> None:
        for number in range(4):
            store.write("key", f"state {number}".encode())
            _, tag = store.read_tagged("key")
            won = race(lambda me, n=number, tag=tag: store.swap("key", f"{n} by {me}".encode(), tag))
            assert len(won) == 1
            assert store.read("key") == f"{number} by {won[0]}".encode()

    def test_the_probe_accepts_it_and_leaves_nothing(self, store: Store) -> None:
        store.probe()
        assert keys(store) == []

    def test_wrong_bytes_are_refused(self, store: Store, tmp_path: Path) -> None:
        store.write("key", b"right")
        with pytest.raises(StorageError, match=f"{store.uri}/key.*{sha256(b'right')}.*{sha256(b'other')}"):
            store.read("key", sha256=sha256(b"other"))
        with pytest.raises(StorageError, match="was damaged or overwritten"):
            store.fetch("key", tmp_path / "file", sha256(b"other"))
        assert list(tmp_path.iterdir()) == []

    def test_fetch_makes_a_whole_file(self, store: Store, tmp_path: Path) -> None:
        data = os.urandom(300_000)
        store.write("key", data)
        target = tmp_path / "new" / "file"
        assert store.fetch("key", target, sha256(data)) == target
        assert target.read_bytes() == data
        assert [found.name for found in target.parent.iterdir()] == ["file"]

    def test_a_reader_seeks(self, store: Store) -> None:
        data = os.urandom(1_000_003)
        store.write("key", data)
        with store.open("key") as file:
            assert file.read(10) == data[:10]
            assert file.seek(-7, io.SEEK_END) == 999_996
            assert file.read() == data[-7:]
            assert file.seek(500_000) == file.tell() == 500_000
            assert file.read(300_000) == data[500_000:800_000]
            assert file.seek(2_000_000) == 2_000_000
            assert file.read(1) == b""

    def test_tar_and_parquet_are_read_from_the_store(self, store: Store) -> None:
        packed, table = io.BytesIO(), pa.table({"key": [f"{n}" for n in range(20_000)]})
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for number in range(50):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = 3_000
                tar.addfile(member, io.BytesIO(bytes([number]) * 3_000))
        columns = io.BytesIO()
        pq.write_table(table, columns, row_group_size=1_000)
        store.write("a.tar", packed.getvalue())
        store.write("a.parquet", columns.getvalue())
        with store.open("a.tar") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            assert [tar.extractfile(each).read()[0] for each in tar] == list(range(50))
        with store.open("a.parquet") as file:
            assert pq.read_table(file).equals(table)

    def test_threads_read_and_write_at_once(self, store: Store) -> None:
        def work(me: int) -> bool:
            store.write(f"key-{me}", bytes([me]) * 10_000)
            return all(store.read(f"key-{me}") == bytes([me]) * 10_000 for _ in range(5))

        assert sorted(race(work, threads=8)) == list(range(8))

    def test_it_travels_to_another_process(self, store: Store) -> None:
        store.write("key", b"x")
        assert pickle.loads(pickle.dumps(store)).read("key") == b"x"
        assert open_store(store.uri).read("key") == b"x"
        assert open_store(store.uri).uri == store.uri


class TestLocalStore(StoreLaws):
    @pytest.fixture
    def store(self, tmp_path_factory: pytest.TempPathFactory) -> Store:
        return open_store(str(tmp_path_factory.mktemp("local") / "new folder"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_every_way_to_name_a_folder_means_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    uris = ["store", "./store/", "~/store", str(folder), f"file://{folder}", f"{folder}/../store"]
    assert {open_store(uri).uri for uri in uris} == {folder.as_uri()}


@pytest.mark.parametrize("uri", ["", "gs://bucket/a", "http://host/a", "file://host/a", "s3a://bucket", "s3://"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        open_store(uri)


def test_the_public_face_is_all_there() -> None:
    assert all(hasattr(cbir.storage, name) for name in cbir.storage.__all__)


def test_local_stores_do_without_boto3(folder: Path) -> None:
    code = (
        f"import sys, cbir.storage; cbir.storage.open_store({str(folder)!r}).probe(); sys.exit('boto3' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../outside", "a/../../outside", "a//b", "./a", "a/", "a\0b"])
def test_a_key_cannot_lead_out_of_the_folder(folder: Path, key: str) -> None:
    store = open_store(str(folder))
    for call in (store.read, store.stat, store.open, store.delete, store.local_path):
        with pytest.raises(StorageError, match="is no key"):
            call(key)
    for put in (store.write, store.create):
        with pytest.raises(StorageError, match="is no key"):
            put(key, b"x")
    with pytest.raises(StorageError, match="is no key"):
        list(store.list("../"))


def test_local_path_is_the_file(folder: Path) -> None:
    store = open_store(str(folder))
    store.write("a/b", b"x")
    assert store.local_path("a/b") == folder / "a" / "b"
    assert store.local_path("a") is None


def test_listing_follows_links_but_not_in_circles(folder: Path) -> None:
    store, outside = open_store(str(folder)), folder.parent / "outside"
    store.write("real/file", b"x")
    outside.mkdir()
    (outside / "there").write_bytes(b"yz")
    (folder / "to-folder").symlink_to(outside)
    (folder / "to-file").symlink_to(outside / "there")
    (folder / "real" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    assert keys(store) == ["real/file", "to-file", "to-folder/there"]


def test_listing_goes_on_when_files_vanish(folder: Path) -> None:
    store = open_store(str(folder))
    for key in ("a", "b", "c/d", "e"):
        store.write(key, b"x")
    listing = store.list()
    assert next(listing).key == "a"
    store.delete("b")
    store.delete("c/d")
    (folder / "c").rmdir()
    assert [found.key for found in listing] == ["e"]


def test_a_name_that_is_no_text_is_an_error(folder: Path) -> None:
    folder.mkdir()
    Path(os.fsdecode(bytes(folder) + b"/caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(StorageError, match=r"caf.*not UTF-8.*rename"):
        keys(open_store(str(folder)))


def test_own_files_are_not_listed(folder: Path) -> None:
    store = open_store(str(folder))
    store.create("key", b"1")
    store.swap("key", b"2", store.read_tagged("key")[1])
    (folder / f"{HIDDEN}left-by-a-killed-writer").write_bytes(b"half")
    assert keys(store) == ["key"]


def test_a_file_in_place_of_a_folder_is_named(folder: Path) -> None:
    store = open_store(str(folder))
    store.write("a", b"x")
    with pytest.raises(StorageError, match=r"store/a/b: a file lies where a folder is needed"):
        store.write("a/b", b"y")
    with pytest.raises(ObjectMissing):
        store.stat("a/b")


def test_a_forbidden_folder_is_named(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    code = (
        "import os, sys; from cbir.errors import StorageError; from cbir.storage import open_store\n"
        f"store = open_store({str(folder)!r})\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: store.write('key', b'x')\n"
        "except StorageError as error: sys.exit(str(error))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search("store/key: not permitted .* see its owner and mode", ended.stderr)


def test_a_missing_source_is_named_and_not_the_key(folder: Path) -> None:
    with pytest.raises(StorageError, match=f"^{folder}/nothing: "):
        open_store(str(folder)).write("key", folder / "nothing")


@pytest.mark.parametrize("put", ["write", "create", "swap"])
def test_a_full_disk_leaves_the_old_object(folder: Path, monkeypatch: pytest.MonkeyPatch, put: str) -> None:
    store = open_store(str(folder))
    store.write("old", b"old")
    _, tag = store.read_tagged("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    calls = {
        "write": lambda: store.write("old", b"new"),
        "create": lambda: store.create("new", b"new"),
        "swap": lambda: store.swap("old", b"new", tag),
    }
    with pytest.raises(StorageError, match=r"store/\w+: no space is left.*free some"):
        calls[put]()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != f"{HIDDEN}lock"} == {
        "old": b"old"
    }


def test_a_file_that_outgrows_its_limit_is_an_error_of_the_disk(folder: Path) -> None:
    """The system itself stops the write in the middle, as a full disk does."""
    code = (
        "import resource, sys; from cbir.errors import StorageError; from cbir.storage import open_store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: open_store({str(folder)!r}).write('big', bytes(100_000))\n"
        "except StorageError as error: sys.exit(str(error))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "big: no space is left" in ended.stderr
    assert list(folder.iterdir()) == []


def test_without_hard_links_nothing_is_published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(UnsafeStore, match="makes no hard links"):
        open_store(str(folder)).probe()


def test_a_name_that_leads_nowhere_is_an_error(folder: Path) -> None:
    folder.mkdir()
    (folder / "key").symlink_to(folder / "nowhere")
    with pytest.raises(StorageError, match="leads to no file"):
        open_store(str(folder)).create("key", b"x")


class _Careless(type(open_store("/"))):  # type: ignore[misc]
    """A store that writes whatever the condition says."""

    careless_create = careless_swap = False

    def create(self, key: str, data: bytes) -> bool:
        if self.careless_create:
            self.write(key, data)
            return True
        return bool(super().create(key, data))

    def swap(self, key: str, data: bytes, tag: str) -> bool:
        if self.careless_swap:
            self.write(key, data)
            return True
        return bool(super().swap(key, data, tag))


@pytest.mark.parametrize(("attribute", "message"), [("create", "Match is ignored"), ("swap", "If-Match is ignored")])
def test_the_probe_refuses_a_store_that_ignores_conditions(folder: Path, attribute: str, message: str) -> None:
    store = _Careless(folder)
    setattr(store, f"careless_{attribute}", True)
    with pytest.raises(UnsafeStore, match=message):
        store.probe()
    assert [path.name for path in folder.iterdir()] in ([], [f"{HIDDEN}lock"])


def test_processes_that_swap_lose_nothing(folder: Path) -> None:
    code = (
        "import sys; from cbir.storage import open_store\n"
        f"store, wins = open_store({str(folder)!r}), 0\n"
        "while wins < 20:\n"
        "    body, tag = store.read_tagged('log')\n"
        "    wins += store.swap('log', body + f' {sys.argv[1]}.{wins}'.encode(), tag)"
    )
    store = open_store(str(folder))
    store.create("log", b"")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    expected = sorted(f"{number}.{win}" for number in range(3) for win in range(20))
    assert sorted(store.read("log").decode().split()) == expected


class _Clock:
    """Of a machine on which nothing takes time but sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class TestPatience:
    """How long a server is waited for that does not answer."""

    SETTINGS = S3Settings(attempts=4, patience_s=120)

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> _Clock:
        clock = _Clock()
        monkeypatch.setattr(cbir.storage.retry, "time", clock)
        monkeypatch.setattr(cbir.storage.retry, "_answering", set())
        return clock

    def test_one_that_never_answered_is_soon_given_up(self, clock: _Clock) -> None:
        answered("http://other")
        assert list(attempts(self.SETTINGS, "http://this")) == [0, 1, 2, 3]
        assert clock.now < 2

    @pytest.mark.parametrize("endpoint", ["http://this", EVERYWHERE])
    def test_one_that_answered_is_waited_for(self, clock: _Clock, endpoint: str) -> None:
        answered(endpoint)
        assert len(list(attempts(self.SETTINGS, "http://this"))) > 20
        assert 120 <= clock.now <= 120 + self.SETTINGS.longest_pause_s

    def test_what_takes_long_is_tried_as_often_as_is_asked(self, clock: _Clock) -> None:
        answered("http://this")
        assert sum(clock.sleep(100) is None for _ in attempts(self.SETTINGS, "http://this")) == 4

    def test_one_that_was_given_up_is_not_waited_for_again_until_it_answers(self) -> None:
        def tried() -> int:
            return len(list(attempts(self.SETTINGS, "http://this")))

        answered("http://this")
        assert (tried() > 20, tried()) == (True, 4)
        answered("http://this")
        assert tried() > 20


class _Client:
    """Of a server that takes its credentials, or does not."""

    meta = SimpleNamespace(endpoint_url="http://simulated")

    def __init__(self, code: str = "") -> None:
        self.code = code

    def get_object(self, **_: str) -> dict[str, Any]:
        self._sign("GetObject")
        return {"ETag": '"tag"', "Body": io.BytesIO(b"data")}

    def put_object(self, **_: str) -> None:
        self._sign("PutObject")

    def _sign(self, operation: str) -> None:
        if self.code:
            answer = {"Error": {"Code": self.code}, "ResponseMetadata": {"HTTPStatusCode": 403}}
            raise ClientError(answer, operation)  # type: ignore[arg-type]


class TestRenewedCredentials:
    """They are read again where they are refused after they were taken."""

    @pytest.fixture
    def clients(self, monkeypatch: pytest.MonkeyPatch) -> list[_Client]:
        """Those that are made, in their order."""
        clients = [_Client(), _Client()]
        waiting = iter(clients)
        monkeypatch.setattr(cbir.storage.s3, "_client", lambda *_: next(waiting))
        return clients

    @pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
    def test_a_request_is_repeated_with_them(self, clients: list[_Client], code: str) -> None:
        store = open_store("s3://bucket/store")
        assert store.read("key") == b"data"
        clients[0].code = code
        assert store.read("key") == b"data"
        assert store.create("key", b"other")

    def test_a_conditional_write_is_repeated_with_them(self, clients: list[_Client]) -> None:
        store = open_store("s3://bucket/store")
        store.write("key", b"data")
        clients[0].code = "ExpiredToken"
        assert store.create("key", b"data")

    def test_once(self, clients: list[_Client]) -> None:
        store = open_store("s3://bucket/store")
        store.write("key", b"data")
        for client in clients:
            client.code = "ExpiredToken"
        with pytest.raises(StorageError, match=r"ExpiredToken.*wrong or expired, see AWS_ACCESS_KEY_ID"):
            store.read("key")

    def test_wrong_ones_are_an_error_at_once(self, clients: list[_Client]) -> None:
        clients[0].code = "InvalidAccessKeyId"
        with pytest.raises(StorageError, match="wrong or expired"):
            open_store("s3://bucket/store").read("key")
