"""Descriptors of normalised patches: what turns and stretches with the keypoint, and weights that must be a file."""

import cv2
import kornia
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cbir.errors import ConfigError
from cbir.features.descriptors.patches import HardNet, Mkd, SosNet, TFeat
from cbir.features.keypoints import as_ellipses
from cbir.types import Floats
from tests.features.scenes import circles, scene

NETWORKS = {HardNet: kornia.feature.HardNet, SosNet: kornia.feature.SOSNet, TFeat: kornia.feature.TFeat}


@pytest.fixture(params=[HardNet, SosNet, TFeat, Mkd])
def spec(request):
    return request.param(**({} if request.param is Mkd else {"weights": "none"}))


def test_rows_are_unit_vectors(spec):
    rows, _ = spec.build("cpu", {}).describe(scene(), circles())
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_row_does_not_depend_on_the_other_keypoints(spec):
    descriptor, table = spec.build("cpu", {}), np.concatenate([circles(60), circles(60, seed=1)])
    whole, kept = descriptor.describe(scene(), table)
    some, also_kept = descriptor.describe(scene(), table[100:])
    assert np.array_equal(also_kept, kept[kept >= 100] - 100)
    assert np.allclose(some, whole[kept >= 100], atol=1e-6)


def test_keypoints_on_a_plain_patch_have_no_row(spec):
    image = scene()
    image[:120, :160] = 90
    table = np.array([[50, 50, 6, 0, 1], [240, 180, 6, 0, 1], [60, 60, 6, 0, 1]], np.float32)
    rows, kept = spec.build("cpu", {}).describe(image, table)
    assert kept.tolist() == [1]
    assert rows.shape == (1, spec.build("cpu", {}).dim)


@pytest.mark.parametrize(("kernels", "dim"), [("polar", 175), ("cart", 63), ("concat", 238)])
def test_multiple_kernels_need_no_file(kernels, dim):
    assert Mkd(kernels=kernels).build("cpu", {}).dim == dim


def test_an_ellipse_is_described_as_the_circle_that_it_was():
    """Kernels of a picture's circles, and of the ellipses that these become in the picture stretched along y."""
    image, table = cv2.GaussianBlur(scene(), (0, 0), 1.5), circles()
    table[:, 3] = 0
    tall = cv2.resize(image, (320, 480), interpolation=cv2.INTER_CUBIC)
    ellipses = as_ellipses(table).copy()
    ellipses[:, 1] = 2 * (table[:, 1] + 0.5) - 0.5
    ellipses[:, 2] *= np.sqrt(2)
    ellipses[:, 5], ellipses[:, 6] = 0.5, 90
    descriptor = Mkd().build("cpu", {})
    plain, stretched = (descriptor.describe(*pair)[0] for pair in ((image, table), (tall, ellipses)))
    round_ones = descriptor.describe(tall, ellipses[:, :5])[0]
    assert np.median((plain * stretched).sum(axis=1)) > 0.97
    assert np.median((plain * round_ones).sum(axis=1)) < 0.95


@pytest.mark.parametrize("spec_class", list(NETWORKS))
def test_weights_from_a_file_are_those_of_the_network(tmp_path, spec_class):
    torch.manual_seed(5)
    network = NETWORKS[spec_class](pretrained=False).eval()
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": network.state_dict()}, path)
    found, _ = spec_class(weights=str(path)).build("cpu", {}).describe(scene(), circles())
    again, _ = spec_class(weights="s3://a/b.pth").build("cpu", {"weights": path}).describe(scene(), circles())
    random, _ = spec_class(weights="none").build("cpu", {}).describe(scene(), circles())
    assert np.allclose(found, _by_kornia(network), atol=1e-5)
    assert np.array_equal(found, again)
    assert not np.allclose(found, random, atol=1e-3)


def _by_kornia(network: torch.nn.Module) -> Floats:
    """The rows of the patches that our own sampling gives."""
    from cbir.features.opencv import grey
    from cbir.features.patches import normalised_patches, pyramid

    patches = normalised_patches(pyramid(grey(scene())), circles(), 32, 6.0) / 255
    with torch.inference_mode():
        return torch.nn.functional.normalize(network(torch.from_numpy(patches)[:, None].float())).numpy()


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "tfeat.pth"
    torch.save(kornia.feature.TFeat(pretrained=False).state_dict(), path)
    with pytest.raises(ConfigError, match=r"extractor.descriptor.weights: .* is not of hardnet: .*Get checkpoint_"):
        HardNet(weights=str(path)).build("cpu", {})


@pytest.mark.parametrize("spec_class", list(NETWORKS))
def test_missing_weights_name_a_file_to_get(tmp_path, spec_class):
    with pytest.raises(
        ConfigError, match=r"no file .*absent.pth; get .* of https://github.com/.*nothing is downloaded"
    ):
        spec_class(weights=str(tmp_path / "absent.pth")).build("cpu", {})
    with pytest.raises(ValidationError, match="nothing is downloaded"):
        spec_class(weights="liberty")


def test_assets_are_the_weights():
    assert HardNet(weights="s3://models/h.pth").assets == {"weights": "s3://models/h.pth"}
    assert HardNet(weights="none").assets == {}
    assert Mkd().assets == {}


def test_altered_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(kornia.feature.TFeat(pretrained=False).state_dict(), path)
    with pytest.raises(ConfigError, match=r"extractor.descriptor.weights_sha256: .* expected 0000"):
        TFeat(weights=str(path), weights_sha256="0" * 64).build("cpu", {})
