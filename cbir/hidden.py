"""Images that no result shows although they lie in the files of a version: deleted at once, without a merge.

A version names one file of them, which every partition reads. They were `asked` for, and stay hidden in all versions
until that is undone; or their files were `gone` when a re-index began, whose end drops them from the index itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cbir.types import Int64s, image_id

__all__ = ["Hidden"]

Reason = Literal["asked", "gone"]

_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Hidden:
    """Keys of hidden images, in order, by why they are hidden."""

    asked: Sequence[str] = ()
    gone: Sequence[str] = ()

    @classmethod
    def of(cls, asked: Iterable[str] = (), gone: Iterable[str] = ()) -> "Hidden":
        """These; who asks has the last word."""
        wanted = set(asked)
        return cls(sorted(wanted), sorted(set(gone) - wanted))

    @classmethod
    def read(cls, path: Path) -> "Hidden":
        """Those of a file of a version."""
        rows = pq.read_table(path).to_pylist()
        return cls(*([row["key"] for row in rows if row["reason"] == reason] for reason in ("asked", "gone")))

    def __len__(self) -> int:
        return len(self.asked) + len(self.gone)

    def table(self) -> pa.Table:
        """For a file: image_id, key and reason, by rising id."""
        rows = [(key, "asked") for key in self.asked] + [(key, "gone") for key in self.gone]
        columns = [[image_id(key) for key, _ in rows], [key for key, _ in rows], [reason for _, reason in rows]]
        return pa.table(columns, schema=_SCHEMA).sort_by("image_id")

    @staticmethod
    def ids(path: Path, low: int, high: int) -> Int64s:
        """The ids (N,) in a file that are from `low` to below `high`."""
        ids: Int64s = pq.read_table(path, columns=["image_id"]).column("image_id").to_numpy()
        return ids[(low <= ids) & (ids < high)]
