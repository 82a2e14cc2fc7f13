"""What `cbir check` says before a run, compared with what the run then took."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cbir.artifacts import Done, find_done
from cbir.config import Config, load_config
from cbir.encoding.encoder import EncoderSpec
from cbir.errors import DataError
from cbir.spec import methods
from cbir.storage import Store, open_store
from cbir.types import FeatureBatch
from cbir.versions import Versions
from pipelines import estimates
from pipelines.estimates import Estimate, estimate
from pipelines.indexing import index
from pipelines.plans import plan
from tests.collection_forms import write_tar
from tests.conftest import PROJECT

ConfigOf = Callable[..., Config]


def line(found: Estimate, what: str) -> tuple[str, str]:
    return next((row.value, row.basis) for row in found.lines if row.what == what)


def records(store: Store, stage: str) -> list[Done]:
    pairs = (prefix.split("/")[1:3] for prefix in Versions(store).load().work)
    return [done for name, key in pairs if name == stage and (done := find_done(store, name, key))]


def test_every_figure_has_a_value_and_a_basis(config: ConfigOf) -> None:
    found = estimate(config())
    names = [row.what for row in found.lines]
    assert {"shards", "images", "bytes to read", "local: disk", "local: extraction", "disk", "memory", "time"} == set(
        names
    )
    assert all(row.value and row.basis for row in found.lines)
    assert "16 images tried" in line(found, "local: extraction")[1]


def test_what_can_be_counted_is_counted(config: ConfigOf, pictures: dict[str, bytes]) -> None:
    found = estimate(config())
    assert found.num_images == len(pictures)
    assert found.num_bytes == sum(map(len, pictures.values()))
    assert line(found, "images") == ("42", "counted")
    assert found.num_shards == len(plan(config()))


def test_disk_is_what_the_run_then_takes(config: ConfigOf) -> None:
    """The features of the tried images are like those of all; the rest follows from the settings."""
    settings = config()
    found = estimate(settings)
    index(settings)
    store = open_store(settings.store)
    features = sum(done.facts["feature_bytes"] for done in records(store, "extract"))
    entries = sum(done.facts["entry_bytes"] for done in records(store, "build"))
    assert found.disk_bytes == pytest.approx(2 * features + 2 * entries, rel=0.1)
    on_disk = sum(path.stat().st_size for path in Path(settings.store).rglob("*") if path.is_file())
    assert 0.5 < found.disk_bytes / on_disk < 2


def test_nothing_is_written(config: ConfigOf) -> None:
    estimate(config())
    assert not Path(config().store).exists()


@pytest.mark.parametrize("name", sorted(methods("encoder")))
def test_encoders_tell_their_output_size(name: str) -> None:
    """What the estimate relies on, for every registered encoder."""
    encoder = methods("encoder")[name]
    required = {field: info for field, info in encoder.model_fields.items() if info.is_required()}
    spec = encoder(**{field: 3 if info.annotation is int else info.examples[0] for field, info in required.items()})
    assert isinstance(spec, EncoderSpec)
    if spec.assets:
        pytest.skip("needs files, with which the conformance tests of encoders compare its size")
    rng = np.random.default_rng(0)
    local = spec.aggregates or spec.precursor is not None
    rows = [rng.integers(0, 255, (40 if local else 1, 128)).astype(np.float32) for _ in range(40)]
    batch = FeatureBatch.of_images(np.arange(40), rows, [rng.random((len(some), 4), np.float32) for some in rows])
    if spec.precursor is not None:
        batch = spec.precursor.fit(batch, 0).encode(batch)
    encoded = spec.fit(batch, 0).encode(batch)
    assert encoded.descriptors.shape[1] == spec.output_dim(batch.descriptors.shape[1])


def test_tars_are_counted_by_their_bytes(config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path) -> None:
    members = [(key, data) for key, data in pictures.items() if key.startswith("object")]
    (tmp_path / "tars").mkdir()
    for number in range(4):
        write_tar(tmp_path / "tars" / f"{number}.tar", dict(members[number::4]))
    found = estimate(config(images=[str(tmp_path / "tars")]))
    assert "bytes / the mean of 16 images" in line(found, "images")[1]
    assert abs(found.num_images - 40) <= 6


def test_images_are_tried_from_all_over_the_collection(config: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    original = estimates.decode
    monkeypatch.setattr(estimates, "decode", lambda data, *rest: (tried.append(data), original(data, *rest))[1])
    settings = config(input={"shard_images": 4})
    estimate(settings)
    shards = plan(settings)
    assert len(shards) > 8
    owners = {
        number
        for number, shard in enumerate(shards)
        for info in shard.objects
        if (Path(settings.images[0]) / info.key).read_bytes() in tried
    }
    assert len(owners) >= 4
    assert max(owners) - min(owners) > len(shards) // 2


def test_bad_images_are_told(config: ConfigOf, folder: Path, tmp_path: Path) -> None:
    found = estimate(config(images=[str(folder / "images" / "object0"), str(folder / "images" / "broken")]))
    assert found.num_images == 7
    assert "7 images tried, 2 of them cannot be used" in line(found, "local: extraction")[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing lies under"):
        estimate(config(images=[str(tmp_path / "empty")]))


def test_pools_divide_the_time_and_multiply_the_memory(config: ConfigOf) -> None:
    one = estimate(config(workers=1))
    many = estimate(config(pools={"extract": {"workers": 50, "gpus": 1}}))
    assert many.seconds < one.seconds / 5
    assert many.memory_bytes > 10 * one.memory_bytes
    assert "50 worker(s)" in line(many, "local: extraction")[1]
    assert "the pool has GPUs" in line(many, "local: extraction")[1]


def test_memory_knows_that_a_sample_is_no_larger_than_the_collection(config: ConfigOf) -> None:
    everything = estimate(config(sample={"images": 10**9, "features": 10**9}))
    some = estimate(config(sample={"images": 4, "features": 10**9}))
    few_features = estimate(config(sample={"images": 10**9, "features": 60}))
    kilobytes = {
        name: float(line(found, "memory")[1].split()[-2]) * {"kB": 1, "B": 1e-3}[line(found, "memory")[1].split()[-1]]
        for name, found in {"all": everything, "4": some, "60": few_features}.items()
    }
    assert kilobytes["all"] == pytest.approx(42 * 60 * (128 + 16) / 1000, rel=0.1)
    assert kilobytes["4"] == pytest.approx(kilobytes["all"] * 4 / 42, rel=0.01)
    assert kilobytes["60"] == pytest.approx(60 * (128 + 16) / 1000, rel=0.1)


def test_a_deep_channel_is_tried_with_its_own_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random network of the smallest kind; compressed codes are as large as the settings say."""
    monkeypatch.setattr(estimates, "TRIED_IMAGES", 2)
    config = load_config(
        PROJECT / "configs" / "deep_ivfpq.yaml",
        [
            f"images=[{folder / 'images' / 'object0'}]",
            f"store={tmp_path / 'store'}",
            "channels.global.extractor={name: deep, backbone: test_resnet, weights: none, size: 64}",
            "channels.global.encoders=[{name: pca, dim: 32}]",
        ],
    )
    found = estimate(config)
    assert "2 x 40 B of index" in line(found, "global: disk")[1]
    assert "2 images tried" in line(found, "global: disk")[1]


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e6, "1.5 MB"), (2e9, "2.0 GB"), (5e15, "5.0 PB")],
)
def test_sizes_in_words(number: float, words: str) -> None:
    assert estimates.in_bytes(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (89, "89.0 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert estimates.in_time(seconds) == words
