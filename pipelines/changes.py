"""Stage `changes`: which images of a partition are new, changed, gone or moved since the version before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from cbir.artifacts import Done, StoredFile
from cbir.layout import IDS_SCHEMA, IdMap, Layout
from cbir.spec import fingerprint
from cbir.versions import Manifest
from pipelines.known import digests_of
from pipelines.work import Task, Worker

__all__ = ["ChangesTask", "image_changes"]


@dataclass(frozen=True)
class ChangesTask(Task):
    """Compare the id map of one partition with those of the version before, whatever its partitions were.

    The record counts images: `added`, `changed` (other bytes under the same key), `deleted`, `moved` (the same bytes in
    another object) and `same`.
    """

    stage: ClassVar[str] = "changes"
    low: int
    high: int
    before: tuple[StoredFile, ...]
    now: StoredFile

    @classmethod
    def of(cls, low: int, high: int, before: Sequence[StoredFile], now: StoredFile) -> "ChangesTask":
        """The task of one range of ids; `before` are the id maps with ids in it, `now` is the one of this range."""
        identity = fingerprint("changes", low, high, sorted(file.sha256 for file in before), now.sha256)
        return cls(f"changes from {low:016x}", identity, low, high, tuple(before), now)

    def run(self, worker: Worker) -> Done:
        """Match the ids, compare bytes and places."""
        with worker.timer.phase("read"):
            old = pa.concat_tables([IDS_SCHEMA.empty_table(), *(self._read(worker, file) for file in self.before)])
            new = self._read(worker, self.now)
        old_ids, new_ids = (table.column("image_id").to_numpy() for table in (old, new))
        both, in_old, in_new = np.intersect1d(old_ids, new_ids, assume_unique=True, return_indices=True)
        then, now = old.take(in_old), new.take(in_new)
        is_changed = digests_of(then) != digests_of(now)
        is_moved = ~is_changed & np.array(_places(then) != _places(now))
        counts = {
            "added": len(new_ids) - len(both),
            "changed": int(is_changed.sum()),
            "deleted": len(old_ids) - len(both),
            "moved": int(is_moved.sum()),
            "same": int((~is_changed & ~is_moved).sum()),
        }
        return self.finish(worker, [], counts)

    def _read(self, worker: Worker, file: StoredFile) -> pa.Table:
        """The rows in the range; the file is mapped."""
        ids = IdMap(worker.fetch(file.key, file.sha256))
        first, last = np.searchsorted(ids.image_ids, [self.low, self.high])
        return ids.table.slice(first, last - first)


def _places(rows: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    places: np.ndarray[tuple[int], np.dtype[np.object_]] = rows.column("object").to_numpy()
    return places


def image_changes(before: Manifest, now: Manifest) -> tuple[list[ChangesTask], int]:
    """The tasks that compare two versions, one per partition of the second whose id map is another than before, and how
    many images the other partitions hold, which are the same."""
    files: Mapping[str, StoredFile] = {file.key: file for file in (*before.files, *now.files)}
    old, new = (Layout.from_json(manifest.layout).partitions for manifest in (before, now))
    known = {(part.low, part.high, files[part.ids].sha256) for part in old}
    tasks, same = [], 0
    for part in new:
        if (part.low, part.high, files[part.ids].sha256) in known:
            same += part.num_images
        else:
            earlier = [files[other.ids] for other in old if other.low < part.high and other.high > part.low]
            tasks.append(ChangesTask.of(part.low, part.high, earlier, files[part.ids]))
    return tasks, same
