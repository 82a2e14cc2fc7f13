"""Local features through the whole pipeline: an inverted file, verified by shared words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cbir
from cbir.config import Config, parse_config
from cbir.errors import ConfigError
from cbir.layout import Layout
from cbir.types import image_id
from cbir.versions import Manifest
from pipelines.estimates import estimate
from pipelines.indexing import index
from pipelines.query_pool import QueryPool
from pipelines.reporting import write_search
from pipelines.run import Run

CHANNEL = {
    "extractor": {"name": "sift", "max_features": 200},
    "encoders": [{"name": "rootsift"}],
    "index": {"name": "asmk", "words": 64, "word_ranges": 2},
    "keep_signatures": True,
}
FSM = {"name": "fsm", "channel": "local", "matches": "word", "top": 10}


@pytest.fixture(scope="module")
def of_words(
    settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Manifest]:
    """Settings of an index of visual words, and its version."""
    search = {"depth": 50, "rerank": [FSM]}
    store = str(tmp_path_factory.mktemp("words") / "store")
    data = settings(store=store, channels={"local": CHANNEL}, search=search)
    return data, index(parse_config(data, "the test"))


def test_views_of_an_object_are_found_and_verified(
    of_words: tuple[dict[str, Any], Manifest], pictures: dict[str, bytes], tmp_path: Path
) -> None:
    searcher = cbir.open(of_words[0]["store"])
    for number in range(8):
        results = searcher.search(pictures[f"object{number}/view0.jpg"], depth=5)
        assert {result.key.partition("/")[0] for result in results} == {f"object{number}"}
        assert results[0].key == f"object{number}/view0.jpg"
        assert all(result.score >= 6 for result in results), "inliers, by shared words"
    picture = pictures["object3/view1.jpg"]
    answer = searcher.answer([picture], depth=3)
    write_search(tmp_path / "page.html", searcher, picture, answer, None, "view1.jpg")
    assert (tmp_path / "page.html").read_text().count("<line") > 10


def test_the_published_files_are_plain_and_whole(of_words: tuple[dict[str, Any], Manifest]) -> None:
    data, manifest = of_words
    store, (part,) = Path(data["store"]), Layout.from_json(manifest.layout).partitions
    assert len(part.indexes["local"]) == 2
    assert manifest.quality["ann_recall"] == {}, "an inverted file compares exactly what it holds"
    words = set()
    for key in part.indexes["local"]:
        row = pa.ipc.open_file(store / key).read_all().to_pylist()[0]
        assert sum(row["counts"]) * 16 == len(row["codes"])
        assert len(row["begins"]) == len(row["words"]) + 1
        words |= set(row["words"])
    assert words <= set(range(64))
    assert part.signatures["local"] in {file.key for file in manifest.files}
    signatures = cbir.open(str(store)).signatures("local", np.array([image_id("object0/view0.jpg")]))
    assert signatures.words is not None
    assert signatures.descriptors.shape == (len(signatures.words), 16)


def test_a_query_pool_serves_it(of_words: tuple[dict[str, Any], Manifest], pictures: dict[str, bytes]) -> None:
    store, query = of_words[0]["store"], pictures["object5/view2.jpg"]
    with QueryPool(store, num_actors=1) as pool:
        assert pool.search(query, depth=5) == cbir.open(store).search(query, depth=5)


def test_inter_image_burstiness_is_the_same_over_partitions_and_in_a_pool(
    settings: Callable[..., dict[str, Any]], pictures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, found = pictures["object5/view2.jpg"], []
    for number, burst in ((1, "both"), (3, "both"), (1, "none")):
        monkeypatch.setattr(Run, "_num_partitions", lambda *_, number=number: number)
        he = {"name": "he", "words": 64, "bits": 64, "query_assignments": 2, "burst": burst}
        store = str(tmp_path / f"{burst}{number}")
        index(parse_config(settings(store=store, channels={"local": {**CHANNEL, "index": he}}, search={}), "the test"))
        found.append(cbir.open(store).search(query, depth=20))
        if number == 3:
            with QueryPool(store, num_actors=2) as pool:
                assert pool.search(query, depth=20) == found[-1]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert all(results[0].key == "object5/view2.jpg" for results in found)


def test_settings_of_the_kernel_do_not_train_the_codebook_again(config: Callable[..., Config], tmp_path: Path) -> None:
    books = tmp_path / "store" / "stages" / "codebook"
    index(config(channels={"local": CHANNEL}, search={}))
    before = sorted(books.iterdir())
    changed = {**CHANNEL, "index": {"name": "asmk", "words": 64, "alpha": 2.0, "idf": True}}
    assert index(config(channels={"local": changed}, search={})).version == 2
    assert sorted(books.iterdir()) == before
    index(config(channels={"local": {**CHANNEL, "index": {"name": "asmk", "words": 32}}}, search={}))
    assert len(list(books.iterdir())) == 2


def test_signatures_may_be_wanted_later(config: Callable[..., Config]) -> None:
    first = config(channels={"local": {**CHANNEL, "keep_signatures": False}}, search={})
    index(first)
    later = index(config(channels={"local": CHANNEL}, search={"rerank": [FSM]}))
    assert Layout.from_json(later.layout).partitions[0].signatures.keys() == {"local"}


def test_its_cost_is_estimated(of_words: tuple[dict[str, Any], Manifest]) -> None:
    stages = Path(of_words[0]["store"]) / "stages"
    kinds = ("extract", "build", "merge")
    used = sum(path.stat().st_size for kind in kinds for path in (stages / kind).rglob("part-*"))
    found = estimate(parse_config(of_words[0], "the test")).disk_bytes
    assert used / 2 < found < 2 * used


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        ({"keep_signatures": False}, "set channels.local.keep_signatures: true"),
        ({"encoders": [{"name": "rootsift"}, {"name": "vlad"}]}, "there is one descriptor per image"),
        ({"index": {"name": "rasmk"}}, "rasmk looks at the regions of an image, but nothing proposes any"),
        (
            {"index": {"name": "flat"}, "encoders": [{"name": "vlad"}]},
            "the index flat has no visual words; use keep_features",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    settings: Callable[..., dict[str, Any]], channel: dict[str, Any], message: str
) -> None:
    data = settings(store="elsewhere", channels={"local": CHANNEL | channel}, search={"rerank": [FSM]})
    with pytest.raises(ConfigError, match=message):
        parse_config(data, "the test")
