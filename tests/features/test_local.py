"""Local features from any detector and descriptor: the choice of keypoints, and the settings in a configuration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbir.config import parse_config
from cbir.errors import ConfigError
from cbir.features.local import Local
from cbir.features.sift import Sift
from cbir.types import FeatureBatch, ImageBatch, Pixels
from tests.features.scenes import quarter_turn, scene


def local(detector: str | dict[str, Any], descriptor: str | dict[str, Any], **fields: Any) -> Local:
    methods = {"detector": detector, "descriptor": descriptor}
    named = {key: {"name": value} if isinstance(value, str) else value for key, value in methods.items()}
    return Local.model_validate({**named, **fields})


def extract(spec: Local | Sift, image: Pixels) -> FeatureBatch:
    size = np.array([image.shape[:2]], np.int32)
    return spec.build("cpu", {}).extract(ImageBatch(np.zeros(1, np.int64), [image], size))


@pytest.mark.parametrize("fields", [{}, {"upright": True}, {"max_features": 30}])
def test_sift_is_the_difference_of_gaussians_described_by_sift(fields):
    one, other = extract(local("dog", "sift", **fields), scene()), extract(Sift(**fields), scene())
    assert np.array_equal(one.descriptors, other.descriptors)
    assert np.array_equal(one.geometry, other.geometry)


@pytest.mark.parametrize("name", ["akaze", "brisk", "orb"])
def test_detecting_and_describing_at_once_is_the_same_as_in_turn(name):
    spec, image = local(name, name, max_features=200), scene(480, 640)
    at_once = spec.build("cpu", {})
    in_turn = spec.build("cpu", {})
    assert at_once._one_pass is not None
    in_turn._one_pass = None
    batch = ImageBatch(np.zeros(1, np.int64), [image], np.array([image.shape[:2]], np.int32))
    one, other = at_once.extract(batch), in_turn.extract(batch)
    assert len(one.descriptors) == 200
    assert np.array_equal(one.geometry, other.geometry)
    assert np.array_equal(one.descriptors, other.descriptors)


@pytest.mark.parametrize(
    ("detector", "descriptor"),
    [("mser", "sift"), ("fast_hessian", "surf"), ("fast_hessian", "sift"), ("orb", "orb"), ("akaze", "akaze")],
)
def test_features_turn_with_the_picture(detector, descriptor):
    image, spec = scene(), local(detector, descriptor)
    plain, turned = extract(spec, image), extract(spec, quarter_turn(image))
    matches = 0
    for row, (x, y, size, *_) in zip(plain.descriptors, plain.geometry, strict=True):
        place = np.abs(turned.geometry[:, :3] - [image.shape[0] - 1 - y, x, size])
        if not (place < [1.5, 1.5, 0.1 * size]).all(axis=1).any():
            continue
        nearest = distances(row, turned.descriptors).argmin()
        matches += bool((place[nearest] < [1.5, 1.5, 0.1 * size]).all())
    assert matches > 0.7 * len(plain.geometry) > 10


def distances(row: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if row.dtype == np.uint8 and len(row) != 128:
        return np.bitwise_count(row ^ rows).sum(axis=1, dtype=np.int64)
    return np.linalg.norm(row.astype(float) - rows, axis=1)


@pytest.mark.parametrize(("detector", "descriptor"), [("fast", "sift"), ("mser", "sift"), ("dog", "brief")])
def test_fewer_are_the_first_of_more(detector, descriptor):
    few, many = (extract(local(detector, descriptor, max_features=limit), scene()) for limit in (20, 60))
    assert (len(few.descriptors), len(many.descriptors) >= 40) == (20, True)
    assert np.array_equal(few.geometry, many.geometry[:20])
    assert np.array_equal(few.descriptors, many.descriptors[:20])


def test_keypoints_that_cannot_be_described_are_replaced_by_the_next():
    image = scene()
    image[30:-30, 30:-30] = 128  # the strongest keypoints lie near the border, where BRIEF has no window
    image[100:140, 100:220] = scene()[100:140, 100:220] // 2
    features = extract(local({"name": "fast", "threshold": 5}, "brief", max_features=25), image)
    assert len(features.descriptors) == 25
    assert (features.geometry[:, :2].min(axis=0) >= 28).all()


def test_upright_features_have_one_place_each_and_angle_0():
    upright, free = (extract(local("dog", "orb", upright=value), scene()).geometry for value in (True, False))
    assert not upright[:, 3].any()
    assert len(np.unique(upright[:, :2], axis=0)) == len(upright) > 20
    assert len(np.unique(free[:, :2], axis=0)) < len(free)


def test_upright_ellipses_keep_their_direction():
    geometry = extract(local("mser", "sift", upright=True), scene()).geometry
    assert not geometry[:, 3].any()
    assert len(np.unique(geometry[:, 5])) > 10


def test_plain_patches_are_no_features():
    image = np.full((200, 200, 3), 90, np.uint8)
    image[80:120, 80:120] = scene(40, 40)
    features = extract(local("dense", "sift", max_features=10**5), image)
    assert len(features.descriptors) > 20
    assert (np.abs(features.geometry[:, :2] - 99.5) < 60).all()


def test_geometry_has_the_ellipses_of_the_detector():
    features = extract(local("mser", "orb"), scene())
    assert features.geometry.shape[1] == 6
    assert ((features.geometry[:, 4] > 0) & (features.geometry[:, 4] <= 1)).all()


def test_the_identity_holds_the_versions_of_all_and_no_paths():
    spec = local("dog", "brief")
    identity = spec.identity()
    assert identity["detector"] == spec.detector.identity()
    assert identity["descriptor"]["version"] == 1
    assert identity["version"] == 1
    with_file = local("dog", {"name": "hardnet", "weights": "s3://models/hardnet.pth"})
    assert with_file.assets == {"descriptor.weights": "s3://models/hardnet.pth"}
    assert "weights" not in with_file.identity()["descriptor"]


def test_files_reach_the_method_that_asked_for_them(monkeypatch):
    seen = {}
    spec = local("dog", {"name": "hardnet", "weights": "a/b.pth"})

    def build(self: Any, device: str, assets: dict[str, Path]) -> Any:
        seen[device] = assets
        return local("dog", "sift").descriptor.build(device, {})

    monkeypatch.setattr(type(spec.descriptor), "build", build)
    spec.build("cuda", {"descriptor.weights": Path("here.pth"), "detector.weights": Path("there.pth")})
    assert seen == {"cuda": {"weights": Path("here.pth")}}


def config(extractor: dict[str, Any]) -> str:
    channel = {"extractor": extractor, "encoders": [{"name": "vlad", "words": 8}], "index": {"name": "flat"}}
    with pytest.raises(ConfigError) as caught:
        parse_config({"images": "a/", "store": "b", "channels": {"c": channel}}, "the test")
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"detector": {"name": "msre"}},
            "channels.c.extractor.detector.name: unknown detector 'msre'; did you mean 'mser'",
        ),
        (
            {"descriptor": {"name": "sfit"}},
            "channels.c.extractor.descriptor.name: unknown descriptor 'sfit'; did you mean",
        ),
        ({"detector": {"name": "mser", "delat": 3}}, "channels.c.extractor.detector: unknown key 'delat'"),
        ({"detector": {"name": "mser", "delta": 0}}, "channels.c.extractor.detector.delta: "),
        ({"descriptor": {"name": "brief", "bits": 3}}, "channels.c.extractor.descriptor.bits: "),
        ({"descriptor": {}}, "channels.c.extractor.descriptor.name: is missing"),
        ({"descriptor": {"name": "brisk"}, "upright": True}, "channels.c.extractor.upright: this descriptor follows"),
        ({"descriptor": {"name": "freak"}, "upright": True}, "set its `oriented` to false"),
    ],
)
def test_mistakes_are_named_by_their_yaml_path(settings, message):
    whole = {"name": "local", "detector": {"name": "mser"}, "descriptor": {"name": "sift"}}
    assert message in config({**whole, **settings})
