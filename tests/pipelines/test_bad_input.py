"""Bad input: a clear message that names the place and the remedy, a non-zero exit, and nothing half-published."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import cbir
from cbir.layout import Layout
from cbir.search import Searcher
from cbir.storage import open_store
from cbir.versions import Versions
from pipelines.cli import app

Settings = Callable[..., dict[str, Any]]
Index = Callable[..., str]

SIFT = {"name": "sift", "max_features": 60}
DEEP = {"name": "deep", "backbone": "mobilenetv2_035", "weights": "none", "size": 32}


def channel(*encoders: Mapping[str, Any], extractor: Mapping[str, Any] = SIFT, index: Any = None, **more: Any) -> Any:
    return {"extractor": extractor, "encoders": list(encoders), "index": index or {"name": "flat"}, **more}


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GREY = png(np.full((80, 80, 3), 128, np.uint8))
ROOTSIFT, VLAD = {"name": "rootsift"}, {"name": "vlad", "words": 8}


def fill(folder: Path, files: Mapping[str, bytes]) -> str:
    for key, data in files.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    return str(folder)


def some(pictures: Mapping[str, bytes], number: int) -> dict[str, bytes]:
    return {key: pictures[key] for key in list(pictures)[:number]}


def tar_of(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, data in files.items():
            member = tarfile.TarInfo(key)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and what stands on stderr; whatever is not an expected error escapes."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    return result.exit_code, result.stderr


@pytest.fixture
def refused(settings: Settings, tmp_path: Path) -> Index:
    """`cbir index` of settings, or of a YAML text, that must fail; returns the message."""

    def make(text: str = "", **changes: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text or yaml.safe_dump(settings(**{"store": str(tmp_path / "store"), **changes})))
        code, message = run("index", path)
        assert code in (1, 2), message
        assert message.count("error: ") == 1
        assert Versions(open_store(str(tmp_path / "store"))).current() is None
        assert Versions(open_store(str(tmp_path / "store"))).numbers() == []
        return message

    return make


@pytest.fixture
def indexed(settings: Settings, tmp_path: Path) -> Callable[..., Searcher]:
    """`cbir index` of settings that must succeed; returns the searcher."""

    def make(**changes: Any) -> Searcher:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings(**{"store": str(tmp_path / "store"), **changes})))
        code, message = run("index", path)
        assert code == 0, message
        assert run("verify", path)[0] == 0
        return cbir.open(str(tmp_path / "store"))

    return make


class TestPlaces:
    def test_an_empty_folder(self, refused: Index, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert f"nothing lies under {tmp_path}/empty; check the path" in refused(images=f"{tmp_path}/empty")

    def test_a_missing_folder(self, refused: Index, tmp_path: Path) -> None:
        assert f"nothing lies under {tmp_path}/missing; check the path" in refused(images=f"{tmp_path}/missing")

    def test_a_folder_without_images(self, refused: Index, tmp_path: Path) -> None:
        images = fill(tmp_path / "texts", {"a.txt": b"a", "b.csv": b"b"})
        assert "no image, tar or Parquet file lies under" in (message := refused(images=images))
        assert "'a.txt'" in message

    def test_a_store_that_is_a_file(self, refused: Index, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        message = refused(store=str(tmp_path / "file"))
        assert "a file lies where a folder is needed" in message


class TestConfiguration:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"chanels": {}}, "unknown key 'chanels'; did you mean 'channels'?"),
            ({"sample": {"image": 5}}, "sample: unknown key 'image'; did you mean 'images'?"),
            (
                {"channels": {"a": channel(VLAD, extractor={"name": "sft"})}},
                "channels.a.extractor.name: unknown extractor 'sft'; did you mean 'sift'?",
            ),
            (
                {"channels": {"a": channel({"name": "vald"})}},
                "channels.a.encoders.0.name: unknown encoder 'vald'; did you mean 'vlad'?",
            ),
            ({"max_bad": "many"}, "max_bad: "),
            ({"channels": {"a": channel({"name": "vlad", "words": 0})}}, "channels.a.encoders.0.words: "),
            ({"channels": {"a": {"extractor": SIFT}}}, "channels.a.index: is missing"),
            ({"channels": {}}, "channels: "),
            (
                {"channels": {"a": channel(VLAD, extractor=DEEP)}},
                "channels.a.encoders.0: vlad aggregates local features, but",
            ),
            (
                {"channels": {"a": channel(ROOTSIFT)}},
                "channels.a.encoders: the index flat holds one descriptor per image",
            ),
            (
                {"channels": {"a": channel(VLAD)}, "search": {"rerank": [{"name": "ransac", "channel": "a"}]}},
                "search.rerank.0: needs the features of its channel; set channels.a.keep_features: true",
            ),
            (
                {"channels": {"local": channel(VLAD)}, "search": {"rerank": [{"name": "ransac", "channel": "locl"}]}},
                "search.rerank.0.channel: no channel 'locl'; did you mean 'local'?",
            ),
            (
                {"channels": {"a": channel(VLAD), "b": channel(VLAD)}, "search": {}},
                "search.fuse: several channels need a fusion; add {name: late}",
            ),
        ],
    )
    def test_a_mistake_is_named_with_its_path(self, changes: dict[str, Any], message: str, refused: Index) -> None:
        assert message in refused(**{"search": {}, **changes})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("images: [unclosed\nstore: x\n", "is not valid YAML"),
            ("images: a\nimages: b\nstore: x\n", "key 'images' stands twice"),
            ("- a\n- list\n", "must be a mapping of keys"),
        ],
    )
    def test_what_is_no_yaml_of_ours_is_named(self, text: str, message: str, refused: Index) -> None:
        assert message in (found := refused(text))
        assert "config.yaml" in found

    def test_a_missing_key_is_named(self, refused: Index) -> None:
        assert "store: is missing" in refused("images: somewhere\nchannels: {a: {}}\n")

    def test_missing_weights(self, refused: Index, tmp_path: Path) -> None:
        deep = {**DEEP, "weights": str(tmp_path / "missing.safetensors")}
        message = refused(channels={"a": channel(extractor=deep)}, search={})
        assert f"channels.a.extractor.weights: cannot read {tmp_path}/missing.safetensors" in message

    def test_weights_with_another_hash(self, refused: Index, tmp_path: Path) -> None:
        (tmp_path / "weights.safetensors").write_bytes(b"other weights")
        deep = {**DEEP, "weights": str(tmp_path / "weights.safetensors"), "weights_sha256": "0" * 64}
        message = refused(channels={"a": channel(extractor=deep)}, search={})
        assert "weights_sha256" in message
        assert "0" * 64 in message

    def test_a_ground_truth_is_read_before_the_work_begins(self, refused: Index, tmp_path: Path) -> None:
        truth = tmp_path / "truth.csv"
        message = refused(evaluate={"ground_truth": str(truth)})
        assert f"evaluate.ground_truth: cannot read {truth}" in message
        truth.write_text("image,instance,role\na,b,both\n")
        message = refused(evaluate={"ground_truth": str(truth)})
        assert str(truth) in message
        assert "instance_id" in message
        assert not (tmp_path / "store" / "stages").exists()


class TestCollections:
    def test_a_tar_cut_in_the_middle(self, refused: Index, pictures: dict[str, bytes], tmp_path: Path) -> None:
        whole = tar_of(some(pictures, 10))
        images = fill(tmp_path / "tars", {"0.tar": whole, "1.tar": tar_of({"x.jpg": GREY})[: 512 + 100]})
        message = refused(images=images)
        assert f"extract 1.tar [local]: {Path(images).as_uri()}/1.tar is cut or damaged at byte 0" in message
        assert "copy the tar again from its origin" in message

    def test_a_parquet_without_the_key_column(self, refused: Index, tmp_path: Path) -> None:
        (tmp_path / "tables").mkdir()
        pq.write_table(pa.table({"keys": ["a"], "image": [GREY]}), tmp_path / "tables" / "0.parquet")
        message = refused(images=str(tmp_path / "tables"))
        assert "0.parquet has no column 'key'; did you mean 'keys'?" in message
        assert "set `input.key_column`" in message

    def test_one_key_in_two_sources(self, refused: Index, pictures: dict[str, bytes], tmp_path: Path) -> None:
        files = some(pictures, 9)
        sources = [fill(tmp_path / name, {f"{name}.tar": tar_of(files)}) for name in ("one", "two")]
        message = refused(images=sources)
        assert "stands twice: in" in message
        for name in ("one", "two"):
            assert f"{tmp_path}/{name}/{name}.tar: member object" in message

    def test_one_key_twice_in_a_shard(self, refused: Index, pictures: dict[str, bytes], tmp_path: Path) -> None:
        data = pictures["object0/view0.jpg"]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for _ in range(2):
                member = tarfile.TarInfo("a.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        message = refused(images=fill(tmp_path / "tars", {"0.tar": buffer.getvalue()}))
        assert "two images have the key 'a.jpg': " in message
        assert message.count("0.tar: member a.jpg (offset") == 2

    def test_too_many_bad_images(self, refused: Index, pictures: dict[str, bytes], tmp_path: Path) -> None:
        files = {**some(pictures, 2), **{f"{number}.jpg": b"no picture" for number in range(3)}}
        message = refused(images=fill(tmp_path / "images", files))
        assert "3 of 5 images could not be used, more than max_bad = 0.5" in message
        assert "raise max_bad" in message

    def test_nothing_but_bad_images(self, refused: Index, tmp_path: Path) -> None:
        message = refused(images=fill(tmp_path / "images", {"0.jpg": b"no picture"}), max_bad=1.0)
        assert "channel 'local' has no image to train on: every image was quarantined" in message


ODD_KEYS = (
    "../../outside.jpg", "/absolute.jpg", "a/../b.jpg", "a//b.jpg", "line\nbreak.jpg", "carriage\r\n.jpg", "tab\t.jpg",
    "nul\0.jpg", "\x1b[31mred.jpg", "%2e%2e%2fescaped.jpg", "100%.jpg", "{key}.jpg", "s3://bucket/key.jpg", "C:\\x.jpg",
    "Größe 東京 😀.jpg", "e\u0301.jpg", "\u00e9.jpg", "right\u202egpj.to left", " blanks ", "-rf", "~root", "$HOME",
    "<script>alert(1)</script>.jpg", "[bold]markup[/bold]", "n" * 5000, "'one' \"two\".jpg", "a,b;\nc.jpg", "\0",
)  # fmt: skip
"""Every one is a key that somebody's column may hold."""


@pytest.fixture(scope="module")
def odd(settings: Settings, pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Parquet file of odd keys, of which the last three are of broken pictures, and its store."""
    folder = tmp_path_factory.mktemp("odd")
    broken = set(ODD_KEYS[-3:])
    images = [b"no picture" if key in broken else data for key, data in zip(ODD_KEYS, pictures.values(), strict=False)]
    pq.write_table(pa.table({"key": list(ODD_KEYS), "image": images}), folder / "images.parquet")
    made = settings(images=str(folder / "images.parquet"), store=str(folder / "store"))
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    assert run("index", folder / "config.yaml")[0] == 0
    return folder


class TestKeys:
    def test_they_survive_to_the_id_map_and_to_the_ledger(self, odd: Path) -> None:
        searcher = cbir.open(str(odd / "store"))
        assert set(searcher.keys().values()) == set(ODD_KEYS[:-3])
        ledgers = [
            pq.read_table(odd / "store" / part.quarantine)
            for part in Layout.from_json(searcher.manifest.layout).partitions
        ]
        assert set(pa.concat_tables(ledgers).column("key").to_pylist()) == set(ODD_KEYS[-3:])
        assert run("verify", odd / "store")[0] == 0

    def test_they_survive_to_results_and_files(self, odd: Path, pictures: dict[str, bytes], tmp_path: Path) -> None:
        before = {path for path in odd.rglob("*") if path.is_file()}
        assert run("export", odd / "store", tmp_path / "faiss")[0] == 0
        assert run("export", odd / "store", tmp_path / "rows", "--format", "parquet")[0] == 0
        assert run("extract", odd / "config.yaml", tmp_path / "features", "--npy")[0] == 0
        for name in ("faiss/ids", "rows/vectors", "features/local/images"):
            assert set(pq.read_table(tmp_path / f"{name}.parquet").column("key").to_pylist()) == set(ODD_KEYS[:-3]), (
                name
            )
        assert {path for path in odd.rglob("*") if path.is_file()} == before, "no key leads anywhere"
        assert not list(tmp_path.parent.rglob("outside.jpg"))

    def test_a_terminal_and_a_page_show_them_without_obeying_them(
        self, odd: Path, pictures: dict[str, bytes], tmp_path: Path
    ) -> None:
        query = fill(tmp_path, {"query.jpg": next(iter(pictures.values()))})
        arguments = ["search", odd / "store", f"{query}/query.jpg", "--depth", len(ODD_KEYS)]
        found = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments), "--html", f"{query}/found.html"])
        assert found.exit_code == 0
        lines = found.stdout.splitlines()
        assert len(lines) == len(ODD_KEYS) - 3
        assert found.stdout.replace("\n", "").isprintable()
        assert any(line.endswith("  line\\nbreak.jpg") for line in lines)
        assert any(line.endswith("  \\x1b[31mred.jpg") for line in lines)
        as_json = CliRunner().invoke(app, [*map(str, arguments), "--json"]).stdout.splitlines()
        assert {json.loads(line)["key"] for line in as_json} == set(ODD_KEYS[:-3])
        page = (tmp_path / "found.html").read_text()
        assert "<script>alert(1)" not in page
        assert "&lt;script&gt;alert(1)" in page


class TestSmallCollections:
    @pytest.mark.parametrize(
        ("encoders", "index", "message"),
        [
            ([{"name": "vlad", "words": 5000}], None, "channels.local.encoders.0: words: 5000 words need at least"),
            ([VLAD, {"name": "pca", "dim": 64}], None, "channels.local.encoders.1: dim: 64 components"),
            ([VLAD], {"name": "ivfpq", "lists": 64, "bits": 4}, "channels.local.index: lists: 64 lists need"),
            ([VLAD], {"name": "ivfpq", "bits": 4, "opq": True}, "channels.local.index: opq: a rotation of vectors"),
            ([VLAD], {"name": "ivfpq", "lists": 1}, "channels.local.index: bits: 8 bits need"),
            ([VLAD], {"name": "ivfpq", "bits": 4, "bytes": 100}, "channels.local.index: bytes: 100 parts do not"),
        ],
    )
    def test_too_few_images_are_named_with_the_setting(
        self, encoders: Any, index: Any, message: str, refused: Index, pictures: dict[str, bytes], tmp_path: Path
    ) -> None:
        images = fill(tmp_path / "images", some(pictures, 20))
        assert message in refused(images=images, channels={"local": channel(*encoders, index=index)}, search={})

    def test_one_image_only(self, indexed: Any, pictures: dict[str, bytes], tmp_path: Path) -> None:
        searcher = indexed(images=fill(tmp_path / "images", some(pictures, 1)))
        results = searcher.search(pictures["object0/view0.jpg"], depth=5)
        assert [result.key for result in results] == ["object0/view0.jpg"]

    def test_one_image_without_features(self, refused: Index, tmp_path: Path) -> None:
        message = refused(images=fill(tmp_path / "images", {"grey.png": GREY}))
        assert "channels.local.encoders.1: words: 8 words need at least as many descriptors" in message


@pytest.mark.parametrize(
    ("encoders", "index"),
    [
        ([ROOTSIFT, VLAD], {"name": "flat"}),
        ([ROOTSIFT, VLAD, {"name": "pca", "dim": 8, "whiten": True}], {"name": "flat", "metric": "l2"}),
        ([VLAD, {"name": "power"}, {"name": "l2"}], {"name": "ivfpq", "lists": 2, "bits": 4, "probes": 2}),
        (
            [VLAD, {"name": "pca", "dim": 16}],
            {"name": "ivfpq", "lists": 2, "bits": 4, "bytes": 4, "opq": True, "metric": "l2"},
        ),
    ],
)
def test_pictures_without_features_are_indexed_and_disturb_nobody(
    encoders: Any, index: Any, indexed: Any, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    files = {f"grey{number}.png": GREY for number in range(3)} | some(pictures, 25)
    local = channel(*encoders, index=index, keep_features=True)
    searcher = indexed(images=fill(tmp_path / "images", files), channels={"local": local})
    assert searcher.manifest.counts["indexed"] == searcher.manifest.counts["images"] == 28
    assert set(searcher.keys().values()) == set(files)
    best = searcher.search(pictures["object2/view0.jpg"], depth=28)
    assert best[0].key == "object2/view0.jpg"
    if index.get("metric") != "l2":  # by that, a zero vector is as near to any unit vector as one at 60 degrees
        assert not any(result.key.startswith("grey") for result in best[:5])
    blind = searcher.search(GREY, depth=28)
    assert all(np.isfinite(result.score) for result in blind)
    assert not any(result.score >= 1 for result in blind), "nothing is verified without features"


def fill_the_disk(patch: pytest.MonkeyPatch, beginning: str) -> None:
    """Let no file get its final name whose path begins so."""

    def refuse(call: Callable[[Path, Path], Any], target: Callable[[Path, Path], Path]) -> Callable[..., Any]:
        def full(path: Path, other: Path) -> Any:
            if str(target(path, other)).startswith(beginning):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(path, other)

        return full

    patch.setattr(Path, "replace", refuse(Path.replace, lambda _path, other: other))
    patch.setattr(Path, "hardlink_to", refuse(Path.hardlink_to, lambda path, _other: path))


class TestFullDisk:
    """A disk that is full, for the store or for temporary files, at any write."""

    @pytest.mark.parametrize("place", ["stages/extract/", "stages/merge/", "versions/", "CURRENT"])
    def test_of_the_store(
        self,
        place: str,
        settings: Settings,
        pictures: dict[str, bytes],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        store = open_store(str(tmp_path / "store"))
        path = tmp_path / "config.yaml"
        images = fill(tmp_path / "images", some(pictures, 6))
        path.write_text(yaml.safe_dump(settings(images=images, store=str(tmp_path / "store"))))
        with monkeypatch.context() as patch:
            fill_the_disk(patch, f"{tmp_path}/store/{place}")
            code, message = run("index", path)
        assert code == 1
        assert f"{store.uri}/{place}" in message
        assert "no space is left (No space left on device); free some" in message
        assert Versions(store).current() is None
        assert run("index", path)[0] == 0, "with space again, the same command goes on"
        assert Versions(store).numbers() == [1]

    def test_of_temporary_files(self, settings: Settings, pictures: dict[str, bytes], tmp_path: Path) -> None:
        images = fill(tmp_path / "images", some(pictures, 6))
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings(images=images, store=str(tmp_path / "store"))))

        def only_small_files() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        command = [sys.executable, "-m", "pipelines.cli", "index", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=only_small_files, check=False)
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert "error: extract files-" in ended.stderr
        assert "no space is left for temporary files in" in ended.stderr
        assert "(File too large); free some, or set TMPDIR to a larger folder, and run again" in ended.stderr
        assert Versions(open_store(str(tmp_path / "store"))).current() is None
