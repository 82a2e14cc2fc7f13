"""Codebooks that were trained for another index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import cbir
from cbir.config import Config, parse_config
from cbir.errors import ConfigError
from cbir.layout import Layout
from cbir.versions import Manifest
from pipelines.estimates import estimate
from pipelines.indexing import index

SIFT = {"name": "sift", "max_features": 100}
LOCAL = {
    "extractor": SIFT,
    "encoders": [{"name": "rootsift"}],
    "index": {"name": "he", "words": 32, "idf": True},
}
DENSE = {
    "extractor": SIFT,
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 4}, {"name": "pca", "dim": 16}],
    "index": {"name": "ivfpq", "lists": 2, "bytes": 4, "bits": 4},
}
LATE = {"fuse": {"name": "late"}}


@pytest.fixture(scope="module")
def larger(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """The store of an index of all pictures, and its version."""
    store = str(tmp_path_factory.mktemp("larger") / "store")
    data = settings(store=store, channels={"local": LOCAL, "dense": DENSE}, search=LATE)
    return store, index(parse_config(data, "the test"))


@pytest.fixture
def some(pictures: dict[str, bytes], tmp_path: Path) -> str:
    """A folder with the pictures of three of the eight objects."""
    for key, data in pictures.items():
        if key.startswith(("object1/", "object2/", "object3/")):
            path = tmp_path / "some" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return str(tmp_path / "some")


def states(store: str | Path, manifest: Manifest, channel: str) -> list[bytes]:
    """The trained state of a channel."""
    layout = Layout.from_json(manifest.layout).channels[channel]
    return [(Path(store) / key).read_bytes() for key in (*layout.encoders, layout.index)]


def borrowed(trained: dict[str, Any], store: str, **more: Any) -> dict[str, Any]:
    return {**trained, "codebooks": {"store": store, **more}}


def test_encoders_and_indexes_are_taken_as_they_are(
    larger: tuple[str, Manifest], config: Callable[..., Config], some: str, tmp_path: Path
) -> None:
    store, manifest = larger
    channels = {"local": borrowed(LOCAL, store), "dense": borrowed(DENSE, store, version=1)}
    mine = index(config(images=some, channels=channels, search=LATE))
    assert mine.counts["indexed"] == 15
    for channel in channels:
        assert states(tmp_path / "store", mine, channel) == states(store, manifest, channel)
    assert not (tmp_path / "store" / "stages" / "codebook").exists(), "nothing was trained"
    found = cbir.open(str(tmp_path / "store")).search(Path(some, "object2/view0.jpg"), depth=5)
    assert {result.key.partition("/")[0] for result in found} == {"object2"}


def test_counts_are_those_of_the_own_collection(
    larger: tuple[str, Manifest], config: Callable[..., Config], some: str, tmp_path: Path
) -> None:
    mine = index(config(images=some, channels={"words": borrowed(LOCAL, larger[0], channel="local")}, search={}))
    assert states(tmp_path / "store", mine, "words") == states(larger[0], larger[1], "local")
    totals = next((tmp_path / "store" / "stages" / "totals").rglob("part-*"))
    assert load_file(totals)["images"].tolist() == [15]


def test_a_version_needs_nothing_of_the_index_that_it_was_trained_for(
    larger: tuple[str, Manifest], config: Callable[..., Config], some: str, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    index(config(images=some, store=str(first), channels={"local": LOCAL}, search={}))
    index(config(images=some, channels={"local": borrowed(LOCAL, str(first))}, search={}))
    first.rename(tmp_path / "gone")
    assert cbir.open(str(tmp_path / "store")).search(Path(some, "object1/view0.jpg"), depth=1)


@pytest.mark.parametrize(
    ("channel", "more", "message"),
    [
        ({}, {"version": 7}, r"channels\.words\.codebooks: .* has no version 7; published are: 1"),
        ({}, {"channel": "lokal"}, r"channels\.words\.codebooks\.channel: .* no channel 'lokal'; did you mean 'local'"),
        ({}, {"store": "/nowhere"}, r"channels\.words\.codebooks: .*no published version"),
        (
            {"index": {"name": "he", "words": 64, "idf": True}},
            {},
            r"was trained for another channel: index\.words is 64 here, 32 there",
        ),
        ({"extractor": {"name": "sift", "max_features": 99}}, {}, r"extractor\.max_features is 99 here, 100 there"),
        ({"encoders": []}, {}, r"encoders is \[\] here"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_done(
    larger: tuple[str, Manifest],
    config: Callable[..., Config],
    channel: dict[str, Any],
    more: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    other = {"store": larger[0], "channel": "local", **more}
    wrong = config(channels={"words": {**LOCAL, **channel, "codebooks": other}}, search={})
    with pytest.raises(ConfigError, match=message):
        index(wrong)
    assert not (tmp_path / "store" / "stages").exists()
    with pytest.raises(ConfigError, match=message):
        estimate(wrong)
