"""Proposed boxes against torchvision's own network, and against suppression and order by brute force."""

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from cbir.errors import ConfigError
from cbir.features.regions.rpn import Rpn
from cbir.types import Floats, Pixels
from tests.features.lively import lively
from tests.features.regions.objects import overlap, proposed

MODEL = "fasterrcnn_mobilenet_v3_large_320_fpn"
TINY = {"model": MODEL, "weights": "none", "num_classes": 2}
IMAGE: Pixels = np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)


@functools.cache
def network() -> torch.nn.Module:
    """A Faster R-CNN of which every proposal has another score."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = torchvision.models.get_model(MODEL, weights=None, weights_backbone=None, num_classes=2)
        return lively(made, list(torch.rand(4, 3, 90, 120)))


@functools.cache
def raw() -> tuple[Floats, Floats]:
    """The best 1000 boxes of each size of anchors, before suppression, with their objectness."""
    model = copy.deepcopy(network())
    model.rpn.nms_thresh, model.rpn.score_thresh = 1.0, 0.0
    model.rpn._pre_nms_top_n, model.rpn._post_nms_top_n = {"testing": 1000}, {"testing": 10**4}
    pixels = torch.tensor(IMAGE).permute(2, 0, 1) / 255
    with torch.inference_mode():
        seen, _ = model.transform([pixels])
        maps = list(model.backbone(seen.tensors).values())
        objectness, deltas = model.rpn.head(maps)
        numbers = [found[0].numel() for found in objectness]
        flat = torchvision.models.detection.rpn.concat_box_prediction_layers(objectness, deltas)
        boxes = model.rpn.box_coder.decode(flat[1], model.rpn.anchor_generator(seen, maps)).view(1, -1, 4)
        found, scores = model.rpn.filter_proposals(boxes, flat[0].view(1, -1), seen.image_sizes, numbers)
    height, width = seen.image_sizes[0]
    return found[0].numpy() * (120 / width, 90 / height, 120 / width, 90 / height), scores[0].numpy()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rpn") / "weights.safetensors"
    save_file(network().state_dict(), path)
    return path


def boxes(weights: Path | None = None, **fields: object) -> Floats:
    """In pixels of the image, which was decoded at half its size."""
    spec = Rpn(**{**TINY, "weights": str(weights) if weights else "none", **fields})
    return proposed(spec, IMAGE, enlarged=2) / 2


def test_without_suppression_the_most_object_like_boxes_come_first(weights):
    expected, scores = raw()
    assert (np.diff(scores) <= 0).all()
    found = boxes(weights, iou=1, max_boxes=40)
    assert found[0].tolist() == [0, 0, 120, 90]
    np.testing.assert_allclose(found[1:], expected[:40], atol=0.01)


def test_boxes_that_overlap_a_better_one_are_suppressed(weights):
    """Among anchors of one size, as torchvision does it; this network finds the best of them in one size."""
    every, _ = raw()
    found = boxes(weights, iou=0.3, max_boxes=50, whole=False)
    assert 5 < len(found) <= 50
    ranks = [int(np.abs(every - box).max(axis=1).argmin()) for box in found]
    assert ranks == sorted(ranks)
    assert np.abs(every[ranks] - found).max() < 0.01
    dropped = np.setdiff1d(np.arange(ranks[-1]), ranks)
    assert all(overlap(found, every[rank]).max() > 0.3 - 1e-4 for rank in dropped)


def test_scores_and_numbers_are_limits(weights):
    _, scores = raw()
    assert len(boxes(weights, max_boxes=7)) == 8
    assert len(boxes(weights, score=0.999999)) == 1
    above = boxes(weights, iou=1, score=float(scores[19:21].mean()), whole=False)
    assert len(above) == 20


def test_weights_come_from_a_file(weights, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(network().state_dict(), path)
    assert np.array_equal(boxes(path), boxes(weights))
    assert not np.array_equal(boxes(weights)[:3], boxes()[:3])
    assert Rpn(**{**TINY, "weights": "s3://bucket/net.pth"}).assets == {"weights": "s3://bucket/net.pth"}


def test_what_cannot_propose_is_refused(weights, tmp_path):
    with pytest.raises(
        ConfigError, match=r"proposer.model: ssd300_vgg16 has no region proposal network; choose a Fast"
    ):
        boxes(model="ssd300_vgg16")
    with pytest.raises(ConfigError, match=r"proposer.model: .*'fastercnn_resnet50_fpn'; did you mean 'fasterrcnn_"):
        boxes(model="fastercnn_resnet50_fpn")
    with pytest.raises(ConfigError, match=r"proposer.weights: there is no file .*absent.pth"):
        boxes(tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match=r"proposer.weights: .* with 5 classes: .*another shape"):
        boxes(weights, num_classes=5)
