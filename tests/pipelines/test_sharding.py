"""How images are sharded never shows in an index: not in codebooks, ids, partitions or answers."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import cbir
from cbir.artifacts import Done, sha256_of
from cbir.config import Config
from cbir.encoding.rootsift import RootSift
from cbir.errors import DataError
from cbir.layout import Layout
from cbir.types import FEATURES_SCHEMA, FeatureBatch, image_id
from cbir.versions import Manifest
from pipelines.indexing import index
from pipelines.training import packed
from pipelines.work import Worker
from tests.benchmarks import bench_sharding as bench
from tests.collection_forms import write_files, write_parquet, write_tar

ConfigOf = Callable[..., Config]
Arrange = Callable[[Path, dict[str, bytes]], dict[str, Any]]

SIFT = {"name": "sift", "max_features": 60}
VLAD = [{"name": "rootsift"}, {"name": "vlad", "words": 8}]
CHANNELS = {
    "flat": {"extractor": SIFT, "encoders": VLAD, "index": {"name": "flat"}, "keep_features": True},
    "coded": {
        "extractor": SIFT,
        "encoders": [*VLAD, {"name": "pca", "dim": 16}],
        "index": {"name": "ivfpq", "lists": 4, "bytes": 8, "bits": 4, "opq": True},
    },
    "words": {
        "extractor": SIFT,
        "encoders": [{"name": "rootsift"}],
        "index": {"name": "asmk", "words": 32, "idf": True, "word_ranges": 2},
        "keep_signatures": True,
    },
}
SETTINGS = {
    "channels": CHANNELS,
    "sample": {"images": 30},
    "search": {"depth": 50, "fuse": {"name": "adaptive"}, "rerank": [{"name": "ransac", "channel": "flat", "top": 10}]},
}


def shards(write: Callable[[Path, dict[str, bytes]], Path], suffix: str, num: int, *, shuffled: bool) -> Arrange:
    """Write `num` shards of equal size, in the order of the classes or shuffled."""

    def arrange(root: Path, pictures: dict[str, bytes]) -> dict[str, Any]:
        keys = sorted(pictures)
        if shuffled:
            keys = [keys[i] for i in np.random.default_rng(3).permutation(len(keys))]
        root.mkdir()
        for number, some in enumerate(np.array_split(keys, num)):
            write(root / f"{number:03d}.{suffix}", {key: pictures[key] for key in some.tolist()})
        return {"images": [str(root)]}

    return arrange


def folder(shard_images: int) -> Arrange:
    def arrange(root: Path, pictures: dict[str, bytes]) -> dict[str, Any]:
        return {"images": [str(write_files(root, pictures))], "input": {"shard_images": shard_images}}

    return arrange


ARRANGEMENTS: dict[str, Arrange] = {
    "7 tars, class-sorted": shards(write_tar, "tar", 7, shuffled=False),
    "40 tars, shuffled": shards(write_tar, "tar", 40, shuffled=True),
    "7 Parquet files, shuffled": shards(write_parquet, "parquet", 7, shuffled=True),
    "40 Parquet files, class-sorted": shards(write_parquet, "parquet", 40, shuffled=False),
    "a folder": folder(6),
}


@pytest.fixture(scope="module")
def one_tar(
    settings: Callable[..., dict[str, Any]], pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an index of all pictures in one tar gives."""
    root = tmp_path_factory.mktemp("one")
    images = shards(write_tar, "tar", 1, shuffled=False)(root / "images", pictures)
    config = Config.model_validate(settings(**SETTINGS, store=str(root / "store"), **images))
    return outcome(index(config), config, pictures)


def outcome(manifest: Manifest, config: Config, pictures: dict[str, bytes]) -> dict[str, Any]:
    """Everything of a version that must not depend on the sharding."""
    layout, sha256 = Layout.from_json(manifest.layout), {file.key: file.sha256 for file in manifest.files}
    searcher = cbir.open(config.store)
    queries = [pictures[key] for key in ("object1/view0.jpg", "object4/view2.jpg", "object7/view4.jpg")]
    answer = searcher.answer(queries, depth=50)
    return {
        "codebooks": {
            name: [sha256[key] for key in (*channel.encoders, channel.index)]
            for name, channel in layout.channels.items()
        },
        "partitions": [
            sorted(sha256[key] for key in part.keys - {part.ids, part.quarantine}) for part in layout.partitions
        ],
        "keys": searcher.keys(),
        "ids": answer.hits.image_ids.tolist(),
        "scores": answer.hits.scores.tolist(),
        "by channel": {name: hits.scores.tolist() for name, hits in answer.by_channel.items()},
        "quality": manifest.quality,
        "counts": {name: manifest.counts[name] for name in ("images", "indexed", "quarantined", "features", "bytes")},
    }


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_shards_do_not_matter(
    arrangement: str, one_tar: dict[str, Any], config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    settings = config(**SETTINGS, **ARRANGEMENTS[arrangement](tmp_path / "images", pictures))
    found = outcome(index(settings), settings, pictures)
    assert len(found["keys"]) == 40
    assert len(found["partitions"][0]) == 6
    for what, expected in one_tar.items():
        assert found[what] == expected, what


def test_partitions_answer_like_one(
    one_tar: dict[str, Any],
    config: ConfigOf,
    pictures: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.run.Run._num_partitions", lambda *_: 5)
    settings = config(**SETTINGS, **ARRANGEMENTS["7 tars, class-sorted"](tmp_path / "images", pictures))
    found = outcome(index(settings), settings, pictures)
    assert len(found["partitions"]) == 5
    for what in one_tar.keys() - {"partitions"}:
        assert found[what] == one_tar[what], what


@pytest.fixture(scope="module")
def clustered() -> bench.Clustered:
    return bench.Clustered.draw(4000)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(str(tmp_path / "store"))
    yield worker
    worker.close()


def test_class_sorted_shards_cost_no_recall(worker: Worker, clustered: bench.Clustered) -> None:
    num, true, work, share = len(clustered.vectors), bench.truth(clustered), bench.channel(bench.IVFPQ), 0.2
    ours, first = [], []
    for arrange in (bench.sorted_shards, bench.shuffled_shards):
        parts = arrange(num, 20)
        built = bench.build(worker, work, bench.extracted(worker, clustered, parts), share)
        ours.append(bench.recall(built.search(clustered.query_batch()).image_ids, true))
        first.append(bench.recall(bench.trained_on_the_first(clustered, np.concatenate(parts), share), true))
    assert abs(ours[0] - ours[1]) <= 0.01
    assert first[0] < first[1] - 0.1, "training on the first vectors is what the sample is there to avoid"
    assert ours[0] > first[0] + 0.1


@pytest.mark.parametrize("spec", [bench.IVFPQ, {"name": "flat"}], ids=["ivfpq", "flat"])
def test_merged_is_the_same_as_whole(worker: Worker, clustered: bench.Clustered, spec: dict[str, object]) -> None:
    work, queries = bench.channel(spec), clustered.query_batch()

    def built(num_shards: int, num_partitions: int) -> bench.BuiltIndex:
        records = bench.extracted(worker, clustered, bench.shuffled_shards(len(clustered.vectors), num_shards))
        return bench.build(worker, work, records, 0.3, num_partitions)

    whole, merged, parted = built(1, 1), built(9, 1), built(9, 4)
    assert digests(merged.merges) == digests(whole.merges)
    assert len(merged.partitions) == 1, "a query meets no more files, however many shards were built"
    assert len(set(digests(parted.merges))) == 4
    expected = whole.search(queries)
    for other in (merged, parted, bench.unmerged(worker, work, merged)):
        hits = other.search(queries)
        np.testing.assert_array_equal(hits.image_ids, expected.image_ids)
        np.testing.assert_array_equal(hits.scores, expected.scores)


def digests(merges: Any) -> list[str]:
    dones: list[Done] = list(merges)
    return [done.file("index").sha256 for done in dones]


def test_a_large_codebook_is_trained_in_rounds_that_shards_and_workers_do_not_change(
    settings: Callable[..., dict[str, Any]], pictures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_of_words = {"name": "asmk", "words": 1024, "iterations": 2}
    channel = {"extractor": SIFT, "encoders": [{"name": "rootsift"}], "index": index_of_words}
    found = []
    for number, part in enumerate((10**6, 300, 1)):
        monkeypatch.setattr("pipelines.run._PART_FEATURES", part)
        arrange = shards(write_tar, "tar", 1 + 6 * number, shuffled=number > 1)
        images = arrange(tmp_path / f"images{number}", pictures)
        data = settings(store=str(tmp_path / f"store{number}"), channels={"local": channel}, search={}, **images)
        manifest = index(Config.model_validate(data))
        (key,) = [part.index for part in Layout.from_json(manifest.layout).channels.values()]
        found.append({file.key: file.sha256 for file in manifest.files}[key])
        rounds = list((tmp_path / f"store{number}" / "stages" / "codebook").iterdir())
        assert len(rounds) >= 1 + 2 * 2, "the beginning, and sums and means of two rounds"
    assert len(set(found)) == 1
    sample = encoded_features(tmp_path / "store0")
    spec = Config.model_validate(data).channels["local"].index
    assert sha256_of(packed(spec.train(sample, 0).state())) == found[0], "as one process trains it"


def encoded_features(store: Path) -> FeatureBatch:
    """All encoded features of an index of one shard."""
    files = [path for path in (store / "stages" / "extract").rglob("part-*") if b"descriptors" in path.read_bytes()]
    (features,) = [FeatureBatch.from_arrow(pq.read_table(path, columns=FEATURES_SCHEMA.names)) for path in files]
    return RootSift().fit(features, 0).encode(features)


def test_a_key_in_two_shards_is_an_error_that_names_both(
    config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    images, key = tmp_path / "images", "object0/view0.jpg"
    settings = shards(write_tar, "tar", 3, shuffled=False)(images, pictures)
    write_tar(images / "again.tar", {key: pictures[key]})
    with pytest.raises(DataError, match=rf"key '{key}' stands twice: in .*00\d\.tar: .* and in .*again\.tar: member"):
        index(config(**settings))


def test_a_key_in_two_sources_is_an_error_although_one_copy_is_broken(
    config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    some = {key: pictures[key] for key in list(pictures)[:12]}
    one, two = write_files(tmp_path / "one", some), write_files(tmp_path / "two", {"object0/view3.jpg": b"broken"})
    with pytest.raises(
        DataError, match=r"'object0/view3.jpg' stands twice: in /.*/one/object0.* and in /.*/two/object0"
    ):
        index(config(images=[str(one), str(two)]))
    shutil.rmtree(two)
    write_files(two, {"elsewhere.jpg": b"broken"})
    assert index(config(images=[str(one), str(two)])).counts["quarantined"] == 1


def test_the_same_image_in_two_channels_is_no_duplicate(config: ConfigOf, pictures: dict[str, bytes]) -> None:
    manifest = index(config(**SETTINGS))
    assert (manifest.counts["images"], manifest.counts["indexed"], manifest.counts["quarantined"]) == (42, 40, 2)


def test_two_keys_with_one_id_are_a_clear_error(config: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.extract.image_id", lambda key: image_id(key) >> 59)
    with pytest.raises(DataError, match=r"keys '.*' and '.*' have the same 63-bit id; rename one"):
        index(config())
