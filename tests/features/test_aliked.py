"""ALIKED with the published weights on a photograph and its warped copy, and with random ones."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from kornia.feature import ALIKED
from pydantic import ValidationError

from cbir.errors import ConfigError
from cbir.features.aliked import Aliked
from cbir.types import FeatureBatch, ImageBatch, Pixels
from tests.features.scenes import scene

SMALL = {"model": "aliked-t16", "weights": "none"}


def aliked(image: Pixels, original: tuple[int, int] | None = None, **fields: object) -> FeatureBatch:
    size = np.array([original or image.shape[:2]], np.int32)
    return Aliked(**{**SMALL, **fields}).build("cpu", {}).extract(ImageBatch(np.zeros(1, np.int64), [image], size))


@pytest.fixture(scope="module")
def real(test_data) -> dict[str, object]:
    return {"model": "aliked-n16", "weights": str(test_data / "weights" / "aliked-n16.pth")}


@pytest.fixture(scope="module")
def photograph(test_data) -> Pixels:
    path = sorted((test_data / "photos" / "sfm_scenes" / "images").rglob("*.*"))[0]
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    scale = 400 / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def test_mutual_matches_agree_with_a_known_homography(real, photograph):
    homography = np.array([[0.9, 0.12, 15.0], [-0.08, 0.95, 40.0], [1e-4, 5e-5, 1.0]])
    height, width = photograph.shape[:2]
    copy = cv2.warpPerspective(photograph, homography, (width, height), flags=cv2.INTER_CUBIC)
    one, other = aliked(photograph, **real), aliked(copy, **real)
    similarity = one.descriptors @ other.descriptors.T
    nearest = similarity.argmax(axis=1)
    mutual = similarity.argmax(axis=0)[nearest] == np.arange(len(nearest))
    moved = cv2.perspectiveTransform(one.geometry[mutual, None, :2], homography)[:, 0]
    offset = np.linalg.norm(moved - other.geometry[nearest[mutual], :2], axis=1)
    assert mutual.sum() > 150
    assert (offset < 3).mean() > 0.75


def test_features_are_those_of_kornia(real, photograph):
    network = ALIKED("aliked-n16", max_num_keypoints=300, detection_threshold=0.2).eval()
    network.load_state_dict(torch.load(real["weights"], weights_only=True), strict=False)
    with torch.inference_mode():
        expected = network(torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255)[0]
    found = aliked(photograph, **real, max_features=10_000)
    offset = np.abs(found.geometry[:, None, :2] - expected.keypoints.numpy()[None]).max(axis=2)
    ours, theirs = (offset < 0.01).nonzero()
    assert len(ours) > 0.98 * len(expected.keypoints)
    cosines = (found.descriptors[ours] * expected.descriptors.numpy()[theirs]).sum(axis=1)
    assert np.median(cosines) > 0.9999
    assert (np.diff(expected.keypoint_scores.numpy()[theirs]) <= 0).all()


def test_the_strongest_come_first_and_fewer_are_the_first_of_more():
    many, few = aliked(scene()), aliked(scene(), max_features=40)
    assert len(few.descriptors) == 40 < len(many.descriptors)
    assert np.array_equal(few.geometry, many.geometry[:40])
    assert np.allclose(few.descriptors, many.descriptors[:40], atol=1e-5)


def test_keypoints_above_a_higher_threshold_are_the_first(real, photograph):
    every, strong = aliked(photograph, **real), aliked(photograph, **real, threshold=0.6)
    assert 10 < len(strong.descriptors) < 0.9 * len(every.descriptors)
    assert np.array_equal(strong.geometry, every.geometry[: len(strong.descriptors)])


def test_where_all_is_weak_nothing_is_found(real):
    """kornia's own threshold falls back to the mean score there."""
    assert len(aliked(cv2.GaussianBlur(scene(), (0, 0), 30), **real).descriptors) == 0


def test_geometry_is_in_pixels_of_the_original():
    same, original = aliked(scene()), aliked(scene(), original=(480, 960))
    x, y, size, angle = same.geometry.T
    assert np.allclose(original.geometry[:, 0], 3 * (x + 0.5) - 0.5, atol=1e-3)
    assert np.allclose(original.geometry[:, 1], 2 * (y + 0.5) - 0.5, atol=1e-3)
    assert np.allclose(original.geometry[:, 2], np.sqrt(6) * size)
    assert (np.unique(size), np.unique(angle)) == (32, 0)


@pytest.mark.parametrize("shape", [(1, 40), (3, 3), (20, 500)])
def test_small_textured_pictures_are_no_error(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    features = aliked(image)
    assert np.isfinite(features.descriptors).all()
    assert (np.abs(np.linalg.norm(features.descriptors, axis=1) - 1) < 1e-4).all()


def test_a_random_network_is_a_function_of_its_seed_and_draws_nothing_global():
    before = torch.random.get_rng_state()
    one, again, other = (aliked(scene(), seed=seed, max_features=20) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(one.descriptors, again.descriptors)
    assert not np.array_equal(one.geometry, other.geometry)


def test_weights_come_from_the_assets_where_they_are_given(tmp_path):
    torch.manual_seed(3)
    state = ALIKED("aliked-t16").state_dict()
    del state["dkd.hw_grid"]
    path = tmp_path / "aliked.pth"
    torch.save(state, path)
    spec = Aliked(model="aliked-t16", weights="s3://models/aliked.pth")
    assert spec.assets == {"weights": "s3://models/aliked.pth"}
    size = np.array([scene().shape[:2]], np.int32)
    found = spec.build("cpu", {"weights": path}).extract(ImageBatch(np.zeros(1, np.int64), [scene()], size))
    assert np.array_equal(found.descriptors, aliked(scene(), weights=str(path)).descriptors)
    with pytest.raises(ConfigError, match=r"extractor.weights: .* is not of aliked-n16: .*another shape"):
        aliked(scene(), model="aliked-n16", weights=str(path))


def test_missing_weights_name_a_file_to_get(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no file .*; get https://.*/aliked-n32.pth, nothing is downloaded"):
        Aliked(model="aliked-n32", weights=str(tmp_path / "absent.pth")).build("cpu", {})
    with pytest.raises(ValidationError, match=r"aliked-n16.pth.* nothing is downloaded"):
        Aliked(weights="hub")
