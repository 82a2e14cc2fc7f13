"""The plan of a run: the shards of the collection, stored with the version that is made of them, and what has changed
between two plans."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa

from cbir.artifacts import Done, StoredFile, create_done, find_done, put_part
from cbir.collection import ImageShard, list_shards
from cbir.config import Config
from cbir.errors import DataError
from cbir.spec import fingerprint
from cbir.storage import ObjectInfo, Store
from pipelines.tables import open_parquet, parquet_bytes

__all__ = ["Changes", "Difference", "plan", "read_plan", "store_plan"]

_STAGE = "plan"

_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("root", pa.string(), nullable=False),
        pa.field("columns", pa.list_(pa.string()), nullable=False),
        pa.field("num_images", pa.int64()),
        pa.field("content", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("tag", pa.string(), nullable=False),
    ]
)
"""One row per object; the rows of a shard, which has a number, are neighbours."""


def plan(config: Config) -> list[ImageShard]:
    """The image shards of the collection; DataError if there are none."""
    shards = list(list_shards(config.images, config.input))
    if not shards:
        raise DataError(f"no images under {', '.join(config.images)}")
    return shards


def store_plan(store: Store, shards: Sequence[ImageShard]) -> Done:
    """The record of a plan, whose file has the role `plan`."""
    identity = fingerprint(_STAGE, [shard.identity for shard in shards])
    done = find_done(store, _STAGE, identity)
    if done is None:
        file = put_part(store, _STAGE, identity, "plan", parquet_bytes(_table(shards)), "parquet")
        done = create_done(store, Done(_STAGE, identity, (file,), {"shards": len(shards)}))
    return done


def _table(shards: Sequence[ImageShard]) -> pa.Table:
    rows = [(number, shard, info) for number, shard in enumerate(shards) for info in shard.objects]
    columns = {
        "number": [number for number, _, _ in rows],
        "shard": [shard.name for _, shard, _ in rows],
        "kind": [shard.kind for _, shard, _ in rows],
        "source": [shard.source for _, shard, _ in rows],
        "root": [shard.root for _, shard, _ in rows],
        "columns": [list(shard.columns) for _, shard, _ in rows],
        "num_images": [shard.num_images for _, shard, _ in rows],
        "content": [shard.content for _, shard, _ in rows],
        "key": [info.key for _, _, info in rows],
        "size": [info.size for _, _, info in rows],
        "tag": [info.tag for _, _, info in rows],
    }
    return pa.table(columns, schema=_SCHEMA)


def read_plan(store: Store, file: StoredFile) -> list[ImageShard]:
    """The shards of a stored plan."""
    rows = open_parquet(store, file).read().to_pylist()
    return [_shard(list(some)) for _, some in groupby(rows, itemgetter("number"))]


def _shard(rows: Sequence[dict[str, Any]]) -> ImageShard:
    objects = tuple(ObjectInfo(row["key"], row["size"], row["tag"]) for row in rows)
    first, own = rows[0], ("kind", "source", "root", "num_images", "content")
    return ImageShard(
        name=first["shard"], objects=objects, columns=tuple(first["columns"]), **{name: first[name] for name in own}
    )


@dataclass(frozen=True)
class Changes:
    """What differs between the plan of a version and that of now, as far as a listing tells.

    Of files in folders it tells all. Which images of a tar or a Parquet file changed is known when it has been read.
    """

    shards: Sequence[ImageShard]
    """Shards of now that are new or changed, so that they are read."""
    unchanged: int
    """Shards of now that are as they were."""
    files: "Difference"
    """Image files by themselves."""
    containers: "Difference"
    """Tars and Parquet files."""
    gone: Sequence[str]
    """Keys of image files that are deleted."""
    regrouped: int
    """Image files that are as they were, in another group of files: read, but known."""

    @classmethod
    def between(cls, before: Sequence[ImageShard], now: Sequence[ImageShard]) -> "Changes":
        """From one plan to another."""
        known = {shard.identity for shard in before}
        changed = [shard for shard in now if shard.identity not in known]
        old, new = _files(before), _files(now)
        regrouped = sum(key in old and old[key][0] == info and old[key][1] != name for key, (info, name) in new.items())
        files = Difference.between({key: info for key, (info, _) in old.items()}, {k: i for k, (i, _) in new.items()})
        containers = Difference.between(_containers(before), _containers(now))
        gone = sorted(old.keys() - new.keys())
        return cls(changed, len(now) - len(changed), files, containers, gone, regrouped)

    def lines(self) -> Iterator[str]:
        """In words."""
        if self.files:
            yield f"image files: {self.files}, {self.regrouped:,} in other groups than before"
        if self.containers:
            yield f"tars and Parquet files: {self.containers}; which of their images changed shows when they are read"
        size = sum(shard.num_bytes for shard in self.shards)
        yield f"{len(self.shards):,} of {len(self.shards) + self.unchanged:,} shards to read, {size / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Difference:
    """How many objects are new, have changed, are gone, or are as they were."""

    added: int
    changed: int
    deleted: int
    same: int

    @classmethod
    def between(cls, before: Mapping[str, ObjectInfo], now: Mapping[str, ObjectInfo]) -> "Difference":
        """Objects by key."""
        both = before.keys() & now.keys()
        same = sum(before[key] == now[key] for key in both)
        return cls(len(now) - len(both), len(both) - same, len(before) - len(both), same)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.deleted or self.same)

    def __str__(self) -> str:
        return f"{self.added:,} added, {self.changed:,} changed, {self.deleted:,} deleted, {self.same:,} as they were"


def _files(shards: Sequence[ImageShard]) -> dict[str, tuple[ObjectInfo, str]]:
    """Image files by key, each with the name of its group."""
    return {info.key: (info, shard.name) for shard in shards if shard.kind == "files" for info in shard.objects}


def _containers(shards: Sequence[ImageShard]) -> dict[str, ObjectInfo]:
    return {f"{shard.source}/{shard.name}": shard.objects[0] for shard in shards if shard.kind != "files"}
