"""A dense index built on a Ray cluster that loses trainers, an encoder, a merger, and in between a whole node."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cbir.config import parse_config
from cbir.storage import open_store
from pipelines.indexing import index
from tests.service.runs import assert_current_is_whole, stages_of

pytestmark = pytest.mark.service

STAGES = ("codebook", "train", "build", "merge")
DENSE = {
    "extractor": {"name": "sift", "max_features": 60},
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 8}, {"name": "pca", "dim": 8}],
    "index": {"name": "ivfpq", "lists": 2, "bits": 4, "bytes": 4, "probes": 2},
}


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Cluster, Any]]:
    """Of one processor each; the first holds the cluster together. Workers get the environment of this moment."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        yield cluster, cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    finally:
        cluster.shutdown()


def test_workers_and_a_node_are_lost_and_the_bytes_are_the_same(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dense(store: str, **changes: Any) -> dict[str, Any]:
        return settings(store=str(tmp_path / store), channels={"global": DENSE}, search={}, **changes)

    def lose(cluster: Cluster, node: Any) -> None:
        while not (tmp_path / "build").exists():
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    index(parse_config(dense("undisturbed"), "the reference"))
    points = [f"{stage}.done.before={tmp_path / stage}" for stage in STAGES]
    monkeypatch.setenv("CBIR_FAILPOINT", ",".join(points))
    with two_nodes() as (cluster, node):
        loser = threading.Thread(target=lose, args=(cluster, node), daemon=True)
        loser.start()
        index(parse_config(dense("store", workers=2, ray=cluster.address), "on Ray"))
        loser.join()
    assert all((tmp_path / stage).exists() for stage in STAGES), "a worker died in each of these stages"
    store = open_store(str(tmp_path / "store"))
    assert stages_of(store) == stages_of(open_store(str(tmp_path / "undisturbed")))
    assert_current_is_whole(store)
