"""Ten of a hundred bytes flipped at random, in every file of a store: found, named, never served."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cbir.artifacts import Done, read_part
from cbir.config import parse_config
from cbir.errors import ArtifactError, CbirError
from cbir.search import searcher_of
from cbir.storage import Store, open_store
from cbir.verification import check_files
from cbir.versions import Versions
from pipelines.indexing import index
from tests.two_channels import CHANNELS

SEEDS = range(3)


@pytest.fixture(scope="module")
def store(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With one version, whose files are all small."""
    root = str(tmp_path_factory.mktemp("flips") / "store")
    index(parse_config(settings(store=root, channels=CHANNELS, search={"fuse": {"name": "late"}}), "the test"))
    return open_store(root)


def damaged(store: Store, key: str) -> Iterator[None]:
    """The file with flipped bytes, as often as there are seeds; whole again at the end."""
    path = store.local_path(key)
    assert path is not None
    good = np.fromfile(path, np.uint8)
    try:
        for seed in SEEDS:
            rng, bad = np.random.default_rng(seed), good.copy()
            chosen = rng.random(len(good)) < 0.1
            chosen[rng.integers(len(good))] = True
            bad[chosen] ^= rng.integers(1, 256, int(chosen.sum()), dtype=np.uint8)
            path.write_bytes(bad.tobytes())
            yield
    finally:
        path.write_bytes(good.tobytes())


def test_every_file_of_a_version_is_found_by_verify_and_none_is_opened(store: Store) -> None:
    manifest = Versions(store).load()
    trained = manifest.layout["channels"]["whole"]["index"]
    kinds = {file.key.rpartition(".")[2] for file in manifest.files}
    assert {"faiss", "arrow", "safetensors", "parquet"} <= kinds
    for file in manifest.files:
        for _ in damaged(store, file.key):
            with pytest.raises(ArtifactError, match=f"(?s)damaged.*{file.key} has other bytes than its record says"):
                check_files(store, manifest)
            if file.role not in ("plan", "quarantine") and file.key != trained:  # no searcher reads these
                with pytest.raises(CbirError, match=file.key):
                    searcher_of(store, manifest)
    check_files(store, manifest)
    searcher_of(store, manifest)


def test_every_file_between_stages_is_found_where_it_is_read(store: Store) -> None:
    records = [info.key for info in store.list("stages/") if info.key.endswith("DONE.json")]
    parts = {file.key: file for key in records for file in Done.from_json(store.read(key), key).files}
    roles = {file.role for file in parts.values()}
    assert {"features", "entries", "probe_hits", "statistics", "totals", "signatures", "sample", "quality"} <= roles
    for file in parts.values():
        for _ in damaged(store, file.key):
            with pytest.raises(CbirError, match=file.key):
                read_part(store, file)


def test_records_manifests_and_current_are_found_where_they_are_read(store: Store) -> None:
    versions = Versions(store)
    for info in [info for info in store.list("stages/") if info.key.endswith("DONE.json")]:
        for _ in damaged(store, info.key):
            with pytest.raises(ArtifactError, match=f"{info.key} is damaged .*delete it and run `cbir index` again"):
                Done.from_json(store.read(info.key), info.key)
    for key in ("CURRENT", versions.key(1)):
        for _ in damaged(store, key):
            with pytest.raises(CbirError, match=key):
                versions.load()
    assert versions.load().version == 1
