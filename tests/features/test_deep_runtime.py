"""Deep descriptors in 16 bits, compiled and converted; passes of a fixed size that give way where memory is short."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import cbir
from cbir.config import Config
from cbir.errors import ConfigError, DataError
from cbir.features.deep import Deep
from cbir.features.ensemble import Ensemble
from cbir.features.multi_pass import MultiPass
from cbir.features.networks import runtime
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.runtime import Passes
from cbir.spec import fingerprint
from cbir.types import Floats, ImageBatch, Pixels
from pipelines.indexing import index

TINY: dict[str, Any] = {"backbone": "test_resnet", "weights": "none", "size": 64}
CPU = torch.device("cpu")

needs_bfloat16 = pytest.mark.skipif(not runtime._has_bfloat16(CPU), reason="a processor without bfloat16")


@pytest.fixture
def openvino() -> None:
    pytest.importorskip("openvino")


def picture(seed: int = 0, height: int = 64, width: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = [picture(seed) for seed in range(5)]


def batch(images: list[Pixels]) -> ImageBatch:
    return ImageBatch(np.arange(len(images)), images, np.array([image.shape[:2] for image in images], np.int32))


def descriptors(images: list[Pixels], **fields: object) -> Floats:
    return Deep(**{**TINY, **fields}).build("cpu", {}).extract(batch(images)).descriptors


def assert_rounded(found: Floats, exact: Floats, at_least: float = 0.0) -> None:
    """Rows of length 1 near the exact ones, but not so near."""
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.abs(found - exact).max() < 5e-3
    assert np.abs(found - exact).max() >= at_least


def standing_alone(images: list[Pixels], **fields: object) -> Floats:
    """The rows of images that are extracted one by one, last first; the same bytes as those of a batch."""
    extractor = Deep(**{**TINY, **fields}).build("cpu", {})
    together = extractor.extract(batch(images)).descriptors
    alone = [extractor.extract(batch([image])).descriptors[0] for image in reversed(images)]
    assert together.tobytes() == np.stack(alone[::-1]).tobytes()
    return together


@needs_bfloat16
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_efficientnet"])
def test_bfloat16_rounds_the_network_and_nothing_else(backbone):
    fields = {"backbone": backbone, "pooling": {"name": "spoc"}}
    assert_rounded(descriptors(PICTURES, **fields, precision="bfloat16"), descriptors(PICTURES, **fields), 1e-5)


@needs_bfloat16
@pytest.mark.parametrize("fit", ["stretch", "longest"])
def test_an_image_in_bfloat16_stands_alone(fit):
    images = [picture(seed, 64, 64 - 8 * (seed % 2)) for seed in range(4)]
    rows = standing_alone(images, precision="bfloat16", fit=fit, scales=(0.5, 1.0))
    assert not np.array_equal(rows[0], rows[1])


def test_float16_is_for_gpus():
    with pytest.raises(ConfigError, match=r"extractor.precision: float16 needs a GPU.*use bfloat16 or float32"):
        descriptors(PICTURES, precision="float16")


@pytest.mark.parametrize("form", ["torch", "openvino"])
def test_a_processor_without_bfloat16_is_refused_rather_than_served_otherwise(monkeypatch, form):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"extractor.precision: bfloat16 needs .*AVX512_BF16 or AMX.*use float32"):
        descriptors(PICTURES, precision="bfloat16", runtime=form)


def test_what_rounds_otherwise_has_another_fingerprint():
    forms: list[dict[str, Any]] = [{}, {"precision": "bfloat16"}, {"compile": True}, {"runtime": "openvino"}]
    assert len({fingerprint(Deep(**TINY, **form).identity()) for form in forms}) == len(forms)


def test_numbers_beyond_float16_are_an_error_rather_than_a_row():
    extractor = Deep(**TINY).build("cpu", {})
    extractor._spec = extractor._spec.model_copy(update={"precision": "float16"})
    extractor._network = lambda images: [torch.full((len(images), *extractor._dims, 2, 2), torch.inf)]
    with pytest.raises(DataError, match=r"beyond the range of float16 in backbone 'test_resnet'; use bfloat16"):
        extractor.extract(batch(PICTURES))


def test_queries_need_neither_the_hardware_nor_a_program():
    spec = Deep(**TINY, precision="float16", compile=True, scales=(0.5, 1.0))
    assert spec.for_queries == Deep(**TINY, scales=(0.5, 1.0))


def test_so_do_the_queries_of_methods_that_hold_networks():
    on_gpu, plain = {**TINY, "precision": "float16"}, Deep(**TINY)
    assert Ensemble(members=[on_gpu, TINY]).for_queries == Ensemble(members=[plain, plain])
    assert MultiPass(network=on_gpu).for_queries == MultiPass(network=plain)


@needs_bfloat16
def test_an_index_of_bfloat16_is_searched_in_float32(config: Callable[..., Config], pictures: dict[str, bytes]):
    channel = {"extractor": {"name": "deep", **TINY, "precision": "bfloat16"}, "index": {"name": "flat"}}
    settings = config(channels={"global": channel}, search={"depth": 5})
    index(settings)
    searcher = cbir.open(settings.store)
    first = searcher.search(pictures["object3/view2.jpg"])[0]
    assert first.key == "object3/view2.jpg"
    assert 0.999 < first.score < 1 - 1e-6


def test_a_compiled_network_is_a_program_for_each_scale(monkeypatch):
    """As torch.compile is asked; a real program takes a compiler and a minute."""
    asked: list[dict[str, Any]] = []
    frozen: list[tuple[tuple[int, ...], bool]] = []

    def pretend(network: runtime.Network, **options: Any) -> runtime.Network:
        asked.append(options)

        def run(images: Tensor) -> list[Tensor]:
            frozen.append((tuple(images.shape), torch._inductor.config.freezing))
            return network(images)

        return run

    monkeypatch.setattr(torch, "compile", pretend)
    found = descriptors(PICTURES[:2], compile=True, scales=(0.5, 1.0))
    assert asked == [{"dynamic": False, "fullgraph": True}]
    assert frozen[:2] == [((1, 32, 32, 3), True), ((1, 64, 64, 3), True)]
    assert not any(constants for _, constants in frozen[2:])
    assert np.array_equal(found, descriptors(PICTURES[:2], scales=(0.5, 1.0)))


@needs_bfloat16
def test_a_compiled_network_gives_the_descriptors_of_the_plain_one():
    fields: dict[str, Any] = {"backbone": "test_vit", "pooling": {"name": "spoc"}, "precision": "bfloat16"}
    fields["backbone_args"] = {"img_size": 64, "depth": 1}
    assert_rounded(standing_alone(PICTURES, **fields, compile=True), descriptors(PICTURES, **fields))


def test_a_network_that_cannot_be_compiled_is_a_clear_error(monkeypatch):
    def refuse(network: runtime.Network, **options: Any) -> runtime.Network:
        def run(images: Tensor) -> list[Tensor]:
            raise torch._dynamo.exc.Unsupported("data-dependent branch")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ConfigError, match=r"extractor.compile: backbone 'test_resnet' at 64 x 64 .*data-dependent"):
        descriptors(PICTURES, compile=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compile": True, "fit": "longest"}, "compile makes a program for each shape .* use fit: stretch"),
        ({"runtime": "openvino", "fit": "longest"}, "runtime: openvino makes a program for each shape"),
        ({"compile": True, "runtime": "openvino"}, "compile is torch's: remove it"),
        ({"precision": "float8"}, "'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_impossible_forms_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Deep(**TINY, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"scales": (0.5, 1.0)},
        {"backbone": "test_vit", "pooling": {"name": "spoc"}, "flip": True},
        {"layers": ("layer2", "layer3")},
    ],
)
def test_openvino_gives_the_descriptors_of_torch(openvino, fields):
    found, expected = standing_alone(PICTURES, runtime="openvino", **fields), descriptors(PICTURES, **fields)
    assert np.allclose(found, expected, atol=1e-3)
    assert (found * expected).sum(axis=1) == pytest.approx(1, abs=1e-5)


@needs_bfloat16
def test_openvino_computes_in_bfloat16_where_it_is_asked_for_and_only_there(openvino):
    exact = descriptors(PICTURES, runtime="openvino")
    rounded = standing_alone(PICTURES, runtime="openvino", precision="bfloat16")
    assert np.abs(exact - descriptors(PICTURES)).max() < 1e-5
    assert_rounded(rounded, exact, 1e-4)


def test_openvino_tells_nobody(openvino, monkeypatch):
    telemetry = pytest.importorskip("openvino_telemetry")
    monkeypatch.setattr(telemetry.Telemetry, "init", lambda *_args, **_kwargs: pytest.fail("it would be told"))
    assert len(descriptors(PICTURES, runtime="openvino")) == len(PICTURES)


def test_openvino_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"extractor.runtime: openvino is not installed; pip install 'cbir\[openv"):
        descriptors(PICTURES, runtime="openvino")


def test_openvino_is_for_cpus():
    spec = Deep(**TINY, runtime="openvino")
    with pytest.raises(ConfigError, match=r"extractor.runtime: openvino computes on CPUs, found cuda"):
        runtime.network_on(Backbone(spec, None), spec, (64, 64), torch.device("cuda"))


def test_descriptors_are_the_same_whatever_fits(monkeypatch):
    extractor = Deep(**TINY, scales=(0.5, 1.0)).build("cpu", {})
    expected = extractor.extract(batch(PICTURES)).descriptors
    whole = extractor.passes._run

    def small(images: Tensor) -> list[Tensor]:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(images)

    monkeypatch.setattr(extractor, "passes", Passes(small, CPU, 16))
    assert np.allclose(extractor.extract(batch(PICTURES)).descriptors, expected, atol=1e-6)
    assert extractor.passes.size == 2


def test_the_networks_need_neither_ray_nor_faiss():
    code = "import sys; sys.modules.update(ray=None, faiss=None); import cbir.features.networks.descriptor"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
