"""Deep descriptors against plain timm, torch and Pillow; weights that must load and weights that must not."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.types import Floats, ImageBatch, Pixels

TINY = {"backbone": "test_resnet", "weights": "none", "size": 64}
NETVLAD = {"name": "netvlad", "weights": "none", "words": 4}


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def descriptors(images: list[Pixels], sizes: list[tuple[int, int]] | None = None, **fields: object) -> Floats:
    originals = np.array(sizes or [image.shape[:2] for image in images], np.int32)
    extractor = Deep(**{**TINY, **fields}).build("cpu", {})
    return extractor.extract(ImageBatch(np.arange(len(images)), images, originals)).descriptors


def network(seed: int = 0, name: str = "test_resnet", **arguments: object) -> torch.nn.Module:
    """What `weights: none` makes, by timm alone, with a classifier."""
    torch.manual_seed(seed)
    return timm.create_model(name, **arguments).eval()


def plain(model: torch.nn.Module, image: Pixels, mean: float = 0.5, std: float = 0.5) -> Floats:
    """GeM 3 of a network's maps, normalised, written out."""
    pixels = torch.from_numpy(image / 255).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        maps = model.forward_features((pixels - mean) / std)[0].double()
    pooled = (maps.clamp(min=1e-6) ** 3).mean(dim=(1, 2)) ** (1 / 3)
    return (pooled / pooled.norm()).float().numpy()


def resized(image: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def saved(tmp_path: Path, suffix: str = ".safetensors", **arguments: object) -> tuple[Path, torch.nn.Module]:
    model = network(7, **arguments)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    return path, model


def test_a_descriptor_is_the_normalised_gem_of_the_maps():
    image = picture()
    expected = plain(network(num_classes=0), image)
    assert np.allclose(descriptors([image])[0], expected, atol=1e-6)
    assert np.linalg.norm(expected) == pytest.approx(1)


def test_mean_and_std_are_timms_unless_given():
    image, model = picture(), network(name="test_efficientnet", num_classes=0)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    default = descriptors([image], backbone="test_efficientnet")[0]
    given = descriptors([image], backbone="test_efficientnet", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))[0]
    assert np.allclose(default, plain(model, image, mean, std), atol=1e-6)
    assert np.allclose(given, plain(model, image), atol=1e-6)
    assert not np.allclose(default, given, atol=1e-3)


def test_a_random_network_is_a_function_of_its_seed_and_draws_nothing_global():
    before = torch.random.get_rng_state()
    one, again, other = (descriptors([picture()], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-3)


def test_scales_are_averaged_by_the_power_of_gem():
    image, model = picture(96, 96), network(num_classes=0)
    rows = [plain(model, image if side == 96 else resized(image, side, side)) for side in (32, 64, 96)]
    expected = np.mean(np.stack(rows) ** 3, axis=0) ** (1 / 3)
    found = descriptors([image], scales=(0.6, 1.0, 1.4))[0]
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_scales_are_averaged_plainly_where_descriptors_may_be_negative():
    """A cube root of a negative mean is no number."""
    image = picture(96, 96)
    fields = {"backbone": "test_vit", "pooling": {"name": "spoc"}}
    rows = [descriptors([resized(image, side, side)], size=side, **fields)[0] for side in (64, 96)]
    expected = np.mean(rows, axis=0)
    found = descriptors([image], scales=(1.0, 1.5), **fields)[0]
    assert (found < 0).any()
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_stretched_scales_are_the_nearest_multiples():
    spec = Deep(backbone="resnet50", scales=(0.7071, 1.0, 1.4142))
    assert [spec.side(scale) for scale in spec.scales] == [160, 224, 320]
    assert spec.view.model_dump() == {"size": 320, "fit": "stretch", "oversampling": 2.0}
    assert Deep(backbone="resnet50", size=250).view.size == 250
    assert Deep(backbone="vit", size=518, multiple_of=14, scales=(0.5, 1)).side(0.5) == 266


def test_longest_keeps_the_aspect_ratio():
    image, model = picture(40, 64), network(num_classes=0)
    assert np.allclose(descriptors([image], fit="longest")[0], plain(model, image), atol=1e-6)


def test_scales_of_the_longest_side_begin_at_the_decoded_image():
    large, model = picture(60, 96), network(num_classes=0)
    rows = [plain(model, large), plain(model, resized(large, 40, 64))]
    expected = np.mean(np.stack(rows) ** 3, axis=0) ** (1 / 3)
    found = descriptors([large], sizes=[(600, 960)], fit="longest", scales=(1.0, 1.5))[0]
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_a_small_picture_is_not_enlarged_at_scale_1():
    small, model = picture(40, 50), network(num_classes=0)
    rows = [plain(model, small), plain(model, resized(small, 60, 75))]
    expected = np.mean(np.stack(rows) ** 3, axis=0) ** (1 / 3)
    found = descriptors([small], fit="longest", scales=(1.0, 1.5))[0]
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_a_stretched_picture_of_another_size_is_resized_by_pillow():
    image = picture(100, 80)
    assert np.array_equal(descriptors([image]), descriptors([resized(image, 64, 64)]))


@pytest.mark.parametrize("fields", [{}, {"fit": "longest", "scales": (0.7071, 1.0), "pooling": NETVLAD}])
def test_flipped_descriptors_are_the_mean_with_the_mirror_image(fields):
    image = picture(64, 48)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    one, other = (descriptors([seen], **fields)[0].astype(np.float64) for seen in (image, mirrored))
    found = descriptors([image, picture(seed=1), mirrored], flip=True, **fields)
    assert np.allclose(found[0], (one + other) / np.linalg.norm(one + other), atol=1e-6)
    assert np.array_equal(found[0], found[2])
    assert not np.allclose(one, other, atol=1e-3)


def masked(images: list[Pixels], masks: list[Floats], **fields: object) -> Floats:
    extractor = Deep(**{**TINY, **fields}).build("cpu", {})
    batch = ImageBatch(np.arange(len(images)), images, np.array([image.shape[:2] for image in images], np.int32))
    return extractor.extract_masked(batch, masks).descriptors


SCALED = {"fit": "longest", "scales": (0.7071, 1.0), "pooling": {"name": "mac"}, "flip": True}


@pytest.mark.parametrize("fields", [{}, SCALED])
def test_a_mask_of_ones_changes_nothing(fields):
    images = [picture(64, 48), picture(48, 64, seed=1)]
    ones = [np.ones((5, 7), np.float32), np.ones((64, 64), np.float32)]
    assert masked(images, ones, **fields).tobytes() == descriptors(images, **fields).tobytes()


def test_masked_places_are_not_in_the_mean():
    """Spoc: the mean of the places, weighted by the means of the mask over what they cover."""
    image, model = picture(), network(num_classes=0)
    mask = np.random.default_rng(5).integers(0, 256, (64, 64)).astype(np.float32) / 255
    mask[:, :32] = 0
    with torch.inference_mode():
        maps = model.forward_features((torch.from_numpy(image / 255).float().permute(2, 0, 1)[None] - 0.5) / 0.5)[0]
    rows, columns = maps.shape[1:]
    weights = mask.reshape(rows, 64 // rows, columns, 64 // columns).mean(axis=(1, 3))
    expected = (maps.numpy() * weights).sum(axis=(1, 2))
    found = masked([image], [mask], pooling={"name": "spoc"})[0]
    assert np.allclose(found, expected / np.linalg.norm(expected), atol=1e-5)


def test_a_mask_is_mirrored_with_its_image():
    image, mask = picture(64, 48), np.float32([[1, 0, 0.2]])
    mirrored = [np.ascontiguousarray(array[:, ::-1]) for array in (image, mask)]
    one, other = masked([image, mirrored[0]], [mask, mirrored[1]], flip=True)
    assert np.array_equal(one, other)
    assert not np.allclose(one, masked([image], [mirrored[1]], flip=True)[0], atol=1e-3)


def test_a_mask_needs_maps():
    fields = {"backbone": "torchvision/alexnet", "layers": ["fc6"]}
    with pytest.raises(ConfigError, match="mask: a fully connected layer has no places to weigh; remove the mask"):
        masked([picture()], [np.ones((2, 2), np.float32)], **fields)


def test_files_of_the_pooling_are_assets_and_count_by_their_content():
    fields = {"backbone": "resnet18", "weights": "net.pth"}
    spec = Deep(**fields, pooling={"name": "netvlad", "weights": "s3://models/words.safetensors"})
    assert spec.assets == {"weights": "net.pth", "pooling.weights": "s3://models/words.safetensors"}
    assert "weights" not in spec.identity()["pooling"]
    assert spec.identity()["pooling"]["version"] == 1
    assert Deep(**fields).assets == {"weights": "net.pth"}


def test_full_passes_give_the_descriptors_of_single_images(monkeypatch):
    """The padding that an accelerator's passes get, on the CPU: 5 images of two shapes in passes of 4."""
    images = [picture(64, 64 - 8 * (i % 2), seed=i) for i in range(5)]
    extractor = Deep(**TINY, fit="longest", batch=4).build("cpu", {})
    batch = ImageBatch(np.arange(5), images, np.array([image.shape[:2] for image in images], np.int32))
    single = extractor.extract(batch).descriptors
    monkeypatch.setattr(extractor.passes, "size", 4)
    assert np.allclose(extractor.extract(batch).descriptors, single, atol=1e-6)


def test_tokens_become_the_map_of_their_patches():
    """A patch of another colour is found at its own place in the map of a transformer."""
    backbone = Backbone(Deep(**{**TINY, "backbone": "test_vit"}), None)
    block = backbone.network.patch_embed.patch_size[0]
    images = torch.zeros(2, 8 * block, 2 * block, 3, dtype=torch.uint8)
    images[1, 5 * block : 6 * block, :block] = 255
    with torch.inference_mode():
        maps = backbone(images)
    change = (maps[1] - maps[0]).norm(dim=0)
    assert maps.shape == (2, backbone.network.num_features, 8, 2)
    assert divmod(int(change.argmax()), 2) == (5, 0)


def test_maps_with_channels_last_are_turned():
    backbone = Backbone(Deep(backbone="swin_tiny_patch4_window7_224", weights="none"), None)
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 64, 96, 3, dtype=torch.uint8)).shape == (1, 768, 2, 3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_and_the_classifier_is_not_needed(tmp_path, suffix):
    path, model = saved(tmp_path, suffix, num_classes=5)
    expected = plain(model, picture())
    assert np.allclose(descriptors([picture()], weights=str(path))[0], expected, atol=1e-6)
    assert not np.allclose(descriptors([picture()])[0], expected, atol=1e-3)


def test_weights_come_from_the_assets_where_they_are_given(tmp_path):
    path, model = saved(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = Deep(**{**TINY, "weights": "s3://bucket/net.safetensors"}, weights_sha256=digest)
    assert spec.assets == {"weights": "s3://bucket/net.safetensors"}
    extractor = spec.build("cpu", {"weights": path})
    found = extractor.extract(ImageBatch(np.arange(1), [picture()], np.array([[64, 64]], np.int32))).descriptors
    assert np.allclose(found[0], plain(model, picture()), atol=1e-6)


@pytest.mark.parametrize("weights", ["none", "hub", "a1_in1k"])
def test_names_of_weights_are_no_files(weights):
    assert Deep(backbone="resnet18", weights=weights).assets == {}


@pytest.mark.parametrize("weights", ["net.pth", "folder/net", "s3://bucket/net.safetensors", "file:///net.pt"])
def test_paths_and_uris_of_weights_are_files(weights):
    assert Deep(backbone="resnet18", weights=weights).assets == {"weights": weights}


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"extractor.weights: there is no file .*absent.pth"):
        descriptors([picture()], weights=str(tmp_path / "absent.pth"))


def test_altered_weights_are_refused(tmp_path):
    path, _ = saved(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    descriptors([picture()], weights=str(path), weights_sha256=digest)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ConfigError, match=rf"weights_sha256: .* expected {digest}"):
        descriptors([picture()], weights=str(path), weights_sha256=digest)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unreadable_weights_are_refused(tmp_path, suffix):
    path, _ = saved(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"extractor.weights: .* is not a .safetensors file"):
        descriptors([picture()], weights=str(path))


def test_weights_that_are_code_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(network(), path)
    with pytest.raises(ConfigError, match="tensors only"):
        descriptors([picture()], weights=str(path))


def test_weights_of_another_network_are_refused(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(ConfigError, match=r"not of backbone 'test_efficientnet': .*missing .*conv_stem.*unknown"):
        descriptors([picture()], weights=str(path), backbone="test_efficientnet")


def test_weights_of_another_width_are_refused(tmp_path):
    path, _ = saved(tmp_path, name="test_vit")
    with pytest.raises(ConfigError, match=r"not of backbone 'test_vit': weights 18 of another shape \(blocks.0.mlp"):
        descriptors([picture()], weights=str(path), backbone="test_vit", backbone_args={"mlp_ratio": 2})


def test_a_misspelt_backbone_is_answered_by_the_nearest():
    with pytest.raises(ConfigError, match=r"extractor.backbone: .* 'resnet_50'; did you mean .*resnet50"):
        descriptors([picture()], backbone="resnet_50")


def test_arguments_that_the_backbone_does_not_take_are_named():
    with pytest.raises(ConfigError, match=r"extractor.backbone_args: .*padding_type"):
        descriptors([picture()], backbone_args={"padding_type": "same"})


def test_a_size_that_the_backbone_does_not_take_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"extractor.size: backbone 'mixer_s32_224' at 64 x 64 pixels"):
        descriptors([picture()], backbone="mixer_s32_224")


def test_weights_that_the_hub_does_not_have_are_named():
    with pytest.raises(ConfigError, match=r"no weights 'resnet18.b1'; known are .*resnet18.a1_in1k"):
        descriptors([picture()], backbone="resnet18", weights="b1")


def test_a_hub_out_of_reach_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be loaded from the hub .*\.safetensors"):
        descriptors([picture()], backbone="resnet18", weights="hub")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights_sha256": "0" * 64}, "weights_sha256 needs weights that are a file"),
        ({"backbone_args": {"pretrained": True}}, "backbone_args must not hold pretrained"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be above 0"),
        ({"scales": ()}, "at least 1 item"),
        ({"pooling": {"name": "gme"}}, "gem"),
    ],
)
def test_impossible_combinations_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Deep(**{**TINY, **fields})


def test_the_specs_do_not_import_torch():
    code = "import sys, cbir.features; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_weights_give_the_descriptors_of_plain_timm(test_data):
    weights = test_data / "weights" / "mobilenetv2_100_imagenet.safetensors"
    model = timm.create_model("mobilenetv2_100", num_classes=1001, pad_type="same", checkpoint_path=str(weights)).eval()
    folder = test_data / "photos" / "smvs_dvd" / "images"
    paths = [*sorted(folder.glob("Reference_*"))[:5], *sorted(folder.glob("Canon_*"))[:5]]
    images = [_stretched(path) for path in paths]
    found = descriptors(
        images,
        backbone="mobilenetv2_100",
        backbone_args={"pad_type": "same"},
        weights=str(weights),
        size=224,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    expected = np.stack([plain(model, image) for image in images])
    assert (found * expected).sum(axis=1) == pytest.approx(1, abs=1e-5)
    # They are descriptors of the pictures, not constants.
    assert (found @ found.T)[np.triu_indices(10, 1)].max() < 0.99


def test_passes_of_a_cpu_hold_one_image():
    assert Deep(**TINY).build("cpu", {}).passes.size == 1


def _stretched(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
