"""The tasks after `extract`, each against what it means."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from cbir.artifacts import Done
from cbir.config import Channel
from cbir.errors import DataError
from cbir.index import nearest
from cbir.types import FEATURES_SCHEMA, FeatureBatch
from pipelines.build import BuildTask
from pipelines.tables import open_parquet, read_features
from pipelines.training import SampleTask, TrainTask, seeded_uniform
from pipelines.work import ChannelWork, Worker
from tests.benchmarks import bench_sharding as bench

NUM = 600


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(str(tmp_path / "store"))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def data() -> bench.Clustered:
    return bench.Clustered.draw(NUM)


def sampled(worker: Worker, done: Done, share: float) -> FeatureBatch:
    sample = worker.do(SampleTask.of(done, share, 7)).done
    return FeatureBatch.from_arrow(open_parquet(worker.store, sample.file("sample")).read(FEATURES_SCHEMA.names))


def test_a_worker_on_a_gpu_lets_it_find_centroids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_device", "cpu")
    Worker(str(tmp_path / "store"), "cuda").close()
    assert nearest._device == "cuda"


def test_the_hash_that_draws_the_sample_is_even() -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 63, 20_000, dtype=np.int64)
    drawn = seeded_uniform(ids, 3)
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert (np.abs(counts - 1000) < 5 * 1000**0.5).all()
    assert abs(np.corrcoef(drawn, seeded_uniform(ids, 4))[0, 1]) < 0.03


def test_an_image_is_drawn_or_not_whatever_its_shard(worker: Worker, data: bench.Clustered) -> None:
    def drawn(parts: list[np.ndarray]) -> list[int]:
        dones = bench.extracted(worker, data, parts)
        return sorted(image for done in dones for image in sampled(worker, done, 0.3).image_ids.tolist())

    whole = drawn(bench.sorted_shards(NUM, 1))
    assert drawn(bench.shuffled_shards(NUM, 5)) == whole
    assert 0.2 * NUM < len(whole) < 0.4 * NUM


def test_a_sample_of_everything_is_not_written_again(worker: Worker, data: bench.Clustered) -> None:
    (done,) = bench.extracted(worker, data, bench.sorted_shards(NUM, 1))
    sample = worker.do(SampleTask.of(done, 1.0, 7)).done
    assert sample.file("sample").key == done.file("features").key
    assert (sample.counts["images"], sample.counts["features"]) == (NUM, NUM)
    np.testing.assert_array_equal(sampled(worker, done, 1.0).image_ids, sampled(worker, done, 0.9999999).image_ids)


def test_training_gives_what_the_methods_give_on_the_sorted_sample(worker: Worker, data: bench.Clustered) -> None:
    """Also where the sample is not encoded to its end, because nothing looks at it there."""
    for index in ({"name": "flat"}, bench.IVFPQ | {"bits": 4, "lists": 8}):
        channel = Channel.model_validate(
            {
                "extractor": {"name": "deep", "backbone": "resnet18", "weights": "none", "size": 32},
                "encoders": [{"name": "pca", "dim": 16}, {"name": "power"}, {"name": "l2"}],
                "index": index,
            }
        )
        records = bench.extracted(worker, data, bench.shuffled_shards(NUM, 3))
        drawing = [SampleTask.of(done, 0.5, 7) for done in records]
        samples = [worker.do(task).done for task in drawing]
        train = worker.do(TrainTask.of(ChannelWork("it", channel), drawing, samples, 7, 20)).done

        sample = FeatureBatch.concatenate([sampled(worker, done, 0.5) for done in records])
        sample = sample.take(np.argsort(sample.image_ids))
        for number, spec in enumerate(channel.encoders):
            encoder = spec.fit(sample, 7)
            assert_state(worker, train, f"encoder-{number}", encoder.state())
            sample = encoder.encode(sample)
        assert_state(worker, train, "index", channel.index.train(sample, 7).state())
        probes = FeatureBatch.from_arrow(open_parquet(worker.store, train.file("probes")).read())
        rows = np.searchsorted(sample.image_ids, probes.image_ids)
        assert len(probes) == 20
        np.testing.assert_array_equal(probes.descriptors, sample.take(rows).descriptors)


def assert_state(worker: Worker, train: Done, role: str, expected: object) -> None:
    found = load(worker.store.read(train.file(role).key))
    assert isinstance(expected, dict)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_sample_without_images_is_a_clear_error(worker: Worker, data: bench.Clustered) -> None:
    records = bench.extracted(worker, data, [np.arange(3)])
    drawing = [SampleTask.of(done, 0.0, 7) for done in records]
    samples = [worker.do(task).done for task in drawing]
    with pytest.raises(DataError, match=r"train codebooks \[global\]: channel 'global' has no image to train on"):
        worker.do(TrainTask.of(bench.channel({"name": "flat"}), drawing, samples, 7, 20))


def test_a_shard_of_which_nothing_is_left_builds_no_entries(worker: Worker, data: bench.Clustered) -> None:
    work = bench.channel({"name": "flat"})
    whole, nothing = bench.extracted(worker, data, [np.arange(NUM), np.arange(0)])
    built = bench.build(worker, work, [whole, nothing], 1.0)
    assert list(read_features(worker.store, nothing)) != []
    done = worker.do(BuildTask.of(work, nothing, built.train)).done
    assert done.counts == {"images": 0, "vectors": 0}
    alone = bench.build(worker, work, [whole], 1.0)
    assert built.merges[0].file("index").sha256 == alone.merges[0].file("index").sha256


def test_larger_pieces_of_work_weigh_more(worker: Worker, data: bench.Clustered) -> None:
    work = bench.channel({"name": "flat"})
    records = bench.extracted(worker, data, [np.arange(10), np.arange(10, 300)])
    train = bench.build(worker, work, records, 1.0).train
    small, large = (BuildTask.of(work, done, train) for done in records)
    assert small.weight < large.weight
