"""Indexes of vectors through the whole pipeline: one channel each, in several partitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import cbir
from cbir.config import Config, parse_config
from cbir.storage import open_store
from cbir.versions import Manifest, Versions
from pipelines.export import export
from pipelines.indexing import index
from pipelines.run import Run

INDEXES = {
    "pq": {"name": "pq", "bytes": 8, "bits": 4},
    "sdc": {"name": "pq", "bytes": 8, "bits": 4, "distance": "sdc"},
    "hnsw": {"name": "hnsw", "neighbours": 8},
    "lsh": {"name": "lsh", "bits": 256},
    "tables": {"name": "lsh", "bits": 256, "tables": 32, "flips": 2},
    "itq": {"name": "itq", "bits": 16},
    "spectral": {"name": "spectral_hash", "bits": 64},
    "memory": {"name": "memory_vectors", "group": 4, "form": "sum"},
    "halves": {"name": "ivfflat", "lists": 4, "code": "float16"},
    "refined": {"name": "ivfpq", "lists": 2, "bytes": 4, "bits": 4, "refine": "sq8"},
    "fast": {"name": "ivfpq", "lists": 2, "bytes": 8, "bits": 4, "fast_scan": True, "refine": "float16"},
    "pairs": {"name": "ivfpq", "lists": 4, "coarse": "imi", "bytes": 8, "bits": 4, "metric": "l2"},
    "graph": {"name": "ivfpq", "lists": 4, "coarse": "hnsw", "bytes": 8, "bits": 4},
    "additive": {"name": "ivfaq", "lists": 2, "bytes": 8, "bits": 4},
    "rabitq": {"name": "ivfrabitq", "lists": 2},
    "local": {"name": "lopq", "lists": 2, "bytes": 8, "bits": 4},
}
ENCODERS = [{"name": "rootsift"}, {"name": "vlad", "words": 4}, {"name": "pca", "dim": 16}]


@pytest.fixture(scope="module")
def built(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Manifest]:
    """40 pictures in three partitions."""
    channels = {
        name: {"extractor": {"name": "sift", "max_features": 60}, "encoders": ENCODERS, "index": spec}
        for name, spec in INDEXES.items()
    }
    store = str(tmp_path_factory.mktemp("vectors") / "store")
    config = parse_config(
        settings(store=store, channels=channels, search={"fuse": {"name": "late"}}, evaluate={"probes": 10}), "the test"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: 3)
        return config, index(config)


def test_a_picture_finds_itself_in_every_channel(built: tuple[Config, Manifest], pictures: dict[str, bytes]) -> None:
    searcher = cbir.open(built[0].store)
    asked = [f"object{number}/view1.jpg" for number in range(8)]
    encoded = searcher.encoder.encode(searcher.encoder.extract([pictures[key] for key in asked], [None] * 8))
    hits, keys = searcher.channel_hits(encoded, 5), searcher.keys()
    assert hits.keys() == INDEXES.keys()
    for name, found in hits.items():
        own = [key in {keys[image] for image in row} for key, row in zip(asked, found.image_ids.tolist(), strict=True)]
        assert np.mean(own) > 0.8, name
    assert searcher.search(pictures["object3/view1.jpg"], depth=4)[0].key == "object3/view1.jpg"


def test_the_quality_of_every_search_is_measured(built: tuple[Config, Manifest]) -> None:
    recall = built[1].quality["ann_recall"]
    assert recall["hnsw"]["10"] == recall["memory"]["10"] == 1.0, "so few vectors are compared one by one"
    assert 0.2 < recall["itq"]["10"] < 1.0
    assert recall["halves"]["10"] == 1.0
    assert min(recall["refined"]["10"], recall["fast"]["10"]) > 0.95
    assert 0.3 < recall["additive"]["10"] < 1.0


@pytest.mark.parametrize("channel", [name for name in INDEXES if name not in ("sdc", "lsh", "tables", "local")])
def test_an_exported_index_holds_all_partitions(built: tuple[Config, Manifest], channel: str, tmp_path: Path) -> None:
    store = open_store(built[0].store)
    path, _ = export(store, Versions(store).load(), tmp_path, channel, "faiss")
    whole = faiss.read_index(str(path))
    assert whole.ntotal == 40
    assert (whole.search(np.ones((1, 16), np.float32), 5)[1] >= 0).all()
