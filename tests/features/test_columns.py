"""Columns: one row for every place, and the places where they should be."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import cbir
from cbir.errors import ConfigError
from cbir.features.columns import Columns
from cbir.features.networks.backbone import Backbone
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels
from pipelines.indexing import index
from tests.features.scenes import scene

TINY = {"backbone": "test_resnet", "weights": "none", "size": 96}


def columns(picture: Pixels, original: tuple[int, int] | None = None, **fields: object) -> FeatureBatch:
    sizes = np.array([original or picture.shape[:2]], np.int32)
    return Columns(**{**TINY, **fields}).build("cpu", {}).extract(ImageBatch(np.arange(1), [picture], sizes))


def places(picture: Pixels, *layers: int | str, **fields: Any) -> torch.Tensor:
    """The map of the layers (C, H, W), of the first if there are several."""
    with torch.inference_mode():
        return Backbone(Columns(**{**TINY, **fields}), None, *layers)(torch.from_numpy(picture[None].copy()))[0]


def in_raster_order(features: FeatureBatch) -> tuple[Floats, Floats]:
    order = np.lexsort((features.geometry[:, 0], features.geometry[:, 1]))
    return features.descriptors[order], features.geometry[order]


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("test_resnet", ()), ("test_resnet", (-2,)), ("test_resnet", ("layer2",)), ("torchvision/alexnet", ())],
)
def test_every_place_of_the_map_is_a_row(backbone, layers):
    picture = scene(160, 224)
    found, geometry = in_raster_order(columns(picture, backbone=backbone, layers=layers, size=224))
    maps = places(picture, *layers, backbone=backbone)
    _, height, width = maps.shape
    assert len(found) == height * width > 6
    assert np.array_equal(found, maps.flatten(1).T.numpy())
    x, y = geometry[:, 0].reshape(height, width), geometry[:, 1].reshape(height, width)
    assert (np.diff(x, axis=1) > 0).all()
    assert (np.diff(y, axis=0) > 0).all()
    assert (np.ptp(x, axis=0) == 0).all()
    assert (np.ptp(y, axis=1) == 0).all()


def test_the_centres_of_alexnet_are_a_stride_of_its_layers_apart():
    """Its maps have 6 columns for 224 pixels: a quotient of 37 would put the last column out of place."""
    _, geometry = in_raster_order(columns(scene(224, 224), backbone="torchvision/alexnet", size=224))
    assert np.diff(geometry[:6, 0]) == pytest.approx(32)


def test_rows_come_by_falling_norm_and_the_limit_keeps_the_first():
    every, few = columns(scene(96, 96), layers=[-2]), columns(scene(96, 96), layers=[-2], max_features=7)
    norms = np.linalg.norm(every.descriptors.astype(np.float64), axis=1)
    assert (np.diff(norms) <= 1e-4).all()
    assert np.array_equal(few.descriptors, every.descriptors[:7])


def test_a_hypercolumn_is_every_layer_on_the_grid_of_the_first():
    picture = scene(96, 96)
    fine, coarse = places(picture, -3), places(picture, -1)
    grid = fine.shape[1:]
    found, geometry = in_raster_order(columns(picture, layers=[-3, -1]))
    resized = interpolate(coarse[None], grid, mode="bilinear")[0]
    units = [maps.double() / maps.double().norm(dim=0) for maps in (fine, resized)]
    expected = torch.cat(units) / 2**0.5 * fine.double().norm(dim=0)
    assert len(found) == grid[0] * grid[1]
    assert np.allclose(found, expected.flatten(1).T.numpy(), atol=1e-4)
    assert np.array_equal(geometry, in_raster_order(columns(picture, layers=[-3]))[1])


def test_a_scene_without_columns_has_no_rows():
    assert len(columns(np.full((96, 96, 3), 9, np.uint8)).descriptors) == 0


def test_layers_that_are_no_maps_are_refused():
    with pytest.raises(ConfigError, match=r"extractor.layers: layers fc6 of backbone 'torchvision/alexnet' fails"):
        columns(scene(96, 96), backbone="torchvision/alexnet", layers=["fc6"])
    with pytest.raises(ConfigError, match=r"extractor.layers: layers 9 of backbone .* index 9 is out of range"):
        columns(scene(96, 96), layers=[9])


@pytest.mark.parametrize(
    "encoders",
    [
        [{"name": "vlad", "words": 4}],
        [{"name": "fisher", "gaussians": 2}],
        [{"name": "bow", "words": 16}],
    ],
)
def test_columns_are_aggregated_through_the_pipeline(config, pictures, encoders):
    channel = {
        "extractor": {"name": "columns", **TINY, "layers": [-2]},
        "encoders": [{"name": "pca", "dim": 16}, *encoders],
        "index": {"name": "flat"},
    }
    settings = config(channels={"conv": channel}, search={"depth": 5})
    index(settings)
    results = cbir.open(settings.store).search(pictures["object3/view1.jpg"], depth=5)
    assert results[0].key == "object3/view1.jpg"


@pytest.mark.parametrize("layers", [[-3], [-3, -2]])
def test_columns_of_a_real_network_find_a_crop_in_its_photograph(test_data, layers):
    """Of a crop, moved by whole strides, most columns are most like that of the same place of the photograph."""
    with Image.open(sorted((test_data / "photos" / "sfm_scenes" / "images").iterdir())[0]) as file:
        picture = np.asarray(file.convert("RGB").resize((384, 320)))
    real = {
        "backbone": "mobilenetv2_100",
        "backbone_args": {"pad_type": "same"},
        "weights": str(test_data / "weights" / "mobilenetv2_100_imagenet.safetensors"),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "size": 384,
        "layers": layers,
    }
    whole, crop = columns(picture, **real), columns(np.ascontiguousarray(picture[64:256, 96:320]), **real)
    assert len(whole.descriptors) == len(whole.geometry) > len(crop.geometry) > 100
    units = [rows.descriptors / np.linalg.norm(rows.descriptors, axis=1, keepdims=True) for rows in (crop, whole)]
    nearest = (units[0] @ units[1].T).argmax(axis=1)
    moved = whole.geometry[nearest, :2] - crop.geometry[:, :2]
    assert (np.abs(moved - (96, 64)).max(axis=1) < 1).mean() > 0.5
