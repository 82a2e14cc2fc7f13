"""Proof that a version is whole, and what is forgotten when it is not."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cbir.config import parse_config
from cbir.errors import ArtifactError
from cbir.search import searcher_of
from cbir.storage import Store, open_store
from cbir.verification import check_counts, check_files, forget_damaged
from cbir.versions import Manifest, Versions
from pipelines.indexing import index
from pipelines.run import Run


@pytest.fixture(scope="module")
def built(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one version of three partitions, which no test changes."""
    root = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_num_partitions", lambda *_: 3)
        index(parse_config(settings(store=str(root)), "the test"))
    return root


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Store:
    """A copy of it."""
    shutil.copytree(built, tmp_path / "copy")
    return open_store(str(tmp_path / "copy"))


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return Versions(store).load()


def test_a_whole_version_passes_and_every_file_is_told(store: Store, manifest: Manifest) -> None:
    seen: list[str] = []
    check_files(store, manifest, lambda file: seen.append(file.key))
    check_counts(searcher_of(store, manifest), manifest)
    assert seen == [file.key for file in manifest.files]
    assert forget_damaged(store, manifest) == []


def test_all_damaged_files_are_listed_with_what_is_wrong(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    missing, cut, flipped = manifest.files[:3]
    (tmp_path / "copy" / missing.key).unlink()
    store.write(cut.key, store.read(cut.key)[:-1])
    data = store.read(flipped.key)
    store.write(flipped.key, bytes([data[0] ^ 128]) + data[1:])
    with pytest.raises(ArtifactError) as caught:
        check_files(store, manifest)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"version 1 of {store.uri} is damaged; run `cbir verify --repair` and `cbir index`")
    assert lines[1:] == [
        f"  {missing.key} is missing",
        f"  {cut.key} has {cut.num_bytes - 1} bytes, its record says {cut.num_bytes}",
        lines[3],
    ]
    assert lines[3].startswith(f"  {flipped.key} has other bytes than its record says (sha256 ")


def test_counts_that_do_not_add_up_are_an_error(store: Store, manifest: Manifest) -> None:
    searcher = searcher_of(store, manifest)
    lost = replace(manifest, counts={**manifest.counts, "quarantined": 1})
    with pytest.raises(ArtifactError, match=r"42 images are not 40 indexed \+ 1 quarantined"):
        check_counts(searcher, lost)
    fewer = replace(manifest, counts={**manifest.counts, "images": 41, "indexed": 39})
    with pytest.raises(ArtifactError, match="do not hold 39 images in all"):
        check_counts(searcher, fewer)


def test_partitions_must_hold_what_their_records_say(store: Store, manifest: Manifest) -> None:
    searcher = searcher_of(store, manifest)
    first, *others = manifest.layout["partitions"]
    layout = {**manifest.layout, "partitions": [{**first, "num_images": first["num_images"] + 1}, *others]}
    with pytest.raises(ArtifactError, match=f"holds {first['num_images']} images, its record says"):
        check_counts(searcher, replace(manifest, layout=layout))
    narrow = {**manifest.layout, "partitions": [{**first, "high": first["high"] // 1000}, *others]}
    with pytest.raises(ArtifactError, match=f"with ids from 0 to below {first['high'] // 1000}"):
        check_counts(searcher, replace(manifest, layout=narrow))


def test_only_the_work_of_damaged_files_is_forgotten(store: Store, manifest: Manifest, tmp_path: Path) -> None:
    damaged = next(file for file in manifest.files if file.role == "index" and file.key.startswith("stages/merge/"))
    (tmp_path / "copy" / damaged.key).write_bytes(b"something else")
    folder = damaged.key.rpartition("/")[0] + "/"
    before = {info.key for info in store.list("stages/")}
    assert forget_damaged(store, manifest) == [folder]
    assert before - {info.key for info in store.list("stages/")} == {f"{folder}DONE.json"}


def test_damaged_weights_are_made_again_from_their_source(
    settings: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    extractor = {
        "name": "deep", "backbone": "test_resnet", "weights": str(tmp_path / "weights.safetensors"), "size": 64,
    }  # fmt: skip
    config = parse_config(
        settings(
            store=str(tmp_path / "store"),
            images=str(folder / "images" / "object0"),
            channels={"whole": {"extractor": extractor, "index": {"name": "flat"}}},
            search={},
        ),
        "the test",
    )
    manifest = index(config)
    store = open_store(config.store)
    asset = next(file for file in manifest.files if file.role == "asset")
    good = store.read(asset.key)
    store.write(asset.key, good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{asset.key} has other bytes"):
        check_files(store, manifest)
    assert forget_damaged(store, manifest) == [asset.key]
    assert index(config).version == 1
    assert store.read(asset.key) == good
    check_files(store, manifest)
