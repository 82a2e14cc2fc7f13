"""Patches through a network for whole images: a patch on whole pixels is a crop."""

import numpy as np
import pytest
from pydantic import ValidationError

import cbir
from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.descriptors.backbone import BackboneDescriptor
from cbir.types import ImageBatch
from pipelines.indexing import index
from tests.features.scenes import scene

TINY = {"backbone": "test_resnet", "weights": "none"}


@pytest.mark.parametrize("layers", [(), (-2,)])
def test_rows_are_descriptors_of_the_patches(layers):
    image, corners = scene(), [(40, 30), (100, 90), (200, 150)]
    # With a reach of 4, a keypoint of size 16 has a patch of 64 x 64 pixels.
    table = np.array([[left + 31.5, top + 31.5, 16.0, 0.0, 1.0] for left, top in corners], np.float32)
    rows, positions = BackboneDescriptor(**TINY, layers=layers, reach=4).build("cpu", {}).describe(image, table)
    crops = [np.ascontiguousarray(image[top : top + 64, left : left + 64]) for left, top in corners]
    whole = Deep(**TINY, size=64, layers=layers, pooling={"name": "spoc"}).build("cpu", {})
    expected = whole.extract(ImageBatch(np.arange(3), crops, np.full((3, 2), 64, np.int32))).descriptors
    assert positions.tolist() == [0, 1, 2]
    assert np.allclose(rows, expected, atol=1e-5)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


def test_errors_name_the_descriptor():
    with pytest.raises(ConfigError, match=r"^extractor.descriptor.weights: there is no file absent.pth"):
        BackboneDescriptor(backbone="test_resnet", weights="absent.pth").build("cpu", {})
    with pytest.raises(ConfigError, match=r"^extractor.descriptor.side: mixer_s32_224 fails for patches of 64 x 64"):
        BackboneDescriptor(backbone="mixer_s32_224", weights="none").build("cpu", {})
    with pytest.raises(ValidationError, match="layers"):
        BackboneDescriptor(**TINY, layers=(-2, -1))


def test_detected_patches_are_indexed(config, pictures):
    extractor = {"name": "local", "detector": {"name": "fast"}, "descriptor": {"name": "backbone", **TINY}}
    channel = {
        "extractor": {**extractor, "max_features": 30},
        "encoders": [{"name": "vlad", "words": 4}],
        "index": {"name": "flat"},
    }
    settings = config(channels={"local": channel}, search={"depth": 5})
    index(settings)
    results = cbir.open(settings.store).search(pictures["object3/view1.jpg"], depth=5)
    assert results[0].key == "object3/view1.jpg"
