"""Detected boxes against plain torchvision; what may not be found, and weights that do not fit."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from cbir.errors import ConfigError
from cbir.features.regions.detector import Detector
from cbir.types import Floats, ImageBatch, Pixels
from tests.features.lively import lively

MODEL = "ssdlite320_mobilenet_v3_large"
TINY = {"model": MODEL, "weights": "none", "num_classes": 2}
IMAGE: Pixels = np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)


@functools.cache
def network() -> torch.nn.Module:
    """A detector of which every box has another score."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = torchvision.models.get_model(MODEL, weights=None, weights_backbone=None, num_classes=2)
        return lively(made, list(torch.rand(4, 3, 90, 120)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "weights.safetensors"
    save_file(network().state_dict(), path)
    return path


def detected(**fields: object) -> Floats:
    """The boxes in an image that was decoded at half its size."""
    batch = ImageBatch(np.zeros(1, np.int64), [IMAGE], np.array([[180, 240]], np.int32))
    return Detector(**{**TINY, **fields}).build("cpu", {}).propose(batch).boxes


def test_the_whole_image_then_the_detections_by_falling_score(weights: Path):
    with torch.inference_mode():
        found = network()([torch.tensor(IMAGE).permute(2, 0, 1) / 255])[0]
    scores = found["scores"].numpy()
    order = np.argsort(-scores, kind="stable")
    least = float(scores[order[8:10]].mean())
    boxes = detected(weights=str(weights), score=least)
    assert boxes[0].tolist() == [0, 0, 240, 180]
    np.testing.assert_allclose(boxes[1:], 2 * found["boxes"].numpy()[order[:9]], rtol=1e-4, atol=1e-2)
    assert np.array_equal(detected(weights=str(weights), score=least, max_boxes=4), boxes[:5])


@pytest.mark.parametrize("fields", [{"score": 1.0}, {"classes": (7,)}])
def test_where_nothing_is_found_the_whole_image_is_the_only_box(fields):
    assert detected(**fields).tolist() == [[0, 0, 240, 180]]


def test_classes_are_kept_by_their_labels():
    assert len(detected(classes=(1,))) > 1
    assert np.array_equal(detected(classes=(1,)), detected())


def test_boxes_below_torchvisions_own_threshold_are_found():
    assert np.array_equal(detected(model_args={"score_thresh": 0.999}), detected())
    faster = {"model": "fasterrcnn_mobilenet_v3_large_320_fpn"}
    assert len(detected(**faster, model_args={"box_score_thresh": 0.999})) > 1


def test_weights_come_from_a_file_of_either_kind(weights: Path, tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save({"model": network().state_dict(), "epoch": 3}, path)
    expected = detected(weights=str(weights))
    assert not np.array_equal(expected, detected())
    assert np.array_equal(detected(weights=str(path)), expected)
    assert np.array_equal(detected(weights=f"file://{path}"), expected)


def test_weights_come_from_the_assets_where_they_are_given(weights: Path):
    spec = Detector(**{**TINY, "weights": "s3://bucket/net.pth"})
    assert spec.assets == {"weights": "s3://bucket/net.pth"}
    batch = ImageBatch(np.zeros(1, np.int64), [IMAGE], np.array([[180, 240]], np.int32))
    found = spec.build("cpu", {"weights": weights}).propose(batch).boxes
    assert np.array_equal(found, detected(weights=str(weights)))


def test_weights_of_another_network_are_refused(weights: Path, tmp_path: Path):
    path = tmp_path / "weights.pth"
    torch.save(network().state_dict(), path)
    with pytest.raises(
        ConfigError, match=r"proposer.weights: .* is not of ssdlite320.* with 3 classes: .*another shape"
    ):
        detected(weights=str(path), num_classes=3)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"proposer.weights: .*missing .*1 unknown \(a\)"):
        detected(weights=str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"proposer.weights: .* is not a .safetensors file or a .pth file"):
        detected(weights=str(path))
    with pytest.raises(ConfigError, match=r"proposer.weights: there is no file .*absent.pth"):
        detected(weights=str(tmp_path / "absent.pth"))


def test_unknown_models_and_arguments_are_named():
    with pytest.raises(
        ConfigError, match=r"proposer.model: .*'fasterrcn_resnet50_fpn'; did you mean 'fasterrcnn_resnet"
    ):
        detected(model="fasterrcn_resnet50_fpn")
    with pytest.raises(ConfigError, match=r"model_args: .* has no argument 'score_tresh'; did you mean 'score_thresh'"):
        detected(model_args={"score_tresh": 3})
    with pytest.raises(ConfigError, match=r"proposer.model_args: ssdlite320.* refuses {'head': 3, 'backbone': 1}"):
        detected(model_args={"head": 3, "backbone": 1})
