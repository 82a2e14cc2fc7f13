"""Poolings through the pipeline: from YAML to an answer, files of weights included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cbir
from cbir.config import Config
from cbir.errors import ConfigError
from cbir.spec import methods
from pipelines.indexing import index
from tests.features.pooling.maps import maps
from tests.features.pooling.test_conformance import TINY, made

ConfigOf = Callable[..., Config]
CHANNELS = 96
"""Maps of the tiny network."""


def channel(pooling: dict[str, Any]) -> dict[str, Any]:
    return {"extractor": {**TINY, "name": "deep", "pooling": pooling}, "index": {"name": "flat"}}


def test_every_pooling_is_reachable_from_yaml(config: ConfigOf, pictures: dict[str, bytes], folder: Path) -> None:
    """All in one run, each as a channel of its own: a picture finds itself in every channel."""
    channels = {name: channel(made(name, {}).model_dump(mode="json")) for name in methods("pooling")}
    images = str(folder / "images" / "object3")
    settings = config(images=images, channels=channels, search={"depth": 5, "fuse": {"name": "rrf"}})
    assert index(settings).counts["indexed"] == 5
    answer = cbir.open(settings.store).answer([pictures["object3/view1.jpg"]], depth=1)
    assert answer.results(0)[0].key == "view1.jpg"
    assert set(answer.by_channel) == set(channels)
    assert {int(hits.image_ids[0, 0]) for hits in answer.by_channel.values()} == {int(answer.hits.image_ids[0, 0])}


def words_file(path: Path, seed: int) -> str:
    words = torch.nn.functional.normalize(maps((4, CHANNELS), seed))
    save_file({"centroids": words, "conv.weight": 20 * words[:, :, None, None], "conv.bias": torch.zeros(4)}, path)
    return str(path)


def test_a_pooling_takes_its_weights_along_into_the_store(
    config: ConfigOf, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    """Searched when the file is gone; other content under the same path is another work."""
    path = tmp_path / "words.safetensors"
    pooling = {"name": "netvlad", "weights": words_file(path, 1), "words": 4}
    settings = config(channels={"places": channel(pooling)}, search={"depth": 5})
    assert settings.channels["places"].assets == {"extractor.pooling.weights": str(path)}
    first = index(settings)
    path.unlink()
    searcher = cbir.open(settings.store)
    found = searcher.search(pictures["object3/view1.jpg"], depth=1)[0]
    assert (found.key, found.score) == ("object3/view1.jpg", pytest.approx(1, abs=1e-5))
    assert searcher.partitions[0].indexes["places"].faiss.d == 4 * CHANNELS  # type: ignore[attr-defined]
    words_file(path, 2)
    again = index(settings)
    assert again.version == 2
    features = [{file.key for file in manifest.files if "/features" in file.key} for manifest in (first, again)]
    assert not features[0] & features[1]


def test_a_missing_file_is_named_by_its_place_in_the_yaml(config: ConfigOf, tmp_path: Path) -> None:
    pooling = {"name": "netvlad", "weights": str(tmp_path / "absent.safetensors")}
    with pytest.raises(ConfigError, match=r"channels.places.extractor.pooling.weights: cannot read .*absent"):
        index(config(channels={"places": channel(pooling)}, search={"depth": 5}))


def test_a_mask_weighs_places_of_images_and_queries(config: ConfigOf, pictures: dict[str, bytes]) -> None:
    network = {"model": "lraspp_mobilenet_v3_large", "weights": "none", "num_classes": 3, "size": 96}
    plain = channel({"name": "spoc"})
    masked = {**plain, "mask": {"name": "segmentation", **network, "drop": [1]}}
    settings = config(channels={"plain": plain, "masked": masked}, search={"depth": 5, "fuse": {"name": "rrf"}})
    index(settings)
    answer = cbir.open(settings.store).answer([pictures["object3/view1.jpg"]], depth=1)
    assert answer.results(0)[0].key == "object3/view1.jpg"
    assert answer.by_channel["masked"].scores[0, 0] == pytest.approx(1, abs=1e-5)
    one, other = (answer.query_features[name].descriptors for name in ("plain", "masked"))
    assert not np.array_equal(one, other)
