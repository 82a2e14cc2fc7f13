"""DELF: attention chooses, and scores decide the order and the number."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cbir.errors import ConfigError
from cbir.features.delf import Delf
from cbir.features.networks.backbone import Backbone
from cbir.types import FeatureBatch, Floats, ImageBatch, Pixels
from tests.features.scenes import scene

TINY = {"backbone": "test_resnet", "weights": "none", "size": 96, "scales": (1.0,)}
CHANNELS = 192


def delf(picture: Pixels, original: tuple[int, int] | None = None, **fields: object) -> FeatureBatch:
    batch = ImageBatch(np.arange(1), [picture], np.array([original or picture.shape[:2]], np.int32))
    return Delf(**{**TINY, "max_features": 10**6, **fields}).build("cpu", {}).extract(batch)


def places(picture: Pixels) -> Floats:
    """The network's vectors (P, C)."""
    with torch.inference_mode():
        made = Backbone(Delf(**TINY), None, -2)(torch.from_numpy(picture[None].copy()))
    return made[0].flatten(1).T.numpy()


@pytest.fixture
def head(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv1.weight": torch.randn((8, CHANNELS, 1, 1), generator=generator),
        "conv1.bias": torch.randn(8, generator=generator),
        "conv2.weight": torch.randn((1, 8, 1, 1), generator=generator),
        "conv2.bias": torch.randn(1, generator=generator),
    }
    torch.save(state, tmp_path / "attention.pth")
    return tmp_path / "attention.pth"


def scores_of(vectors: Floats, head: Path) -> Floats:
    """The attention written out."""
    state = {key: value.numpy().astype(np.float64) for key, value in torch.load(head).items()}
    hidden = np.maximum(vectors @ state["conv1.weight"][:, :, 0, 0].T + state["conv1.bias"], 0)
    return np.log1p(np.exp(hidden @ state["conv2.weight"][0, :, 0, 0] + state["conv2.bias"]))


def test_rows_are_unit_vectors_by_falling_score_of_the_trained_attention(head):
    picture = scene(96, 96)
    vectors = places(picture)
    scores = scores_of(vectors, head)
    found = delf(picture, attention=str(head), score_threshold=0.0).descriptors
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = (found @ expected.T).argmax(axis=1)
    assert (found * expected[nearest]).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert (np.diff(scores[nearest]) <= 1e-6).all()
    assert len(found) == len(vectors)


def test_only_places_above_the_threshold_are_kept(head):
    picture = scene(96, 96)
    scores = scores_of(places(picture), head)
    middle = float(np.median(scores))
    found = delf(picture, attention=str(head), score_threshold=middle)
    assert 0 < len(found.descriptors) == (scores > middle).sum()
    # The published threshold belongs to the published attention.
    assert len(delf(picture, attention=str(head)).descriptors) == (scores > 100).sum()


def test_without_a_trained_attention_the_norm_decides():
    picture = scene(96, 96)
    vectors = places(picture)
    order = np.argsort(-np.linalg.norm(vectors, axis=1), kind="stable")
    expected = vectors[order] / np.linalg.norm(vectors[order], axis=1, keepdims=True)
    assert np.allclose(delf(picture).descriptors, expected, atol=1e-5)


def test_the_limit_is_over_all_scales():
    fields = {"scales": (0.5, 1.0, 2.0)}
    every, few = delf(scene(96, 96), **fields), delf(scene(96, 96), **fields, max_features=12)
    assert len(every.descriptors) == 3 * 3 + 6 * 6 + 12 * 12
    assert np.array_equal(few.descriptors, every.descriptors[:12])
    assert np.array_equal(few.geometry, every.geometry[:12])


def test_seven_scales_and_a_thousand_features_unless_given():
    spec = Delf(backbone="resnet50", weights="none")
    assert spec.scales == (0.25, 0.3536, 0.5, 0.7071, 1.0, 1.4142, 2.0)
    assert (spec.max_features, spec.stage, spec.view.size) == (1000, -2, 2048)
    assert (spec.least_score(7.0), Delf(backbone="resnet50", weights="none", attention="a.pth").least_score(7.0)) == (
        0,
        100,
    )


def test_a_smaller_scale_sees_a_larger_field():
    sizes = {scale: np.unique(delf(scene(96, 96), scales=(scale,)).geometry[:, 2]) for scale in (0.5, 1.0, 2.0)}
    assert sizes[0.5] == pytest.approx(2 * sizes[1.0])
    assert sizes[2.0] == pytest.approx(sizes[1.0] / 2)


def test_geometry_is_in_pixels_of_the_original():
    picture = scene(96, 96)
    same, larger = delf(picture), delf(picture, original=(192, 192))
    # The larger original is seen at the same size, as `size` is that of this picture.
    assert np.array_equal(same.descriptors, larger.descriptors)
    assert np.allclose(larger.geometry[:, :2], 2 * (same.geometry[:, :2] + 0.5) - 0.5, atol=1e-4)
    assert np.allclose(larger.geometry[:, 2], 2 * same.geometry[:, 2])


def test_files_are_assets_and_come_from_there(head):
    fields = {**TINY, "attention": "s3://models/attention.pth", "score_threshold": 0.0}
    assert Delf(**fields).assets == {"attention": "s3://models/attention.pth"}
    picture = scene(96, 96)
    batch = ImageBatch(np.arange(1), [picture], np.array([[96, 96]], np.int32))
    found = Delf(**fields).build("cpu", {"attention": head}).extract(batch)
    assert np.array_equal(
        found.descriptors,
        delf(picture, attention=str(head), score_threshold=0.0, max_features=1000).descriptors,
    )


def test_an_attention_for_other_maps_is_refused(head):
    with pytest.raises(ConfigError, match=r"extractor.stage: stage -1 of backbone 'test_resnet' fails: .*attention"):
        delf(scene(96, 96), attention=str(head), stage=-1)
    torch.save({"weight": torch.zeros(3)}, head)
    with pytest.raises(ConfigError, match=r"extractor.attention: .* must hold conv1.weight \(A, C, 1, 1\)"):
        delf(scene(96, 96), attention=str(head))
    with pytest.raises(ConfigError, match=r"extractor.attention: there is no file .*absent.pth"):
        delf(scene(96, 96), attention=str(head.parent / "absent.pth"))


def test_impossible_settings_are_refused():
    with pytest.raises(ValidationError, match="attention must be 'norm' or the path"):
        Delf(**TINY, attention="softplus")
    with pytest.raises(ConfigError, match=r"extractor.stage: stage 9 of backbone"):
        delf(scene(96, 96), stage=9)
