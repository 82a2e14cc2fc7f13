"""Regions and masks through the pipeline: what is stored, what is found, and what has to be done again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import cbir
from cbir.artifacts import find_done
from cbir.config import Config, parse_config
from cbir.errors import ConfigError
from cbir.features.masks.segmentation import Segmentation
from cbir.images import Decoded, Limits, View, decode
from cbir.storage import open_store
from cbir.types import FeatureBatch, ImageBatch
from pipelines.estimates import estimate
from pipelines.extract import ExtractTask
from pipelines.indexing import index
from pipelines.plans import plan
from pipelines.work import Asset, ChannelWork
from tests.features.lively import lively

ConfigOf = Callable[..., Config]

VLAD = {"name": "vlad", "words": 8}
SEGMENTATION = {"name": "segmentation", "model": "lraspp_mobilenet_v3_large", "num_classes": 3, "drop": [1], "size": 96}


def channel(**changes: Any) -> dict[str, Any]:
    return {
        "local": {
            "extractor": {"name": "sift", "max_features": 60},
            "encoders": [{"name": "rootsift"}, VLAD],
            "index": {"name": "flat"},
        }
        | changes
    }


def regional(similarity: str) -> dict[str, Any]:
    per_region = {"name": "per_region", "encoder": VLAD, "similarity": similarity}
    return channel(proposer={"name": "grid"}, encoders=[{"name": "rootsift"}, per_region])


def stored_features(config: Config, assets: dict[str, Asset] | None = None) -> list[FeatureBatch]:
    """What the stage `extract` left in the store, shard by shard."""
    store, work = open_store(config.store), ChannelWork("local", config.channels["local"], assets or {})
    batches = []
    for shard in plan(config):
        done = find_done(store, "extract", ExtractTask.of(shard, work, config).fingerprint)
        assert done is not None
        path = store.local_path(done.file("features").key)
        assert path is not None
        batches.append(FeatureBatch.from_arrow(pq.read_table(path)))
    return batches


@pytest.mark.parametrize("similarity", ["max", "mean"])
def test_regional_search_of_tiles(config: ConfigOf, pictures: dict[str, bytes], similarity: str) -> None:
    settings = config(channels=regional(similarity), search={"depth": 50})
    manifest = index(settings)
    assert manifest.counts["indexed"] == 40
    for batch in stored_features(settings):
        assert batch.regions is not None
        assert (np.diff(batch.regions.offsets) == 14).all()
        for i, (height, width) in enumerate(batch.sizes):
            assert batch.regions.of(i)[0].tolist() == [0, 0, width, height]
            assert batch.members(i).sum(axis=0).tolist() == [3] * int(batch.counts[i])
    searcher = cbir.open(settings.store)
    vectors = searcher.partitions[0].indexes["local"].faiss.ntotal  # type: ignore[attr-defined]
    assert vectors == (40 * 14 if similarity == "max" else 40)
    results = searcher.search(pictures["object3/view1.jpg"], depth=5)
    assert {result.key.partition("/")[0] for result in results} == {"object3"}


def test_without_a_proposer_there_are_no_regions(config: ConfigOf) -> None:
    settings = config(channels=channel(), search={"depth": 50})
    index(settings)
    assert all(batch.regions is None for batch in stored_features(settings))


def test_an_estimate_counts_a_vector_per_region(config: ConfigOf) -> None:
    sizes = []
    for channels in (channel(), regional("mean"), regional("max")):
        lines = {line.what: line.basis for line in estimate(config(channels=channels, search={})).lines}
        sizes.append(lines["local: disk"].split("2 x ")[1])
    assert sizes[0] == sizes[1] != sizes[2]


def test_the_proposer_and_its_files_identify_what_is_extracted(config: ConfigOf) -> None:
    detector = {"name": "detector", "model": "ssdlite320_mobilenet_v3_large", "weights": "a.pth"}

    def identity(sha256: str = "0", **changes: Any) -> str:
        settings = config(channels=channel(**changes), search={})
        names = settings.channels["local"].assets
        work = ChannelWork("local", settings.channels["local"], {name: Asset("key", sha256) for name in names})
        return ExtractTask.of(plan(settings)[0], work, settings).fingerprint

    plain, detected = identity(), identity(proposer=detector)
    masked = identity(mask={**SEGMENTATION, "weights": "a.pth"})
    assert len({plain, detected, masked, identity(proposer={"name": "grid"})}) == 4
    assert identity("1") == plain
    assert identity("1", proposer=detector) != detected
    assert identity(proposer={**detector, "weights": "moved/b.pth"}) == detected
    assert identity(proposer={**detector, "score": 0.5}) != detected
    assert identity("1", mask={**SEGMENTATION, "weights": "a.pth"}) != masked


def median_of_mask(spec: Segmentation, picture: bytes) -> float:
    decoded = decode(picture, View(size=1024), Limits())
    assert isinstance(decoded, Decoded)
    batch = ImageBatch(np.zeros(1, np.int64), [decoded.pixels], np.array([decoded.size], np.int32))
    return float(np.median(spec.build("cpu", {}).masks(batch)[0]))


def test_a_mask_is_stored_and_serves_queries(config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path) -> None:
    import torch
    import torchvision

    torch.set_num_threads(1)
    path = tmp_path / "weights.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = torchvision.models.get_model(SEGMENTATION["model"], weights_backbone=None, num_classes=3)
        lively(network, torch.randn(4, 3, 96, 96))
    torch.save(network.state_dict(), path)
    mask = {**SEGMENTATION, "weights": str(path)}
    mask["threshold"] = median_of_mask(Segmentation(**mask), pictures["object2/view0.jpg"])
    settings = config(channels=channel(mask=mask, keep_features=True), search={"depth": 50})
    manifest = index(settings)
    assert [file.role for file in manifest.files].count("asset") == 1
    path.unlink()
    searcher = cbir.open(settings.store)
    answer = searcher.answer([pictures["object2/view0.jpg"]], depth=3)
    image = int(answer.hits.image_ids[0, 0])
    assert searcher.keys()[image] == "object2/view0.jpg"
    queried, stored = answer.query_features["local"], searcher.features("local", np.array([image]))
    assert queried.descriptors.tobytes() == stored.descriptors.tobytes()
    assert 0 < manifest.counts["features"] < 40 * 60
    assert len(queried.descriptors) < 60


def test_missing_files_are_named_by_their_place(config: ConfigOf) -> None:
    mask = {**SEGMENTATION, "weights": "absent/weights.pth"}
    with pytest.raises(ConfigError, match=r"channels.local.mask.weights: cannot read absent/weights.pth"):
        index(config(channels=channel(mask=mask), search={}))


def test_a_configuration_with_regions_comes_back(config: ConfigOf) -> None:
    settings = config(channels=regional("mean"), search={})
    assert parse_config(settings.model_dump(mode="json"), "manifest") == settings
