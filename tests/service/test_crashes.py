"""SIGKILL at every step of the commit protocol: the same command again gives the bytes of an undisturbed run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cbir.config import parse_config
from cbir.storage import open_store
from pipelines.indexing import index
from tests.service.runs import assert_goes_on_after_kill, stages_of

STAGES = ("extract", "sample", "codebook", "train", "build", "totals", "catalog", "merge", "evaluate")
FAILPOINTS = [
    *(f"{stage}.{what}.{when}" for stage in STAGES for what in ("part", "done") for when in ("before", "after")),
    *(f"publish.{what}.{when}" for what in ("manifest", "current") for when in ("before", "after")),
]

WORDS = {
    "extractor": {"name": "sift", "max_features": 60},
    "encoders": [{"name": "rootsift"}],
    "index": {"name": "asmk", "words": 8, "idf": True, "word_ranges": 2},
    "keep_features": True,
    "keep_signatures": True,
}
"""An inverted file: it passes through every stage there is."""

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def of_words(small_settings: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Plain settings of an inverted file of the small collection."""
    return functools.partial(small_settings, channels={"local": WORDS})


@pytest.fixture(scope="module")
def undisturbed(of_words: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of all stages after a run that nothing disturbs."""
    uri = str(tmp_path_factory.mktemp("undisturbed"))
    index(parse_config(of_words(uri), "the reference"))
    return stages_of(open_store(uri))


@pytest.fixture(params=["file", "moto"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store."""
    if request.param == "file":
        return str(tmp_path / "store")
    return f"s3://{request.getfixturevalue('moto_bucket')}/store"


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_killed_driver_goes_on_where_it_was(
    failpoint: str,
    store_uri: str,
    of_words: Callable[..., dict[str, Any]],
    undisturbed: dict[str, str],
) -> None:
    assert_goes_on_after_kill(of_words(store_uri), failpoint, undisturbed)


def test_a_worker_killed_in_every_stage_is_replaced(
    of_words: Callable[..., dict[str, Any]],
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [f"{stage}.done.before={tmp_path / stage}" for stage in STAGES]
    monkeypatch.setenv("CBIR_FAILPOINT", ",".join(points))
    manifest = index(parse_config(of_words(str(tmp_path / "store"), workers=2), "on Ray"))
    assert all((tmp_path / stage).exists() for stage in STAGES), "a worker died in every stage"
    assert manifest.version == 1
    assert stages_of(open_store(str(tmp_path / "store"))) == undisturbed
