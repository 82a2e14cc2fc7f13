"""HOW: its local features sum up to its global descriptor."""

import numpy as np
import pytest
import torch

from cbir.features.deep import Deep
from cbir.features.how import How
from cbir.features.networks.backbone import Backbone
from cbir.features.pooling.attention import WeightedSpoc
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels
from tests.features.scenes import scene

TINY = {"backbone": "test_resnet", "weights": "none", "size": 96, "scales": (1.0,), "stage": -1}
EVERY = 10**6


def images(*pictures: Pixels) -> ImageBatch:
    return ImageBatch(np.arange(len(pictures)), pictures, np.array([p.shape[:2] for p in pictures], np.int32))


def how(picture: Pixels, **fields: object) -> FeatureBatch:
    return How(**{**TINY, "max_features": EVERY, **fields}).build("cpu", {}).extract(images(picture))


def maps(picture: Pixels, **fields: object) -> torch.Tensor:
    spec = How(**{**TINY, **fields})
    with torch.inference_mode():
        return Backbone(spec, None, spec.stage)(torch.from_numpy(picture[None].copy()))


def unit(vector: Floats) -> Floats:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_the_global_descriptor_is_the_weighted_sum_of_all_local_ones(backbone):
    picture = scene(96, 96)
    local = how(picture, backbone=backbone).descriptors.astype(np.float64)
    weights = np.sort(maps(picture, backbone=backbone)[0].norm(dim=0).flatten().numpy())[::-1]
    spec = Deep(backbone=backbone, weights="none", size=96, pooling={"name": "weighted_spoc"})
    whole = spec.build("cpu", {}).extract(images(picture)).descriptors[0]
    if backbone == "test_resnet":
        pooled = WeightedSpoc().pool(maps(picture))[0].numpy()
        assert np.allclose(whole, unit(pooled), atol=1e-6)
    expected = WeightedSpoc().pool(maps(picture, backbone=backbone))[0].numpy()
    assert np.allclose(unit((weights[:, None] * local).sum(axis=0)), unit(expected), atol=1e-5)


def test_rows_are_averages_of_neighbours_by_falling_norm_of_the_centre():
    picture = scene(96, 96)
    made = maps(picture)[0].numpy()
    rows, columns = made.shape[1:]
    norms = np.linalg.norm(made, axis=0)
    order = np.argsort(-norms.ravel(), kind="stable")
    for found, place in zip(how(picture).descriptors, order, strict=True):
        y, x = divmod(int(place), columns)
        around = made[:, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].reshape(len(made), -1)
        assert np.allclose(found, around.mean(axis=1), atol=1e-5)
    assert len(how(picture).descriptors) == rows * columns


def test_the_limits_are_over_all_scales():
    fields = {"scales": (0.5, 1.0, 1.4142), "stage": -2}
    every, few = how(scene(96, 96), **fields), how(scene(96, 96), **fields, max_features=10)
    assert len(every.descriptors) == 3 * 3 + 6 * 6 + 9 * 9
    assert np.array_equal(few.descriptors, every.descriptors[:10])
    assert np.array_equal(few.geometry, every.geometry[:10])
    assert len(np.unique(every.geometry[:, 2])) == 3


def test_least_attention_is_a_part_of_the_largest():
    norms = maps(scene(96, 96), stage=-2)[0].norm(dim=0).flatten().numpy()
    bound = float(np.median(norms) / norms.max())
    found = how(scene(96, 96), stage=-2, least_attention=bound)
    assert len(found.descriptors) == (norms > bound * norms.max()).sum() < len(norms)
