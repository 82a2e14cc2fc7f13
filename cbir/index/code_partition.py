"""What the indexes share that keep one short code per vector and nothing else."""

from abc import abstractmethod
from typing import ClassVar, Self

import faiss
import numpy as np
import pyarrow as pa

from cbir.index.dense import DensePartition, code_column, codes_of, stored_order
from cbir.types import Int64s, Pixels

__all__ = ["CodePartition", "code_entries"]


class CodePartition(DensePartition):
    """One partition of codes (n, B) uint8 and their images (n,), in the order of the images.

    Both are views into the faiss index, so that a mapped file stays on the disk until it is searched.
    """

    meaning: ClassVar[str]
    """What the bytes of a code are, for readers of the entries."""

    def __init__(self, index: faiss.Index, image_ids: Int64s, codes: Pixels) -> None:
        super().__init__(index, index.d)
        self._ids, self._codes = image_ids, codes

    def entries(self) -> pa.Table:
        """The codes and their images, a copy that may outlive the partition."""
        return code_entries(self._ids.copy(), self._codes.copy(), self.meaning)

    def with_entries(self, entries: pa.Table) -> Self:
        """A partition of these codes."""
        ids = entries.column("image_id").to_numpy()
        codes = codes_of(entries, np.uint8, self._codes.shape[1])
        order = stored_order(np.zeros(len(ids), np.int8), ids, codes)
        return self.of_codes(ids[order], codes[order])

    @abstractmethod
    def of_codes(self, image_ids: Int64s, codes: Pixels) -> Self:
        """A partition of these codes, which are in stored order, with the trained parts of this one."""


def code_entries(image_ids: Int64s, codes: Pixels, meaning: str) -> pa.Table:
    """One row per vector: image_id int64, code fixed_size_binary[B]."""
    schema = pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("code", pa.binary(codes.shape[1]), nullable=False),
        ],
        metadata={"code": meaning, "bytes": str(codes.shape[1])},
    )
    return pa.table([pa.array(image_ids), code_column(codes)], schema=schema)
