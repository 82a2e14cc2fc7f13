"""Broken, odd and hostile files among good photographs: each is indexed or in the ledger, in bounded memory."""

import csv
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cbir.layout import Layout
from cbir.search import Searcher, open_version
from cbir.storage import open_store
from cbir.verification import check_counts, check_files
from cbir.versions import Versions
from tests.collection_forms import write_parquet, write_tar

NUM_GOOD = 12
NUM_HOSTILE = 107
DECODER_MEGABYTES, WORKER_MEGABYTES = 500, 1000
POLL_S = 0.05

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def mixed(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every hostile file, and a few photographs that nothing is wrong with."""
    root = tmp_path_factory.mktemp("mixed")
    shutil.copytree(test_data / "corrupt" / "files", root / "hostile")
    (root / "good").mkdir()
    for photograph in sorted((test_data / "photos" / "distractors" / "images").iterdir())[:NUM_GOOD]:
        shutil.copy(photograph, root / "good")
    return root


@pytest.fixture(scope="module")
def what_pillow_does(test_data: Path) -> dict[str, tuple[str, str]]:
    """(kind, `ok` or the error) of every hostile file by its key."""
    with (test_data / "corrupt" / "manifest.csv").open(encoding="utf-8") as file:
        return {f"hostile/{row['file']}": (row["kind"], row["pillow_result"]) for row in csv.DictReader(file)}


@dataclass(frozen=True)
class Run:
    """How `cbir index` ended in a process of its own, and the largest memory of its processes by their part."""

    exit_code: int
    output: str
    megabytes: dict[str, float]


def run_index(config: Path, *arguments: str) -> Run:
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "index", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        peaks: Counter[str] = Counter()
        while process.poll() is None:
            for part, megabytes in peak_megabytes(process.pid):
                peaks[part] = max(peaks[part], megabytes)
            time.sleep(POLL_S)
        assert process.stdout is not None
        return Run(process.returncode, process.stdout.read(), dict(peaks))


def peak_megabytes(root: int) -> list[tuple[str, float]]:
    """The most that a process and its descendants have held at any time of their lives, from /proc."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended in the meantime
            continue
        parents[int(folder.name)] = int(status["PPid"])
        if "VmHWM" in status:
            found.append((int(folder.name), command, int(status["VmHWM"].split()[0]) / 1000))
    return [(part_of(command), peak) for pid, command, peak in found if descends(pid, root, parents)]


def descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid > 1 and pid != root:
        pid = parents.get(pid, 0)
    return pid == root


def part_of(command: str) -> str:
    if "_decode_child" in command:
        return "decoder"
    return "worker" if command.startswith("ray::") or "pipelines.cli" in command else "other"


def write_config(path: Path, images: Path, store: Path, **changes: Any) -> Path:
    channel = {
        "extractor": {"name": "sift", "max_features": 200},
        "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 8}],
        "index": {"name": "flat"},
    }
    settings = {
        "images": str(images),
        "store": str(store),
        "input": {"shard_images": 24},
        "channels": {"local": channel},
        "evaluate": {"probes": 0},
    }
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def ledger_of(searcher: Searcher, store: Path) -> dict[str, dict[str, Any]]:
    """The rows of the ledger by key."""
    tables = [pq.read_table(store / part.quarantine) for part in Layout.from_json(searcher.manifest.layout).partitions]
    rows = pa.concat_tables(tables).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


FORMS: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {"tar": write_tar, "parquet": write_parquet}


@pytest.mark.parametrize(("workers", "form"), [(2, "folder"), (0, "tar"), (0, "parquet")])
def test_every_file_is_indexed_or_in_the_ledger(
    workers: int, form: str, mixed: Path, what_pillow_does: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    images = mixed
    if form != "folder":
        files = {str(path.relative_to(mixed)): path.read_bytes() for path in sorted(mixed.rglob("*")) if path.is_file()}
        images = FORMS[form](tmp_path / f"images.{form}", files)
    config = write_config(tmp_path / "config.yaml", images, tmp_path / "store", workers=workers)
    run = run_index(config)
    assert run.exit_code == 0, run.output

    searcher = open_version(str(tmp_path / "store"))
    indexed, ledger = set(searcher.keys().values()), ledger_of(searcher, tmp_path / "store")
    files = {str(path.relative_to(mixed)) for path in mixed.rglob("*") if path.is_file()}
    assert len(files) == NUM_HOSTILE + NUM_GOOD
    assert indexed | ledger.keys() == files
    assert not indexed & ledger.keys()
    counts = searcher.manifest.counts
    assert (counts["images"], counts["indexed"], counts["quarantined"]) == (len(files), len(indexed), len(ledger))
    check_files(open_store(str(tmp_path / "store")), searcher.manifest)
    check_counts(searcher, searcher.manifest)

    assert {key for key in files if key.startswith("good/")} <= indexed
    assert {key for key, (kind, _) in what_pillow_does.items() if kind.startswith("ok_")} <= indexed
    assert {key for key, (_, result) in what_pillow_does.items() if result != "ok"} <= ledger.keys()
    assert all(row["reason"] and row["num_bytes"] == (mixed / key).stat().st_size for key, row in ledger.items())

    assert 0 < run.megabytes["decoder"] < DECODER_MEGABYTES
    assert 0 < run.megabytes["worker"] < WORKER_MEGABYTES

    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "stages").rglob("*") if path.is_file()}
    again = run_index(config)
    assert again.exit_code == 0, again.output
    assert stages == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "stages").rglob("*") if path.is_file()
    }
    assert Versions(open_store(str(tmp_path / "store"))).numbers() == [1]


def test_too_many_bad_files_stop_the_run(mixed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", mixed, tmp_path / "store", max_bad=0.1, workers=0)
    run = run_index(config)
    assert run.exit_code == 1
    assert "more than max_bad = 0.1" in " ".join(run.output.split())
    assert Versions(open_store(str(tmp_path / "store"))).current() is None

    config = write_config(tmp_path / "config.yaml", mixed, tmp_path / "store", max_bad=0.5, workers=0)
    allowed = run_index(config)
    assert allowed.exit_code == 0, allowed.output
    assert "extract   tasks 5/5  reused 5" in allowed.output
