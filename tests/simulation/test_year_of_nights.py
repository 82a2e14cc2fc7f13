"""Many nights of one index: random changes, other shards, other models, power cuts, roll-backs and clean-ups.

Small vectors, and the real code from the listing to the published version. After each night the index must hold what a
plain dictionary holds. CBIR_NIGHTS=365 makes it a year [4 minutes], CBIR_SEED another one; a failure names both.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbir.config import Config, parse_config
from cbir.errors import CbirError
from cbir.garbage import sweep
from cbir.search import Searcher, searcher_of
from cbir.storage import open_store
from cbir.storage.local import LocalStore
from cbir.types import Floats
from cbir.verification import check_counts, check_files
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.reindex import reindex

NIGHTS = int(os.environ.get("CBIR_NIGHTS", "30"))
SEED = int(os.environ.get("CBIR_SEED", "20261121"))
DIM, START, KEPT = 8, 60, 3
MODELS: tuple[dict[str, Any], ...] = (
    {"name": "flat"},
    {"name": "ivfpq", "lists": 4, "bytes": 8, "bits": 4, "probes": 4, "iterations": 2},
    {"name": "ivfflat", "lists": 3, "probes": 3, "iterations": 2},
    {"name": "hnsw"},
)


class PowerCut(BaseException):
    """Nothing that the process does from here on reaches the store."""


@dataclass
class Power:
    """Fails after so many changes of the store, and stays away until it is back."""

    left: float = np.inf

    def use(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PowerCut


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> Iterator[Power]:
    power = Power()
    for name in ("write", "create", "swap", "delete"):
        real = getattr(LocalStore, name)

        def guarded(*given: Any, real: Any = real, **named: Any) -> Any:
            power.use()
            return real(*given, **named)

        monkeypatch.setattr(LocalStore, name, guarded)
    return power


@dataclass
class World:
    """The collection as it is, and what every version held when it was published."""

    folder: Path
    rng: np.random.Generator
    vectors: dict[str, Floats] = field(default_factory=dict)
    shards: int = 4
    model: int = 0
    published: dict[int, dict[str, Floats]] = field(default_factory=dict)
    made: int = 0

    def vector(self) -> Floats:
        return self.rng.standard_normal(DIM).astype(np.float32)

    def change(self) -> None:
        """A day passes."""
        for _ in range(self.rng.integers(0, 6)):
            self.vectors[f"k{self.made}"] = self.vector()
            self.made += 1
        for key in self.some(6):
            self.vectors[key] = self.vector()
        for key in self.some(6) if len(self.vectors) > START // 2 else []:
            del self.vectors[key]
        if self.rng.random() < 0.1:
            self.shards = int(self.rng.integers(1, 7))
        if self.rng.random() < 0.05:
            self.model = int(self.rng.integers(len(MODELS)))
        self.write()

    def some(self, most: int) -> list[str]:
        return [str(key) for key in self.rng.choice(list(self.vectors), self.rng.integers(0, most), replace=False)]

    def write(self) -> None:
        """The collection as files; those that are what they were are left alone, as a night's crawl would."""
        keys = list(self.vectors)
        wanted = {f"{number}.parquet": keys[number :: self.shards] for number in range(self.shards)}
        for path in self.images.glob("*.parquet"):
            if path.name not in wanted:
                path.unlink()
        for name, some in wanted.items():
            table = pa.table({"key": some, "vector": [self.vectors[key] for key in some]})
            path = self.images / name
            if not path.exists() or pq.read_table(path).to_pydict() != table.to_pydict():
                pq.write_table(table, path)

    @property
    def images(self) -> Path:
        return self.folder / "vectors"

    @property
    def config(self) -> Config:
        channel = {"extractor": {"name": "vectors", "dim": DIM}, "index": MODELS[self.model] | {"metric": "l2"}}
        settings = {
            "images": str(self.images),
            "store": str(self.folder / "store"),
            "input": {"format": "vectors"},
            "channels": {"given": channel},
            "evaluate": {"probes": 5},
            "partition_megabytes": 1,
            "workers": 0,
        }
        return parse_config(settings, "the test")

    @property
    def versions(self) -> Versions:
        return Versions(open_store(self.config.store))

    def searcher(self) -> Searcher:
        return searcher_of(self.versions.store, self.versions.load())

    def check(self) -> None:
        """The current version is whole, and holds what it held when it was published."""
        manifest = self.versions.load()
        held, searcher = self.published[manifest.version], self.searcher()
        check_files(self.versions.store, manifest)
        check_counts(searcher, manifest)
        assert set(searcher.keys().values()) == set(held)
        for key in self.rng.choice(list(held), 3):
            found = searcher.search(held[str(key)], depth=len(held))
            assert {result.key for result in found} == set(held)
            assert searcher.config.channels["given"].index.name == "ivfpq" or found[0].key == key

    def stored(self) -> int:
        return sum(path.stat().st_size for path in (self.folder / "store" / "stages").rglob("*") if path.is_file())


def test_after_every_night_the_index_holds_what_the_collection_does(power: Power, tmp_path: Path) -> None:
    world = World(tmp_path, np.random.default_rng(SEED))
    world.images.mkdir()
    world.vectors = {f"s{number}": world.vector() for number in range(START)}
    for night in range(NIGHTS):
        try:
            one_night(world, power)
        except (AssertionError, PowerCut, CbirError) as error:
            raise AssertionError(f"seed {SEED}, night {night}: {error}") from error
    stored = world.stored()
    shutil.rmtree(world.config.store)
    index(world.config)
    assert stored < (KEPT + 2) * world.stored(), "what the kept versions need, and no more"


def one_night(world: World, power: Power) -> None:
    """Changes, a re-index that the power may cut short, a look, now and then a roll-back, a clean-up."""
    world.change()
    power.left = world.rng.integers(0, 80) if world.rng.random() < 0.2 else np.inf
    before = current(world)
    try:
        note(world, reindex(world.config).manifest.version)
    except PowerCut:
        power.left = np.inf
        if current(world) != before:  # the swap was the last thing that reached the store
            note(world, current(world))
    power.left = np.inf
    if not current(world):
        return
    world.check()
    numbers = world.versions.numbers()
    if world.rng.random() < 0.05:
        world.versions.rollback(int(world.rng.choice(numbers)))
        world.check()
    with world.versions.writing("the test") as held:
        list(sweep(world.versions, KEPT, held))
    world.check()
    assert len(world.versions.numbers()) <= KEPT + 1


def current(world: World) -> int:
    """The version that readers follow, 0 if there is none."""
    found = world.versions.current()
    return found.version if found else 0


def note(world: World, version: int) -> None:
    world.published[version] = dict(world.vectors)
