"""The Parquet files between stages: sorted, of the same bytes whatever the batches, read by ranges of ids."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbir.artifacts import StoredFile, sha256_of
from cbir.errors import StorageError
from cbir.layout import IDS_SCHEMA
from cbir.storage import Store, open_store
from cbir.types import FEATURES_SCHEMA, FeatureBatch
from pipelines.tables import ShardWriter, open_parquet, read_range, sorted_table, write_parquet

TOP = 1 << 63


def features(num: int, seed: int = 0, rows: int = 30) -> FeatureBatch:
    """Images with up to so many features each, in no order; some have none."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, rows, num)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ids = rng.integers(0, TOP - 1, num, dtype=np.int64)
    descriptors = rng.integers(0, 256, (offsets[-1], 128), dtype=np.uint8)
    return FeatureBatch(ids, offsets, descriptors, rng.random((offsets[-1], 4), np.float32))


def id_rows(batch: FeatureBatch) -> pa.Table:
    rows = [
        {"image_id": image, "key": f"{image}.jpg", "content_sha256": bytes(32), "source": 0, "kind": "files"}
        | {"object": f"{image}.jpg", "start": 0, "num_bytes": 1, "height": 2, "width": 3}
        for image in batch.image_ids.tolist()
    ]
    return pa.Table.from_pylist(rows, schema=IDS_SCHEMA)


def written(path: Path, batch: FeatureBatch, step: int) -> Path:
    """The shard, added in batches of `step` images."""
    writer = ShardWriter(path.with_suffix(".arrow"))
    for start in range(0, len(batch), step):
        some = batch.take(np.arange(start, min(start + step, len(batch))))
        writer.add(some, id_rows(some))
    writer.finish(path, batch.take(np.empty(0, np.int64)))
    assert not path.with_suffix(".arrow").exists()
    return path


def test_a_shard_is_sorted_and_whole(tmp_path: Path) -> None:
    batch = features(200)
    table = pq.read_table(written(tmp_path / "a.parquet", batch, 7))
    found, expected = FeatureBatch.from_arrow(table), batch.take(np.argsort(batch.image_ids))
    for name in ("image_ids", "offsets", "descriptors", "geometry"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert table.column("key").to_pylist() == [f"{image}.jpg" for image in expected.image_ids.tolist()]


def test_the_bytes_of_a_shard_depend_neither_on_batches_nor_on_the_order_of_images(tmp_path: Path) -> None:
    batch = features(3000, rows=60)
    shuffled = batch.take(np.random.default_rng(1).permutation(len(batch)))
    files = [
        written(tmp_path / f"{number}.parquet", some, step)
        for number, (some, step) in enumerate([(batch, 16), (batch, 1000), (shuffled, 37)])
    ]
    assert pq.ParquetFile(files[0]).num_row_groups > 1
    assert len({sha256_of(file) for file in files}) == 1


def test_a_shard_without_images_still_tells_its_widths(tmp_path: Path) -> None:
    empty = features(5).take(np.empty(0, np.int64))
    found = FeatureBatch.from_arrow(pq.read_table(written(tmp_path / "a.parquet", empty, 1)))
    assert (len(found), found.descriptors.shape, found.descriptors.dtype) == (0, (0, 128), np.uint8)


def test_row_groups_are_of_a_few_megabytes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", features(3000, rows=60), 100)
    sizes = [pq.ParquetFile(path).metadata.row_group(n).total_byte_size for n in range(3)]
    assert all((3 << 20) < size < (5 << 20) for size in sizes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    return open_store(str(tmp_path))


@pytest.fixture
def file(store: Store, tmp_path: Path) -> StoredFile:
    path = written(tmp_path / "a.parquet", features(2000, rows=40), 100)
    return StoredFile("features", "a.parquet", path.stat().st_size, sha256_of(path))


def test_ranges_cover_every_row_once(store: Store, file: StoredFile) -> None:
    whole = open_parquet(store, file).read()
    edges = [(number * TOP) // 7 for number in range(8)]
    parts = [read_range(store, file, low, high) for low, high in itertools.pairwise(edges)]
    assert pa.concat_tables(parts).equals(whole)
    assert all(part.num_rows for part in parts)


def test_a_range_ends_before_its_high_and_begins_with_its_low(store: Store, file: StoredFile) -> None:
    ids = open_parquet(store, file).read(columns=["image_id"]).column("image_id").to_pylist()
    found = read_range(store, file, ids[10], ids[20], ["image_id"]).column("image_id").to_pylist()
    assert found == ids[10:20]
    assert read_range(store, file, ids[-1], TOP, ["image_id"]).num_rows == 1
    assert read_range(store, file, ids[-1] + 1, TOP, ["image_id"]).num_rows == 0


def test_a_small_range_holds_no_more_memory_than_its_rows(store: Store, file: StoredFile) -> None:
    before = pa.total_allocated_bytes()
    table = read_range(store, file, 0, TOP // 100, FEATURES_SCHEMA.names)
    assert table.num_rows > 5
    for _ in range(50):  # the threads that read have let go of everything
        if (held := pa.total_allocated_bytes() - before) < 2 * table.nbytes + 100_000:
            return
        time.sleep(0.1)
    raise AssertionError(f"{held} bytes are held for a table of {table.nbytes}")


def test_damage_is_found(store: Store, file: StoredFile, tmp_path: Path) -> None:
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(StorageError, match="the bytes have sha256"):
        open_parquet(store, file).read()


def test_only_text_is_written_with_a_dictionary(tmp_path: Path) -> None:
    table = pa.table({"image_id": np.arange(1000), "kind": ["tar"] * 1000, "code": pa.array([b"abcd"] * 1000)})
    write_parquet(tmp_path / "a.parquet", sorted_table(table))
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    assert [group.column(n).has_dictionary_page for n in range(3)] == [False, True, False]
