"""SIGKILL at every step of the commit protocol: the same command again gives the bytes of an undisturbed run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cbir.config import parse_config
from cbir.storage import open_store
from pipelines.indexing import index
from tests.service.runs import assert_goes_on_after_kill, stages_of

STAGES = ("extract", "sample", "train", "build", "catalog", "merge", "evaluate")
FAILPOINTS = [
    *(f"{stage}.{what}.{when}" for stage in STAGES for what in ("part", "done") for when in ("before", "after")),
    *(f"publish.{what}.{when}" for what in ("manifest", "current") for when in ("before", "after")),
]

pytestmark = pytest.mark.service


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
    small_settings: Callable[..., dict[str, Any]],
    undisturbed: dict[str, str],
) -> None:
    assert_goes_on_after_kill(small_settings(store_uri), failpoint, undisturbed)


def test_a_worker_killed_in_every_stage_is_replaced(
    small_settings: Callable[..., dict[str, Any]],
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [f"{stage}.done.before={tmp_path / stage}" for stage in STAGES]
    monkeypatch.setenv("CBIR_FAILPOINT", ",".join(points))
    manifest = index(parse_config(small_settings(str(tmp_path / "store"), workers=2), "on Ray"))
    assert all((tmp_path / stage).exists() for stage in STAGES), "a worker died in every stage"
    assert manifest.version == 1
    assert stages_of(open_store(str(tmp_path / "store"))) == undisturbed
