"""Fixtures shared by all tests: real data, and a small collection of textured pictures with settings to index it."""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck
from PIL import Image, ImageFilter

from cbir.config import Config, parse_config

# No test is timed: a machine with other load would fail it.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

PROJECT = Path(__file__).resolve().parent.parent
NUM_OBJECTS, NUM_VIEWS = 8, 5


def pytest_configure() -> None:
    """Let tests interrupt what they start: a shell makes what it runs in the background ignore Ctrl-C, for good."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real photographs, weights and hostile files; tests that need it are skipped without it."""
    path = Path(os.environ.get("CBIR_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real test data at {path}; set CBIR_TEST_DATA")
    return path


def picture(rng: np.random.Generator, size: int = 160) -> Image.Image:
    """A picture with corners and blobs at several scales."""
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            ),
            np.float32,
        )
        for cells in (5, 14, 40)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def view(rng: np.random.Generator, image: Image.Image) -> bytes:
    """The picture seen again: turned a little, blurred, compressed."""
    turned = image.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    turned.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.8)))).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """Key -> file: 8 objects in 5 views, and two broken files."""
    rng = np.random.default_rng(7)
    files = {}
    for number in range(NUM_OBJECTS):
        image = picture(rng)
        for seen in range(NUM_VIEWS):
            files[f"object{number}/view{seen}.jpg"] = view(rng, image)
    files["broken/text.jpg"] = b"this is no picture"
    files["broken/cut.jpg"] = files["object0/view0.jpg"][:900]
    return files


@pytest.fixture(scope="session")
def folder(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as files, with a ground truth beside them."""
    root = tmp_path_factory.mktemp("collection")
    for key, data in pictures.items():
        path = root / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    rows = [f"{key},{key.partition('/')[0]},both" for key in pictures if key.startswith("object")]
    (root / "truth.csv").write_text("\n".join(["image,instance_id,role", *rows]) + "\n")
    (root / "images" / "truth.txt").write_text("a sidecar")
    return root


@pytest.fixture(scope="session")
def settings(folder: Path) -> Callable[..., dict[str, Any]]:
    """Plain settings of a small SIFT and VLAD index of the folder; keywords replace top-level keys."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "images": str(folder / "images"),
            "store": "unset",
            "input": {"shard_images": 8},
            "channels": {
                "local": {
                    "extractor": {"name": "sift", "max_features": 60},
                    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 8}],
                    "index": {"name": "flat"},
                    "keep_features": True,
                }
            },
            "search": {"depth": 50, "rerank": [{"name": "ransac", "channel": "local", "top": 10}]},
            "evaluate": {"probes": 10},
            "workers": 0,
        } | changes

    return make


@pytest.fixture
def config(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Config]:
    """A validated configuration whose store is a fresh folder."""

    def make(**changes: Any) -> Config:
        return parse_config(settings(store=str(tmp_path / "store")) | changes, "the test")

    return make
