"""The image collection: the same images have the same keys and bytes however they are stored, and none gets lost."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from cbir.collection import ImageShard, InputSpec, Place, list_shards, read_images, read_place
from cbir.collection.lookahead import look_ahead
from cbir.errors import CbirError, DataError, ObjectMissing
from cbir.storage import ObjectInfo
from cbir.types import image_id
from tests.collection_forms import (
    FORMS,
    IMAGES,
    LIMIT,
    SPEC,
    content,
    images_of,
    shards_of,
    write_files,
    write_parquet,
    write_tar,
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_keys_and_bytes(form: str, tmp_path: Path) -> None:
    assert content(images_of(FORMS[form](tmp_path, IMAGES))) == IMAGES


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_read_again_by_its_place(form: str, tmp_path: Path) -> None:
    (shard,) = shards_of(FORMS[form](tmp_path, IMAGES), spec=SPEC.model_copy(update={"shard_images": 10_000}))
    images = list(read_images(shard, SPEC, LIMIT))
    assert {image.key: read_place(shard.source, image.at, SPEC) for image in images} == IMAGES
    columns = ("kind", "object", "start", "size")
    assert all(Place(*(getattr(image.at, column) for column in columns)) == image.at for image in images)
    assert all(image.size == len(IMAGES[image.key]) for image in images)
    assert len({image.place for image in images}) == len(images)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_beyond_the_limit_keeps_its_place_but_not_its_data(form: str, tmp_path: Path) -> None:
    images = images_of(FORMS[form](tmp_path, IMAGES), limit=100)
    expected = {key: data if len(data) <= 100 else None for key, data in IMAGES.items()}
    assert content(images) == expected
    assert {image.key: image.size for image in images} == {key: len(data) for key, data in IMAGES.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_survives_json(form: str, tmp_path: Path) -> None:
    for shard in shards_of(FORMS[form](tmp_path, IMAGES)):
        again = ImageShard.from_json(json.loads(json.dumps(shard.to_json())))
        assert again == shard
        assert again.fingerprint == shard.fingerprint


def test_all_forms_mix_in_one_folder_and_sidecars_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, {"1.jpg": b"1", "z/2.JPG": b"2", "odd.xyz": b"3"})
    write_tar(tmp_path / "t.tar", {"4.jpg": b"4", "4.json": b"{}", "4.cls": b"0", "4.txt": b"", "._4.jpg": b"mac"})
    write_parquet(tmp_path / "p.parquet", {"5": b"5"})
    sidecars = ["1.json", "z/2.TXT", "labels.csv", "README", "z/README.md", "f.npy", "a.zip", "_SUCCESS", "Thumbs.db"]
    write_files(tmp_path, dict.fromkeys([*sidecars, ".DS_Store", ".git/a.jpg", "z/.x/b.jpg"], b"beside"))
    found = content(images_of(tmp_path))
    assert found == {"1.jpg": b"1", "z/2.JPG": b"2", "odd.xyz": b"3", "4.jpg": b"4", "5": b"5"}


@pytest.mark.parametrize(("form", "keys"), [("files", {"1.jpg"}), ("tar", {"4.jpg"}), ("parquet", {"5"})])
def test_a_format_takes_only_its_kind_out_of_a_folder(form: str, keys: set[str], tmp_path: Path) -> None:
    write_files(tmp_path, {"1.jpg": b"1"})
    write_tar(tmp_path / "t.tar", {"4.jpg": b"4"})
    write_parquet(tmp_path / "p.parquet", {"5": b"5"})
    assert set(content(images_of(tmp_path, spec=InputSpec(format=form)))) == keys


def test_a_named_object_is_read_as_the_format_says(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.part", {"4.jpg": b"4"})
    assert content(images_of(path, spec=InputSpec(format="tar"))) == {"4.jpg": b"4"}
    assert set(content(images_of(path))) == {"x.part"}


def test_the_spec_refuses_a_shard_of_no_images() -> None:
    with pytest.raises(ValidationError):
        InputSpec(shard_images=0)


# ---- where images lie ------------------------------------------------------------------------------------------------


def test_uris_may_be_plain_paths_or_file_uris_with_or_without_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "my photos", {"a/b.jpg": b"1"})
    tar = write_tar(tmp_path / "my shard.tar", {"c.jpg": b"2"})
    monkeypatch.chdir(tmp_path)
    for uri in (str(folder), f"{folder}/", folder.as_uri(), folder.as_uri() + "/", "my photos", "./my photos"):
        assert content(images_of(uri)) == {"a/b.jpg": b"1"}
    for uri in (str(tar), tar.as_uri(), "my shard.tar", "./my shard.tar"):
        assert content(images_of(uri)) == {"c.jpg": b"2"}
    monkeypatch.chdir(folder)
    assert content(images_of(".")) == {"a/b.jpg": b"1"}
    assert content(images_of("../my photos/a/..")) == {"a/b.jpg": b"1"}


def test_places_read_well(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/1.jpg": b"1"})
    write_tar(tmp_path / "t.tar", {"b/4.jpg": b"4"})
    write_parquet(tmp_path / "p.parquet", {"5": b"5", "6": b"6"})
    root = tmp_path.as_uri()
    places = {image.key: image.place for image in images_of(tmp_path)}
    assert places == {
        "a/1.jpg": f"{root}/a/1.jpg",
        "b/4.jpg": f"{root}/t.tar: member b/4.jpg (offset 512)",
        "5": f"{root}/p.parquet: row 0",
        "6": f"{root}/p.parquet: row 1",
    }


def test_several_uris_come_in_their_order_and_tars_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {f"{name}.jpg": name.encode()})
    shards = shards_of(tmp_path / "b", tmp_path / "a/0.tar", tmp_path / "c")
    assert [shard.name for shard in shards] == ["0.tar", "0.tar~2", "0.tar~3"]
    assert [image.key for shard in shards for image in read_images(shard, SPEC, LIMIT)] == ["b.jpg", "a.jpg", "c.jpg"]


def test_images_that_are_listed_twice_are_an_error_that_names_both_places(tmp_path: Path) -> None:
    for name in "abc":
        write_files(tmp_path / name, {"same.jpg": b"1"})
        write_tar(tmp_path / name / "0.tar", {f"{name}.jpg": b""})
    with pytest.raises(DataError, match=r"two images have the key 'same.jpg': file://.*/a/same.jpg and .*/b/same.jpg"):
        shards_of(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match=r"names file://.*/b/0.tar twice"):
        shards_of(tmp_path / "a/0.tar", tmp_path / "b/0.tar", tmp_path / "b/0.tar")
    with pytest.raises(DataError, match="twice"):
        shards_of(tmp_path / "a", str(tmp_path / "a") + "/")


@pytest.mark.parametrize("form", FORMS)
def test_a_place_is_found_from_the_entry_of_images_too(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FORMS[form](tmp_path, IMAGES)
    monkeypatch.chdir(tmp_path)
    for source in (str(path), path.as_uri(), path.name):
        for shard in shards_of(source):
            assert shard.source == source
            for image in read_images(shard, SPEC, LIMIT):
                assert read_place(source, image.at, SPEC) == IMAGES[image.key]
                assert image.at.describe(path.as_uri(), image.key) == image.place


def test_a_folder_may_hold_a_file_of_its_own_name(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "a.jpg", {"a.jpg": b"1"})
    (image,) = images_of(folder)
    assert read_place(str(folder), image.at, SPEC) == b"1"


def test_a_fingerprint_follows_the_content_and_not_the_root(tmp_path: Path) -> None:
    files, columns = (ObjectInfo("a.jpg", 1, "t"), ObjectInfo("b.jpg", 2, "u")), ("key", "image")
    shard = ImageShard("files-0", "files", "s3://a", "s3://a", files, num_images=2)
    same = (replace(shard, name="n"), replace(shard, source="s3://b/c"), replace(shard, root="s3://b/c"))
    other = (
        replace(shard, kind="tar"),
        replace(shard, columns=columns),
        replace(shard, objects=files[:1]),
        replace(shard, objects=(files[0], ObjectInfo("b.jpg", 2, "v"))),
        replace(shard, objects=(files[0], ObjectInfo("b.jpg", 3, "u"))),
        replace(shard, objects=(files[0], ObjectInfo("c.jpg", 2, "u"))),
    )
    assert {each.fingerprint for each in same} == {shard.fingerprint}
    assert len({each.fingerprint for each in (shard, *other)}) == 1 + len(other)
    assert shard.num_bytes == 3


def test_columns_of_another_spec_are_refused(tmp_path: Path) -> None:
    (shard,) = shards_of(write_parquet(tmp_path / "x.parquet", {"a": b"1"}))
    with pytest.raises(ValueError, match="was listed with the columns"):
        list(read_images(shard, InputSpec(image_column="key"), LIMIT))


# ---- nothing there ---------------------------------------------------------------------------------------------------


def test_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no place"):
        list_shards([], SPEC)
    with pytest.raises(CbirError, match="missing"):
        shards_of(tmp_path / "missing")
    with pytest.raises(CbirError, match=r"missing\.tar"):
        shards_of(tmp_path / "missing.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"nothing lies under .*/empty"):
        shards_of(tmp_path / "empty")


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.json": b"", ".hidden.jpg": b""})
    with pytest.raises(DataError, match=r"no image, tar or Parquet file lies under .* found are .*'a\.json'"):
        shards_of(tmp_path)
    write_files(tmp_path, {"a.jpg": b""})
    with pytest.raises(DataError, match=r"no object of `input\.format: tar`"):
        shards_of(tmp_path, spec=InputSpec(format="tar"))


def test_the_second_of_two_uris_may_not_be_empty_either(tmp_path: Path) -> None:
    write_files(tmp_path / "a", {"a.jpg": b""})
    with pytest.raises(CbirError, match="/b"):
        shards_of(tmp_path / "a", tmp_path / "b")


# ---- groups of files -------------------------------------------------------------------------------------------------


def keys_of(shards: list[ImageShard]) -> list[str]:
    return [info.key for shard in shards for info in shard.objects]


class Listing:
    """A store that lists and has nothing else."""

    uri = "s3://bucket/photos"

    def __init__(self, infos: Callable[[], Iterator[ObjectInfo]]) -> None:
        self._infos = infos

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return (info for info in self._infos() if info.key.startswith(prefix))

    def stat(self, key: str) -> ObjectInfo:
        raise ObjectMissing(key)

    def local_path(self, key: str) -> None:
        return None


def list_keys(
    monkeypatch: pytest.MonkeyPatch, keys: Callable[[], Iterator[str]], spec: InputSpec
) -> Iterator[ImageShard]:
    store = Listing(lambda: (ObjectInfo(key, 1, "tag") for key in keys()))
    monkeypatch.setattr("cbir.collection.roots.open_store", lambda uri: store)
    return list_shards(["s3://bucket/photos"], spec)


def test_groups_hold_every_file_once_in_key_order(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{i:06d}.jpg" for i in range(20_000)]
    shards = list(list_keys(monkeypatch, lambda: iter(keys), InputSpec(shard_images=32)))
    assert keys_of(shards) == keys
    sizes = [shard.num_images for shard in shards]
    assert sizes == [len(shard.objects) for shard in shards]
    assert max(sizes) <= 4 * 32
    assert 24 <= len(keys) / len(shards) <= 40
    assert all(shard.name == f"files-{image_id(shard.objects[0].key):016x}" for shard in shards)
    assert len({shard.name for shard in shards}) == len(shards)
    ended = [shard.objects[-1].key for shard in shards[:-1] if shard.num_images < 128]
    assert ended
    assert all(image_id(key) % 32 == 0 for key in ended)


@pytest.mark.parametrize("seed", range(5))
def test_one_file_more_or_less_changes_only_its_neighbourhood(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, spec = random.Random(seed), InputSpec(shard_images=16)
    keys = [f"{i:06d}.jpg" for i in range(0, 20_000, 2)]
    removed = generator.choice(keys)
    changes = [key for key in keys if key != removed], sorted([*keys, f"{generator.randrange(10_000) * 2 + 1:06d}.jpg"])
    before = {shard.fingerprint for shard in list_keys(monkeypatch, lambda: iter(keys), spec)}
    for changed in changes:
        after = {shard.fingerprint for shard in list_keys(monkeypatch, lambda now=changed: iter(now), spec)}
        assert 1 <= len(after - before) <= 4
        assert 1 <= len(before - after) <= 4


def test_an_endless_run_of_keys_without_a_cut_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = (f"{i}.jpg" for i in range(10_000))
    uncut = [key for key in candidates if image_id(key) % 8][:100]
    shards = list(list_keys(monkeypatch, lambda: iter(uncut), InputSpec(shard_images=8)))
    assert [shard.num_images for shard in shards] == [32, 32, 32, 4]


def test_two_hundred_thousand_files_are_listed_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    num_keys = 200_000
    shards = list_keys(monkeypatch, lambda: (f"folder/{i:09d}.jpg" for i in range(num_keys)), SPEC)
    tracemalloc.start()
    try:
        assert sum(shard.num_images or 0 for shard in shards) == num_keys
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # all of them at once take more than 40 MB


def test_a_prefix_lists_what_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["2023-12/a.jpg", "2024-01/b.jpg", "2024-02/c.jpg"]
    infos = [ObjectInfo(key, 1, "tag") for key in keys]
    stores = {"s3://bucket/photos": Listing(lambda: iter(infos))}
    monkeypatch.setattr("cbir.collection.roots.open_store", lambda uri: stores.get(uri) or Listing(lambda: iter(())))
    shards = list(list_shards(["s3://bucket/photos/2024-"], SPEC))
    assert keys_of(shards) == keys[1:]
    assert {shard.root for shard in shards} == {"s3://bucket/photos"}
    assert {shard.source for shard in shards} == {"s3://bucket/photos/2024-"}


# ---- changed between listing and reading -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_an_object_that_changed_since_it_was_listed_is_an_error(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, IMAGES)
    shards = shards_of(path)
    FORMS[form](tmp_path, {key: data + b"more" for key, data in IMAGES.items()})
    with pytest.raises(DataError, match=r"changed while indexing .*: run again"):
        [list(read_images(shard, SPEC, LIMIT)) for shard in shards]


@pytest.mark.parametrize("form", ["folder", "pax tar", "parquet"])
def test_an_object_that_is_gone_is_an_error(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, {"a.jpg": b"1"})
    (shard,) = shards_of(path)
    (path / "a.jpg" if path.is_dir() else path).unlink()
    with pytest.raises(DataError, match=r"changed while indexing \(it is gone\): run again"):
        list(read_images(shard, SPEC, LIMIT))


@pytest.mark.parametrize("form", ["folder", "pax tar", "parquet"])
def test_a_place_that_holds_other_bytes_is_an_error(form: str, tmp_path: Path) -> None:
    (shard,) = shards_of(FORMS[form](tmp_path, {"a.jpg": b"1234"}))
    (image,) = read_images(shard, SPEC, LIMIT)
    FORMS[form](tmp_path, {"a.jpg": b"12"})
    moved = replace(image.at, size=1 << 14) if form == "pax tar" else image.at
    with pytest.raises(DataError, match="the source changed"):
        read_place(shard.source, moved, SPEC)


# ---- looking ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 3, 100])
def test_looking_ahead_is_map(calls: int) -> None:
    assert list(look_ahead(str, range(20), calls)) == [str(i) for i in range(20)]
    assert list(look_ahead(str, [], calls)) == []


def test_looking_ahead_takes_no_more_than_it_may() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = look_ahead(lambda i: i, items(), 4)
    for i in range(10):
        assert next(results) == i
        assert len(taken) <= i + 6
    results.close()
    assert len(taken) < 20


@pytest.mark.parametrize("calls", [0, 3])
def test_an_error_comes_in_its_turn(calls: int) -> None:
    results = look_ahead(lambda i: 1 // (5 - i), range(20), calls)
    assert [next(results) for _ in range(5)] == [0, 0, 0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
