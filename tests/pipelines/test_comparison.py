"""`cbir evaluate` over several configurations: one table, whatever happens to one of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cbir.config import load_config
from pipelines.cli import app
from pipelines.comparison import candidates
from pipelines.indexing import index

Settings = Callable[..., dict[str, Any]]
NO_RERANKING = {"depth": 50}


def cbir(*arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def configs(settings: Settings, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three indexed configurations, two of which share a store, and three that cannot be measured."""
    root = tmp_path_factory.mktemp("comparison")
    truth = {"probes": 0, "ground_truth": str(folder / "truth.csv")}
    shared, own = {"store": str(root / "shared"), "evaluate": truth}, {"store": str(root / "own"), "evaluate": truth}
    small = settings()["channels"]["local"]
    tiny = {"local": small | {"encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 1}]}}
    written = {
        "b_verified": settings(**shared),
        "a_plain": settings(**shared, search=NO_RERANKING),
        "deeper/tiny": settings(**own, channels=tiny, search=NO_RERANKING),
        "unbuilt": settings(**shared, sample={"seed": 7}),
        "nowhere": settings(store=str(root / "nowhere"), evaluate=truth),
    }
    for name, content in written.items():
        path = root / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        if name in {"b_verified", "a_plain", "deeper/tiny"}:
            index(load_config(path))
    (root / "configs" / "misspelt.yml").write_text(yaml.safe_dump(written["b_verified"] | {"chanels": {}}))
    return root / "configs"


@pytest.fixture(scope="module")
def compared(configs: Path) -> tuple[Result, dict[str, Any], str]:
    """The whole folder: the outcome, the JSON by name, and the page."""
    target, report = configs.parent / "figures.json", configs.parent / "report"
    result = cbir("evaluate", configs, "--before-reranking", "--json", target, "--report", report)
    rows = {row["name"]: row for row in json.loads(target.read_text())["configurations"]}
    assert json.loads((report / "comparison.json").read_text()) == json.loads(target.read_text())
    return result, rows, (report / "comparison.html").read_text()


def test_every_configuration_is_a_row_and_a_bad_one_stops_none(compared: tuple[Result, dict[str, Any], str]) -> None:
    result, rows, page = compared
    assert result.exit_code == 1
    assert list(rows) == ["a_plain", "b_verified", "deeper/tiny", "misspelt", "nowhere", "unbuilt"]
    lines = {words[0]: line for line in result.stdout.splitlines() if (words := line.split())}
    for name in ("a_plain", "b_verified", "deeper/tiny"):
        assert rows[name]["error"] == ""
        assert f"{rows[name]['figures']['map']:.3f}" in lines[name]
        assert name in page
    for name, message in {
        "misspelt": "unknown key 'chanels'",
        "nowhere": "no published version",
        "unbuilt": "no version of this configuration (the current one has other settings of sample, search)",
    }.items():
        assert message in rows[name]["error"]
        assert name in lines
        assert message.split()[0] in result.stdout
        assert rows[name]["figures"] is None
    assert "3 of 6 could not be measured" in result.stderr


def test_configurations_that_share_a_store_are_measured_on_their_own_versions(
    compared: tuple[Result, dict[str, Any], str],
) -> None:
    rows = compared[1]
    assert (rows["b_verified"]["version"], rows["a_plain"]["version"]) == (1, 2)
    assert rows["b_verified"]["before"]["map"] == rows["a_plain"]["figures"]["map"]
    assert rows["a_plain"]["before"] is None


def test_before_and_after_are_of_one_pass(compared: tuple[Result, dict[str, Any], str]) -> None:
    verified = compared[1]["b_verified"]
    assert verified["figures"]["map"] > verified["before"]["map"]
    assert verified["figures"]["median_ms"] > verified["before"]["median_ms"] > 0


def test_bytes_are_those_of_the_index_and_of_what_re_ranking_reads(
    compared: tuple[Result, dict[str, Any], str],
) -> None:
    rows = compared[1]
    assert rows["a_plain"]["index_bytes"] == pytest.approx(8 * 128 * 4, rel=0.05)
    assert rows["deeper/tiny"]["index_bytes"] == pytest.approx(128 * 4, rel=0.25)
    assert rows["b_verified"]["feature_bytes"] > 1000


def test_the_figures_are_those_of_one_alone(
    compared: tuple[Result, dict[str, Any], str], configs: Path, tmp_path: Path
) -> None:
    options = ["--before-reranking", "--json", tmp_path / "one.json", "--report", tmp_path]
    done = cbir("evaluate", configs.parent / "shared", "--version", 1, "--ground-truth", truth_of(configs), *options)
    assert done.exit_code == 0, done.stderr
    alone, row = json.loads((tmp_path / "one.json").read_text()), compared[1]["b_verified"]
    for figures, found in ((alone, row["figures"]), (alone["before_reranking"], row["before"])):
        assert (figures["map"], figures["mp_at_10"]) == (found["map"], found["mp_at_10"])
    assert "before re-ranking" in done.stdout
    assert (tmp_path / "report.html").exists()


def truth_of(configs: Path) -> str:
    return str(load_config(configs / "a_plain.yaml").evaluate.ground_truth)


def test_stores_and_configurations_can_be_mixed(configs: Path, tmp_path: Path) -> None:
    chosen = [configs / "b_verified.yaml", configs.parent / "own"]
    options = ["--ground-truth", truth_of(configs), "--report", tmp_path]
    done = cbir("evaluate", *chosen, *options)
    assert done.exit_code == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["configuration", "b_verified", str(configs.parent / "own"), str(tmp_path / "comparison.html")]
    assert "before" not in done.stdout


def test_a_version_cannot_be_asked_of_several(configs: Path) -> None:
    done = cbir("evaluate", configs, "--version", 1)
    assert done.exit_code == 2
    assert "--version" in done.stderr


def test_configurations_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "vlad.yaml" for folder in ("day", "night")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    assert [candidate.name for candidate in candidates([str(path) for path in paths])] == list(map(str, paths))
    assert [candidate.name for candidate in candidates([str(tmp_path)])] == ["day/vlad", "night/vlad"]


def test_evaluate_measures_the_backgrounds_that_adaptive_fusion_takes(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    local = settings()["channels"]["local"]
    coarse = local | {"encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 2}]}
    path, target = tmp_path / "fused.yaml", tmp_path / "figures.json"
    fused = {"channels": {"local": local, "coarse": coarse}, "search": {"depth": 10, "fuse": {"name": "adaptive"}}}
    truth = {"probes": 0, "ground_truth": str(folder / "truth.csv")}
    path.write_text(yaml.safe_dump(settings(store=str(tmp_path / "store"), evaluate=truth, **fused)))
    index(load_config(path))
    done = cbir("evaluate", path, "--json", target, "--report", tmp_path)
    assert done.exit_code == 0, done.stderr
    found = json.loads(target.read_text())["backgrounds"]
    assert set(found) == {"local", "coarse"}
    assert 0 < found["local"] < found["coarse"] < 1, "two words cannot tell pictures apart as eight can"
    assert load_config(path, [f"search.fuse.backgrounds={json.dumps(found)}"]).search.fuse is not None
