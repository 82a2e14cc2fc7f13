"""The files of a version: id ranges, the manifest's layout, id maps and stored features."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cbir.errors import ArtifactError
from cbir.layout import IDS_SCHEMA, ChannelLayout, FeatureFile, IdMap, Labels, Layout, PartitionLayout, partition_bounds
from cbir.types import FeatureBatch


def features(ids: list[int], rng: np.random.Generator, dtype: str = "uint8") -> FeatureBatch:
    """`id % 4` rows of three values for each image."""
    rows = [rng.integers(0, 200, (image % 4, 3)).astype(dtype) for image in ids]
    geometry = [rng.random((image % 4, 4), np.float32) for image in ids]
    return FeatureBatch.of_images(np.array(ids, np.int64), rows, geometry)


def id_rows(ids: list[int]) -> pa.Table:
    rows = [
        {"image_id": i, "key": f"{i}.jpg", "content_sha256": bytes(32), "source": 0, "kind": "files",
         "object": f"{i}.jpg", "start": 0, "num_bytes": 9, "height": 3, "width": 4}
        for i in ids
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=IDS_SCHEMA)


class TestPartitionBounds:
    @pytest.mark.parametrize("number", [1, 2, 3, 7, 1000])
    def test_they_cover_every_id_once(self, number: int) -> None:
        bounds = partition_bounds(number)
        assert len(bounds) == number
        assert bounds[0][0] == 0
        assert bounds[-1][1] == 1 << 63
        assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
        sizes = [high - low for low, high in bounds]
        assert max(sizes) - min(sizes) <= 1


def test_a_layout_survives_json() -> None:
    layout = Layout(
        {"local": ChannelLayout(("a", "b"), "index", {"weights": "assets/x"})},
        (
            PartitionLayout(0, 1 << 62, 3, "ids", "bad", {"local": ("i", "k")}, {"local": "f"}, {"local": "s"}),
            PartitionLayout(1 << 62, 1 << 63, 0, "j", "b", {}, {}, {}),
        ),
    )
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


class TestIdMap:
    def test_gives_rows_in_the_order_of_the_question(self, tmp_path: Path) -> None:
        IdMap.write(tmp_path / "ids.arrow", id_rows([3, 8, 1 << 61]))
        ids = IdMap(tmp_path / "ids.arrow")
        assert len(ids) == 3
        assert ids.rows(np.array([1 << 61, 3, 3])).column("key").to_pylist() == [f"{1 << 61}.jpg", "3.jpg", "3.jpg"]

    @pytest.mark.parametrize("wanted", [0, 5, 99])
    def test_a_missing_image_is_named(self, tmp_path: Path, wanted: int) -> None:
        IdMap.write(tmp_path / "ids.arrow", id_rows([3, 8]))
        with pytest.raises(ArtifactError, match=f"image id {wanted} is in the index but not in its id map"):
            IdMap(tmp_path / "ids.arrow").rows(np.array([3, wanted]))

    def test_labels_are_those_of_the_rows(self, tmp_path: Path) -> None:
        IdMap.write(tmp_path / "ids.arrow", id_rows([3, 8, 1 << 61]))
        ids = IdMap(tmp_path / "ids.arrow")
        labels = ids.labels(np.array([1 << 61, 3]))
        assert labels.by_id == {1 << 61: (f"{1 << 61}.jpg", [3, 4]), 3: ("3.jpg", [3, 4])}
        assert ids.label(8) == ("8.jpg", 3, 4)
        both = Labels.concatenate([labels, ids.labels(np.array([8])), Labels.none()])
        assert both.by_id == labels.by_id | {8: ("8.jpg", [3, 4])}
        assert Labels.concatenate([]).by_id == {}
        for wanted in (0, 5, 1 << 62):
            with pytest.raises(ArtifactError, match=f"image id {wanted} is in the index but not in its id map"):
                ids.label(wanted)

    def test_may_be_empty(self, tmp_path: Path) -> None:
        IdMap.write(tmp_path / "ids.arrow", id_rows([]))
        ids = IdMap(tmp_path / "ids.arrow")
        assert len(ids) == 0
        assert ids.rows(np.empty(0, np.int64)).num_rows == 0
        with pytest.raises(ArtifactError, match="image id 3"):
            ids.rows(np.array([3]))

    @pytest.mark.parametrize("size", [0, 9, 100, -1])
    def test_a_cut_file_is_refused(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "ids.arrow"
        IdMap.write(path, id_rows([3, 8]))
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ArtifactError, match=r"ids.arrow: not a whole Arrow file.*cbir verify"):
            IdMap(path)

    def test_equal_rows_give_equal_bytes(self, tmp_path: Path) -> None:
        IdMap.write(tmp_path / "one", id_rows([3, 8]))
        IdMap.write(tmp_path / "two", pa.concat_tables([id_rows([3]), id_rows([8])]))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class TestFeatureFile:
    @pytest.mark.parametrize("dtype", ["uint8", "float32"])
    @pytest.mark.parametrize("batches", [1, 3])
    def test_gives_features_in_the_order_of_the_question(self, tmp_path: Path, dtype: str, batches: int) -> None:
        known = features(list(range(2, 700, 2)), np.random.default_rng(1), dtype)
        step = -(-len(known) // batches)
        parts = (known.take(np.arange(at, min(at + step, len(known)))) for at in range(0, len(known), step))
        assert FeatureFile.write(tmp_path / "f", parts, known.take(np.empty(0, np.int64))) == len(known)
        stored = FeatureFile(tmp_path / "f")
        positions = np.array([300, 0, 7, 7, len(known) - 1])
        read, expected = stored.read(known.image_ids[positions]), known.take(positions)
        assert read.descriptors.dtype == np.dtype(dtype)
        assert_equal(read, expected)

    def test_an_image_without_features_has_no_rows(self, tmp_path: Path) -> None:
        """It was quarantined in this channel, and another channel indexed it."""
        known = features([5, 6, 9], np.random.default_rng(2))
        FeatureFile.write(tmp_path / "f", iter([known]), known)
        read = FeatureFile(tmp_path / "f").read(np.array([7, 9, 1, 5, 99]))
        assert read.image_ids.tolist() == [7, 9, 1, 5, 99]
        assert read.counts.tolist() == [0, 1, 0, 1, 0]
        assert np.array_equal(read.descriptors, known.take(np.array([2, 0])).descriptors)

    def test_may_be_empty(self, tmp_path: Path) -> None:
        nothing = features([5], np.random.default_rng(2)).take(np.empty(0, np.int64))
        assert FeatureFile.write(tmp_path / "f", iter([]), nothing) == 0
        stored = FeatureFile(tmp_path / "f")
        for ids in ([], [4, 5]):
            read = stored.read(np.array(ids, np.int64))
            assert read.counts.tolist() == [0] * len(ids)
            assert read.descriptors.shape == (0, 3)
            assert read.geometry.shape == (0, 4)

    def test_a_cut_file_is_refused(self, tmp_path: Path) -> None:
        known = features([5, 6, 9], np.random.default_rng(2))
        FeatureFile.write(tmp_path / "f", iter([known]), known)
        (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-20])
        with pytest.raises(ArtifactError, match="not a whole Arrow file"):
            FeatureFile(tmp_path / "f")

    def test_bytes_do_not_depend_on_how_images_were_batched(self, tmp_path: Path) -> None:
        known = features(list(range(512)), np.random.default_rng(3))
        halves = (known.take(np.arange(start, start + 256)) for start in (0, 256))
        FeatureFile.write(tmp_path / "one", iter([known]), known)
        FeatureFile.write(tmp_path / "two", halves, known)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def assert_equal(found: FeatureBatch, expected: FeatureBatch) -> None:
    for name in ("image_ids", "offsets", "descriptors", "geometry"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
