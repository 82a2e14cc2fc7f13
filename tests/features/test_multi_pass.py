"""Multi-pass extraction against single passes over crops made by hand."""

import numpy as np
import pytest

import cbir
from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.multi_pass import MultiPass, Patches
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels
from pipelines.indexing import index
from tests.features.scenes import scene

NETWORK = {"backbone": "test_resnet", "weights": "none", "size": 64}
WHOLE = {"name": "grid", "levels": (1,)}


def batch_of(*pictures: Pixels, factor: int = 1) -> ImageBatch:
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32)
    return ImageBatch(np.arange(len(pictures)), pictures, factor * sizes)


def single(*pictures: Pixels, **fields: object) -> Floats:
    return Deep(**{**NETWORK, **fields}).build("cpu", {}).extract(batch_of(*pictures)).descriptors


def patches(*pictures: Pixels, factor: int = 1, **fields: object) -> FeatureBatch:
    return Patches(**{"network": NETWORK, **fields}).build("cpu", {}).extract(batch_of(*pictures, factor=factor))


def pooled(*pictures: Pixels, **fields: object) -> Floats:
    return MultiPass(**{"network": NETWORK, **fields}).build("cpu", {}).extract(batch_of(*pictures)).descriptors


@pytest.mark.parametrize("fit", ["stretch", "longest"])
def test_one_patch_of_the_whole_image_is_a_single_pass(fit):
    pictures = scene(96, 128), scene(128, 96)
    network = {**NETWORK, "fit": fit, "scales": (0.7071, 1.0)}
    expected = single(*pictures, fit=fit, scales=(0.7071, 1.0))
    for pool in ("max", "mean"):
        assert np.array_equal(pooled(*pictures, network=network, patches=WHOLE, pool=pool), expected)
    assert np.array_equal(patches(*pictures, network=network, patches=WHOLE).descriptors, expected)


def test_patches_of_a_pyramid_are_crops():
    picture = scene(96, 120)
    crops = [picture]
    for level in (2, 3):
        heights, widths = 96 // level, 120 // level
        crops += [
            picture[row * heights : (row + 1) * heights, column * widths : (column + 1) * widths]
            for row in range(level)
            for column in range(level)
        ]
    found = patches(picture)
    assert np.array_equal(found.descriptors, single(*crops))
    assert found.geometry[0].tolist() == [59.5, 47.5, pytest.approx((96 * 120) ** 0.5), 0]
    assert found.geometry[4].tolist() == [89.5, 71.5, pytest.approx((48 * 60) ** 0.5), 0]


def test_boxes_are_in_pixels_of_the_original():
    """A picture decoded at a third of its size has the same patches, at other places."""
    small, large = patches(scene(96, 120)), patches(scene(96, 120), factor=3)
    assert np.array_equal(small.descriptors, large.descriptors)
    assert np.allclose(large.geometry[:, :2], 3 * (small.geometry[:, :2] + 0.5) - 0.5)


def test_rows_are_pooled_to_a_unit_vector():
    picture = scene(96, 120)
    rows = patches(picture).descriptors.astype(np.float64)
    for pool, expected in (("max", rows.max(axis=0)), ("mean", rows.mean(axis=0))):
        assert np.allclose(pooled(picture, pool=pool)[0], expected / np.linalg.norm(expected), atol=1e-6)


def test_plain_patches_are_no_local_features():
    picture = scene(96, 96)
    picture[:48, :48] = 200
    found = patches(picture, patches={"name": "grid", "levels": (2,)})
    assert np.array_equal(found.geometry[:, :2], [[71.5, 23.5], [23.5, 71.5], [71.5, 71.5]])


def test_files_of_the_network_are_assets_by_their_place():
    network = {**NETWORK, "weights": "s3://models/a.pth"}
    spec, moved = Patches(network=network), Patches(network={**network, "weights": "b.pth"})
    assert spec.assets == {"network.weights": "s3://models/a.pth"}
    assert spec.identity() == moved.identity()
    with pytest.raises(ConfigError, match=r"^extractor.network.weights: there is no file b.pth"):
        moved.build("cpu", {})


@pytest.mark.parametrize(
    ("extractor", "encoders"),
    [
        ({"name": "multi_pass", "network": NETWORK, "size": 128}, []),
        ({"name": "patches", "network": NETWORK, "size": 128}, [{"name": "vlad", "words": 4}]),
    ],
)
def test_patches_go_through_the_pipeline(config, pictures, extractor, encoders):
    channel = {"extractor": extractor, "encoders": encoders, "index": {"name": "flat"}}
    settings = config(channels={"mop": channel}, search={"depth": 5})
    index(settings)
    results = cbir.open(settings.store).search(pictures["object3/view1.jpg"], depth=5)
    assert results[0].key == "object3/view1.jpg"
