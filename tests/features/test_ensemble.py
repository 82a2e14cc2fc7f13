"""Ensembles: their inner products, their files, and the pipeline."""

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import cbir
from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.ensemble import Ensemble
from cbir.storage import open_store
from cbir.types import Floats, ImageBatch, Pixels
from cbir.versions import Versions
from pipelines.indexing import index
from tests.features.scenes import scene

RESNET = {"backbone": "test_resnet", "weights": "none", "size": 96}
EFFICIENTNET = {"backbone": "test_efficientnet", "weights": "none", "size": 64}
VIT = {"backbone": "test_vit", "weights": "none", "size": 96, "pooling": {"name": "spoc"}}


def rows(spec: Deep | Ensemble, pictures: list[Pixels]) -> Floats:
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32)
    return spec.build("cpu", {}).extract(ImageBatch(np.arange(len(pictures)), pictures, sizes)).descriptors


def test_inner_products_are_the_weighted_cosines_of_the_members():
    pictures, weights = [scene(96, 96, seed) for seed in range(3)], (1.0, 0.5, 2.0)
    members = (RESNET, EFFICIENTNET, VIT)
    found = rows(Ensemble(members=members, member_weights=weights), pictures)
    cosines = np.stack([block @ block.T for block in (rows(Deep(**member), pictures) for member in members)])
    squares = np.square(weights)
    assert np.allclose(found @ found.T, np.tensordot(squares, cosines, 1) / squares.sum(), atol=1e-6)
    assert np.ptp(cosines, axis=0).max() > 0.01


def test_one_member_is_that_member():
    pictures = [scene(96, 96)]
    assert np.array_equal(rows(Ensemble(members=[RESNET]), pictures), rows(Deep(**RESNET), pictures))


def test_pictures_are_decoded_for_the_largest_member():
    spec = Ensemble(members=[EFFICIENTNET, {**RESNET, "scales": (1.0, 1.5), "batch": 4}])
    largest = Deep(**RESNET, scales=(1.0, 1.5))
    assert (spec.view, spec.batch_size) == (largest.view, largest.batch_size)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("test_resnet", "test_efficientnet")):
        torch.manual_seed(seed + 3)
        save_file(timm.create_model(name, num_classes=0).state_dict(), folder / f"{name}.safetensors")
    return folder


def members_of(files) -> list[dict[str, object]]:
    return [
        {**member, "weights": str(files / f"{member['backbone']}.safetensors")} for member in (RESNET, EFFICIENTNET)
    ]


def test_files_of_the_members_are_assets_and_no_part_of_the_identity(files):
    remote = [{**RESNET, "weights": "s3://models/a.pth"}, EFFICIENTNET, {**RESNET, "weights": "s3://models/b.pth"}]
    spec = Ensemble(members=remote)
    assert spec.assets == {"members.0.weights": "s3://models/a.pth", "members.2.weights": "s3://models/b.pth"}
    moved = Ensemble(members=[{**RESNET, "weights": "a.pth"}, EFFICIENTNET, {**RESNET, "weights": "b.pth"}])
    assert spec.identity() == moved.identity()

    local = files / "test_resnet.safetensors"
    batch = ImageBatch(np.arange(1), [scene(96, 96)], np.array([[96, 96]], np.int32))
    found = spec.build("cpu", {"members.0.weights": local, "members.2.weights": local}).extract(batch).descriptors[0]
    expected = rows(Deep(**{**RESNET, "weights": str(local)}), [scene(96, 96)])[0]
    dim = len(expected)
    assert np.allclose(found[:dim], expected / 3**0.5, atol=1e-6)
    assert np.array_equal(found[:dim], found[-dim:])


def test_errors_name_the_member():
    with pytest.raises(ConfigError, match=r"^extractor.members.1.weights: there is no file absent.pth"):
        Ensemble(members=[RESNET, {**RESNET, "weights": "absent.pth"}]).build("cpu", {})
    with pytest.raises(ValidationError, match="all must have the same fit"):
        Ensemble(members=[RESNET, {**RESNET, "fit": "longest"}])
    with pytest.raises(ValidationError, match="1 weights for 2 members"):
        Ensemble(members=[RESNET, RESNET], member_weights=[1])


def test_an_index_carries_the_files_of_all_members(config, pictures, files, tmp_path):
    """Also after the originals are gone; their licences are in the manifest."""
    copies = tmp_path / "weights"
    copies.mkdir()
    for file in files.iterdir():
        (copies / file.name).write_bytes(file.read_bytes())
    members = [{**member, "licence": "MIT"} for member in members_of(copies)]
    settings = config(
        channels={"global": {"extractor": {"name": "ensemble", "members": members}, "index": {"name": "flat"}}},
        search={"depth": 5},
    )
    index(settings)
    for file in copies.iterdir():
        file.unlink()
    results = cbir.open(settings.store).search(pictures["object3/view1.jpg"], depth=5)
    assert results[0].key == "object3/view1.jpg"
    assert results[0].score == pytest.approx(1, abs=1e-5)
    manifest = Versions(open_store(settings.store)).load(None)
    kept = manifest.config["channels"]["global"]["extractor"]["members"]
    assert [member["licence"] for member in kept] == ["MIT", "MIT"]


def test_a_missing_file_is_named_by_its_place(config):
    members = [RESNET, {**RESNET, "weights": "absent/net.pth"}]
    settings = config(
        channels={"global": {"extractor": {"name": "ensemble", "members": members}, "index": {"name": "flat"}}},
        search={},
    )
    with pytest.raises(ConfigError, match=r"channels.global.extractor.members.1.weights: cannot read absent/net.pth"):
        index(settings)
