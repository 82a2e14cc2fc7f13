"""An extractor with a mask and a proposer around it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cbir.errors import DataError
from cbir.features.deep import Deep
from cbir.features.describer import Describer
from cbir.features.regions.grid import Grid
from cbir.features.sift import Sift
from cbir.types import FeatureBatch, ImageBatch
from tests.features.test_conformance import PICTURES, batch


@dataclass(frozen=True)
class LeftHalf:
    def masks(self, images: ImageBatch) -> list[np.ndarray]:
        return [np.array([[1, 0]], np.float32)] * len(images)


@dataclass(frozen=True)
class Nothing:
    def masks(self, images: ImageBatch) -> list[np.ndarray]:
        return [np.zeros((3, 4), np.float32)] * len(images)


SIFT = Sift(max_features=50).build("cpu", {})


def test_alone_it_adds_the_sizes_of_the_originals():
    images = batch(PICTURES)
    features, plain = Describer(SIFT).describe(images), SIFT.extract(images)
    assert features.descriptors.tobytes() == plain.descriptors.tobytes()
    assert np.array_equal(features.sizes, images.sizes)
    assert features.regions is None


def test_the_mask_drops_features_and_the_proposer_adds_regions():
    images = batch(PICTURES)
    plain = SIFT.extract(images)
    features = Describer(SIFT, LeftHalf(), 0.5, Grid().build("cpu", {})).describe(images)
    assert np.array_equal(np.diff(features.regions.offsets), [14] * len(images))
    for i, (_, width) in enumerate(images.sizes):
        every = plain.geometry[plain.rows(i)]
        left = every[every[:, 0] + 0.5 < width / 2]
        assert 0 < len(left) < len(every)
        assert np.array_equal(features.geometry[features.rows(i)], left)


def test_no_images():
    features = Describer(SIFT, LeftHalf(), 0.5, Grid().build("cpu", {})).describe(batch([]))
    assert len(features) == 0
    assert features.regions.boxes.shape == (0, 4)


def test_the_mask_weighs_the_places_of_a_deep_extractor():
    deep, images = Deep(backbone="test_resnet", weights="none", size=96).build("cpu", {}), batch(PICTURES)
    masks = LeftHalf().masks(images)
    found = Describer(deep, LeftHalf(), 0.5).describe(images)
    assert found.descriptors.tobytes() == deep.extract_masked(images, masks).descriptors.tobytes()
    assert found.descriptors.tobytes() != deep.extract(images).descriptors.tobytes()
    assert np.array_equal(found.sizes, images.sizes)


def test_where_the_mask_leaves_nothing_the_whole_image_is_described():
    deep, images = Deep(backbone="test_resnet", weights="none", size=96).build("cpu", {}), batch(PICTURES[:1])
    with pytest.warns(RuntimeWarning, match="the whole image is used"):
        found = Describer(deep, Nothing(), 0.5).describe(images)
    assert found.descriptors.tobytes() == deep.extract(images).descriptors.tobytes()


@dataclass(frozen=True)
class Narrow:
    """SIFT on a device that has room for so many images at a time."""

    room: int
    error: type[Exception]

    def extract(self, images: ImageBatch) -> FeatureBatch:
        if len(images) > self.room:
            raise self.error("no room")
        return SIFT.extract(images)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_what_does_not_fit_into_memory_together_is_described_in_parts(room: int, error: type[Exception]):
    images, grid = batch(PICTURES), Grid().build("cpu", {})
    assert len(images) > 3
    found = Describer(Narrow(room, error), None, 0.0, grid).describe(images)
    whole = Describer(SIFT, None, 0.0, grid).describe(images)
    assert found.to_arrow().equals(whole.to_arrow())
    assert np.array_equal(found.regions.boxes, whole.regions.boxes)


def test_an_image_that_does_not_fit_alone_is_an_error_that_says_what_to_do():
    height, width = PICTURES[0].shape[:2]
    with pytest.raises(DataError, match=rf"{width} x {height} pixels.* even alone: give its extractor a smaller size"):
        Describer(Narrow(0, torch.OutOfMemoryError)).describe(batch(PICTURES))


def test_other_errors_of_an_extractor_are_not_taken_for_a_want_of_memory():
    with pytest.raises(RuntimeError, match="no room"):
        Describer(Narrow(0, RuntimeError)).describe(batch(PICTURES))
