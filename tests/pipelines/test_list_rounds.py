"""The lists of an inverted file, trained in rounds over all workers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cbir.config import Config
from cbir.layout import Layout
from pipelines.indexing import index

DENSE = {
    "extractor": {"name": "sift", "max_features": 60},
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 4}, {"name": "pca", "dim": 16}],
    "index": {"name": "ivfpq", "bytes": 4, "bits": 4},
}


def test_shards_do_not_show_in_lists_trained_in_rounds(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.run._PART_FEATURES", 1)
    states, tasks = [], []
    for shard_images in (1000, 7):
        store = tmp_path / str(shard_images)
        some = config(store=str(store), input={"shard_images": shard_images}, channels={"dense": DENSE}, search={})
        layout = Layout.from_json(index(some).layout)
        states.append((store / layout.channels["dense"].index).read_bytes())
        tasks.append(len(list((store / "stages" / "codebook").iterdir())))
    assert states[0] == states[1]
    assert tasks[0] < tasks[1], "each shard adds its part of a round"
