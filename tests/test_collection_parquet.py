"""Images in Parquet files."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbir.collection import InputSpec, RawImage, parquet, read_images, read_place, read_vectors
from cbir.errors import DataError
from cbir.storage import open_store
from tests.collection_forms import IMAGES, LIMIT, SPEC, content, images_of, read_until_error, shards_of, write_parquet


def write_columns(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_are_counted_from_the_footer(tmp_path: Path) -> None:
    (shard,) = shards_of(write_parquet(tmp_path / "x.parquet", IMAGES))
    assert (shard.name, shard.num_images, shard.columns) == ("x.parquet", len(IMAGES), ("key", "image"))
    assert shard.num_bytes == (tmp_path / "x.parquet").stat().st_size


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())],
    ids=["binary", "large", "dictionary"],
)
@pytest.mark.parametrize(
    "key_kind",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ids=["string", "large", "dict"],
)
def test_text_keys_and_bytes_of_every_kind(kind: pa.DataType, key_kind: pa.DataType, tmp_path: Path) -> None:
    keys, images = pa.array(["a", "b"]).cast(key_kind), pa.array([b"1", b""], pa.binary()).cast(kind)
    assert content(images_of(write_columns(tmp_path / "x.parquet", key=keys, image=images))) == {"a": b"1", "b": b""}


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64()])
def test_integer_keys_become_decimal_text(kind: pa.DataType, tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", key=pa.array([0, 100], kind), image=[b"a", b"b"])
    assert content(images_of(path)) == {"0": b"a", "100": b"b"}


def test_structs_as_hugging_face_writes_them(tmp_path: Path) -> None:
    images = [{"bytes": b"1", "path": "x/1.jpg"}, {"bytes": b"2", "path": "x/2.jpg"}]
    path = write_columns(tmp_path / "x.parquet", image=images, label=[0, 1], key=["a", "b"])
    assert content(images_of(path)) == {"a": b"1", "b": b"2"}
    spec = InputSpec(key_column="image.path")
    found = images_of(path, spec=spec)
    assert content(found) == {"x/1.jpg": b"1", "x/2.jpg": b"2"}
    assert [read_place(tmp_path.as_uri(), image.at, spec) for image in found] == [b"1", b"2"]


def test_columns_may_have_other_names_and_dots(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", **{"image.id": ["a"], "jpg": [b"1"], "unused": [1.5]})
    assert content(images_of(path, spec=InputSpec(key_column="image.id", image_column="jpg"))) == {"a": b"1"}


def test_a_row_without_bytes_is_an_empty_image(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", key=["a", "b"], image=pa.array([None, b"1"]))
    found = images_of(path)
    assert content(found) == {"a": b"", "b": b"1"}
    assert read_place(tmp_path.as_uri(), found[0].at, SPEC) == b""
    structs = pa.array([None, {"bytes": None}, {"bytes": b"1"}], pa.struct([("bytes", pa.binary())]))
    path = write_columns(tmp_path / "y.parquet", key=["a", "b", "c"], image=structs)
    assert content(images_of(path)) == {"a": b"", "b": b"", "c": b"1"}


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (
            {"keys": ["a"], "image": [b"1"]},
            r"no column 'key'; did you mean 'keys'\?; it has keys: string, image: binary",
        ),
        ({"key": ["a"], "jpg": [b"1"]}, r"no column 'image'; known are jpg, key; it has .*; set `input\.image_column`"),
        ({"key": [1.5], "image": [b"1"]}, "column 'key' must be text or integers; it has key: double"),
        ({"key": ["a"], "image": ["1.jpg"]}, "column 'image' must be binary .* image: string"),
        ({"key": ["a"], "image": [{"data": b"1"}]}, r"column 'image' must be binary \(or a struct"),
    ],
    ids=["no key", "no image", "key type", "image type", "struct"],
)
def test_a_wrong_schema_is_an_error_when_listing(columns: dict[str, Any], found: str, tmp_path: Path) -> None:
    write_columns(tmp_path / "x.parquet", **columns)
    with pytest.raises(DataError, match=rf"x\.parquet.*{found}"):
        shards_of(tmp_path)


@pytest.mark.parametrize("spec", [SPEC, InputSpec(format="vectors")], ids=["images", "vectors"])
def test_a_key_that_is_no_text_is_an_error(spec: InputSpec, tmp_path: Path) -> None:
    keys = pa.array([b"a", b"\xff", b"\xed\xa0\x80"], pa.binary()).view(pa.string())
    write_columns(tmp_path / "x.parquet", key=keys, image=[b"1"] * 3, vector=[[0.0]] * 3)
    (shard,) = shards_of(tmp_path, spec=spec)
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet .*can't decode byte 0xff"):
        list(read_images(shard, spec, LIMIT) if spec is SPEC else read_vectors(shard, spec, 1, "float32"))


@pytest.mark.parametrize("key", [None, ""])
def test_a_row_without_key_is_an_error_that_names_it(key: str | None, tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", key=pa.array(["a", "b", key]), image=[b"1", b"2", b"3"])
    (shard,) = shards_of(path)
    seen, message = read_until_error(read_images(shard, SPEC, LIMIT))
    assert seen == ["a", "b"]
    assert "x.parquet: row 2 has no key" in message


def test_two_rows_of_one_key_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", key=["a", "b", "a"], image=[b"1", b"2", b"3"])
    with pytest.raises(DataError, match=r"key 'a': .*x\.parquet: row 0 and .*x\.parquet: row 2"):
        images_of(path)


def test_a_footer_of_any_length_is_read(tmp_path: Path) -> None:
    images = {f"{i}.jpg": b"1" for i in range(600)}
    path = write_parquet(tmp_path / "x.parquet", images, row_group_size=1)
    assert pq.read_metadata(path).serialized_size > 64 << 10
    (shard,) = shards_of(path)
    assert shard.num_images == 600
    assert content(list(read_images(shard, SPEC, LIMIT))) == images


def test_a_file_without_rows_gives_none(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", key=pa.array([], pa.string()), image=pa.array([], pa.binary()))
    (shard,) = shards_of(path)
    assert shard.num_images == 0
    assert list(read_images(shard, SPEC, LIMIT)) == []


@pytest.mark.parametrize("size", [0, 3, 200, -1])
def test_a_cut_file_is_an_error_when_listing(size: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", IMAGES)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        shards_of(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, IndexError, OverflowError, MemoryError])
def test_what_pyarrow_makes_of_errors_in_cpp_is_an_error_of_ours(error: type[Exception], tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet \(of C\+\+\)"),
        parquet.explained(open_store(str(tmp_path)), "x.parquet"),
    ):
        raise error("of C++")


def test_damage_inside_is_an_error_when_reading(tmp_path: Path) -> None:
    noise = random.Random(0)
    images = {f"{i}.jpg": noise.randbytes(1000) for i in range(50)}
    path = write_parquet(tmp_path / "x.parquet", images, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    raw[start : start + 200] = b"\xff" * 200
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        images_of(path)


def test_a_file_that_unpacks_to_hundreds_of_times_its_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {f"{i}.jpg": bytes(100_000) for i in range(50)}
    write_parquet(tmp_path / "x.parquet", images, use_dictionary=False, compression="zstd")
    (shard,) = shards_of(tmp_path)
    assert content(list(read_images(shard, SPEC, LIMIT))) == images, "a small one does no harm"
    monkeypatch.setattr(parquet, "BOMB_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"x\.parquet has [0-9,]+ bytes, and a row group of it unpacks to 5,00"):
        shards_of(tmp_path)


def test_rows_are_found_again_in_any_row_group(tmp_path: Path) -> None:
    images = {f"{i}.jpg": f"{i}".encode() * i for i in range(300)}
    path = write_parquet(tmp_path / "x.parquet", images, row_group_size=70)
    found = images_of(path)
    chosen: list[RawImage] = [found[i] for i in (0, 1, 69, 70, 139, 140, 299)]
    for image in chosen:
        assert read_place(tmp_path.as_uri(), image.at, SPEC) == images[image.key]


def test_a_large_row_group_is_read_in_little_memory(tmp_path: Path) -> None:
    noise, pool = random.Random(0), pa.default_memory_pool()
    path = tmp_path / "x.parquet"
    images = {f"{i}.jpg": noise.randbytes(50_000) for i in range(1500)}
    write_parquet(path, images, use_dictionary=False, compression="none", write_batch_size=16)
    assert pq.read_metadata(path).num_row_groups == 1
    (shard,) = shards_of(path)
    before, most, num = pool.bytes_allocated(), 0, 0
    for _ in read_images(shard, SPEC, LIMIT):
        most, num = max(most, pool.bytes_allocated() - before), num + 1
    assert num == 1500
    assert most < path.stat().st_size / 3
