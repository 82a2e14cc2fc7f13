"""Hessian-affine against blobs of known shape, and against itself after a known affine map."""

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from cbir.errors import ConfigError
from cbir.features.detectors.hessian_affine import HessianAffine
from cbir.features.keypoints import by_strength, frames
from cbir.types import Array, Floats, Pixels
from tests.features.scenes import blob, scene

MANY = 10**5
TILTED = np.array([[0.9, 0.3], [-0.25, 0.75]])


def detect(image: Pixels, most: int = MANY, **fields: object) -> Floats:
    keypoints = HessianAffine(**fields).build("cpu", {}, most).detect(image)
    return keypoints[by_strength(keypoints)]


def smooth(height: int = 240, width: int = 320, seed: int = 1) -> Pixels:
    """Texture of blobs of many sizes."""
    rng = np.random.default_rng(seed)
    layers = [cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), std) * std for std in (2, 4, 8)]
    texture = sum(layers)
    grey = 20 + 200 * (texture - texture.min()) / (texture.max() - texture.min())
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def long_blob(major: float, minor: float, degrees: float, side: int = 160) -> Pixels:
    y, x = np.mgrid[:side, :side] - side / 2
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    along, across = (cosine * x + sine * y) / major, (cosine * y - sine * x) / minor
    grey = 40 + 180 * np.exp(-(along**2 + across**2) / 2)
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def warped(image: Pixels, matrix: Array) -> tuple[Pixels, Array]:
    """The picture under an affine map that moves the part which it keeps into view, and the map (2, 3)."""
    height, width = image.shape[:2]
    corners = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)]) @ matrix.T
    full = np.column_stack([matrix, -corners.min(axis=0)])
    size = np.ceil(np.ptp(corners, axis=0)).astype(int) + 1
    return cv2.warpAffine(image, full, size.tolist(), flags=cv2.INTER_CUBIC), full


def overlap(one: Array, other: Array, offset: Array) -> float:
    """Intersection over union of the ellipses x^T M^-1 x <= 1, the second moved by an offset."""
    reach = 2 * np.sqrt(np.linalg.eigvalsh(one)[1])
    grid = np.stack(np.meshgrid(*[np.linspace(-reach, reach, 61)] * 2)).reshape(2, -1)
    moved = grid - offset[:, None]
    first = (grid * np.linalg.solve(one, grid)).sum(axis=0) <= 1
    second = (moved * np.linalg.solve(other, moved)).sum(axis=0) <= 1
    return float((first & second).sum() / (first | second).sum())


def overlaps(before: Floats, after: Floats, full: Array, margin: float = 20) -> Array:
    """For each ellipse, mapped: its greatest overlap with those of the warped picture that are near; -1 without any."""
    height_width = np.array([320, 240])
    inside = ((before[:, :2] > margin) & (before[:, :2] < height_width - margin)).all(axis=1)
    shapes, others = (maps @ maps.transpose(0, 2, 1) for maps in (frames(before), frames(after)))
    shapes, centres = full[:, :2] @ shapes @ full[:, :2].T, before[:, :2] @ full[:, :2].T + full[:, 2]
    best = np.full(len(before), -1.0)
    for i in inside.nonzero()[0]:
        offsets = after[:, :2] - centres[i]
        near = (np.abs(offsets).max(axis=1) < 0.5 * before[i, 2]).nonzero()[0]
        best[i] = max((overlap(shapes[i], others[j], offsets[j]) for j in near), default=-1.0)
    return best[inside]


@pytest.mark.parametrize("std", [4.0, 8.0, 16.0])
def test_a_blob_is_found_in_its_centre_at_its_scale(std):
    x, y, size, _, _, ratio, _ = detect(blob(std))[0]
    assert (x, y) == pytest.approx((80, 80), abs=0.5)
    assert size == pytest.approx(2 * std, rel=0.1)
    assert ratio > 0.9


@pytest.mark.parametrize(("minor", "degrees"), [(6.0, 0.0), (6.0, 30.0), (5.0, 120.0), (4.0, 65.0)])
def test_a_long_blob_has_its_shape(minor, degrees):
    x, y, size, _, _, ratio, direction = detect(long_blob(10.0, minor, degrees), relocate=True)[0]
    assert (x, y) == pytest.approx((80, 80), abs=0.5)
    assert size == pytest.approx(2 * np.sqrt(10 * minor), rel=0.15)
    assert ratio == pytest.approx(minor / 10, abs=0.05)
    assert direction == pytest.approx(degrees, abs=3) or abs(direction - degrees) == pytest.approx(180, abs=3)


@pytest.mark.parametrize("relocate", [False, True])
def test_an_affine_map_takes_ellipses_to_ellipses(relocate):
    """Mikolajczyk's measure: an overlap error below 40 % for most points, of all and of those that are found again."""
    image = smooth()
    picture, full = warped(image, TILTED)
    before, after = detect(image, threshold=4e-4, relocate=relocate), detect(picture, relocate=relocate)
    best = overlaps(before, after, full)
    assert len(best) > 100
    assert (best > 0.6).mean() > 0.6
    assert (best[best > 0] > 0.6).mean() > (0.9 if relocate else 0.75)


def test_ellipses_follow_a_map_better_than_circles():
    image = smooth()
    picture, full = warped(image, np.array([[1.0, 0.2], [0.0, 0.55]]))
    good = {}
    for name, fields in {"circle": {"shape": "circle"}, "ellipse": {}, "relocated": {"relocate": True}}.items():
        best = overlaps(detect(image, threshold=4e-4, **fields), detect(picture, **fields), full)
        good[name] = (best > 0.6).sum() / (best > 0).sum()
    assert good["circle"] < good["ellipse"] < good["relocated"] - 0.1


def test_circles_have_five_columns_and_the_places_of_the_ellipses():
    circles, ellipses = detect(scene(), shape="circle"), detect(scene())
    assert circles.shape[1] == 5
    assert len(ellipses) < len(circles)
    places = {tuple(row) for row in circles[:, :3].tolist()}
    assert all(tuple(row) in places for row in ellipses[:, :3].tolist())
    assert not HessianAffine(shape="circle").affine


def test_long_ellipses_are_left_out():
    assert detect(scene(), max_axis_ratio=6)[:, 5].min() >= 1 / 6
    short = detect(scene(), max_axis_ratio=2)
    assert 0 < len(short) < len(detect(scene()))
    assert short[:, 5].min() >= 0.5


def test_few_are_the_strongest_of_many():
    many, few = detect(smooth()), detect(smooth(), most=40)
    assert 40 <= len(few) < len(many)
    assert np.array_equal(few[:, :5], many[: len(few), :5])


def test_a_higher_threshold_leaves_the_first():
    every, strong = detect(smooth()), detect(smooth(), threshold=2e-3)
    assert 10 < len(strong) < 0.9 * len(every)
    assert np.array_equal(strong[:, :5], every[: len(strong), :5])


def test_affnet_without_a_file_is_random_and_draws_nothing_global():
    import torch

    before = torch.random.get_rng_state()
    one, other = detect(scene(), shape="affnet"), detect(scene(), shape="affnet", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.shape[1] == 7
    assert not np.array_equal(one, other)


def test_affnet_gives_shapes_that_follow_a_map(test_data):
    fields = {"shape": "affnet", "weights": str(test_data / "weights" / "AffNet.pth")}
    image = smooth()
    picture, full = warped(image, TILTED)
    best = overlaps(detect(image, threshold=1e-3, **fields), detect(picture, **fields), full)
    assert (best > 0.6).mean() > 0.6


def test_missing_weights_of_affnet_name_a_file_to_get(tmp_path):
    with pytest.raises(ConfigError, match=r"extractor.detector.weights: .*absent.pth; get AffNet.pth of https://"):
        detect(scene(), shape="affnet", weights=str(tmp_path / "absent.pth"))


def test_assets_are_the_weights():
    spec = HessianAffine(shape="affnet", weights="s3://models/AffNet.pth")
    assert spec.assets == {"weights": "s3://models/AffNet.pth"}
    assert HessianAffine().assets == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "AffNet.pth"}, "choose shape: affnet"),
        ({"shape": "affnet", "weights": "hub"}, "nothing is downloaded"),
        ({"max_axis_ratio": 1}, "greater than 1"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        HessianAffine(**fields)
