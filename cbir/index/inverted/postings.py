"""The file of an inverted index: the postings of some words in one partition, in plain, memory-mapped columns.

An Arrow IPC file with one row, whose columns are arrays (`pyarrow.ipc.open_file(path).read_all()` opens it):

    image_ids   list<int64>    (N,) the images, rising; a posting names one by its number in this list
    masses      list<double>   (N,) what these words add to S'(X, X) of the image (for BM25, to its length)
    words       list<int32>    (V,) the words that have postings, rising
    counts      list<int32>    (V,) how many postings each has
    begins      list<int64>    (V + 1,) where the gaps of each word begin in `gaps`
    gaps        binary         image numbers of each word as gaps to the one before (the first: to 0), LEB128
    codes       binary         the codes of all postings, word by word, `code_bytes` (schema metadata) each
    geometry    binary         angle and scale of all postings, a byte each (`consistency` says in which units); only in
                               an index with `geometry: true`
    weights     list<double>   (W,) the weight of every word of the codebook, over the whole collection
    mean_length double         mean number of features of an image, over the whole collection
    dim         int32          D of the vectors that the codes stand for
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cbir.errors import ArtifactError
from cbir.index.inverted.consistency import NUM_COLUMNS
from cbir.types import Array, Int32s, Int64s, Pixels

__all__ = ["Slice", "read_slice", "write_slice"]

_COLUMNS: Mapping[str, pa.DataType] = {
    "image_ids": pa.large_list(pa.int64()),
    "masses": pa.large_list(pa.float64()),
    "words": pa.large_list(pa.int32()),
    "counts": pa.large_list(pa.int32()),
    "begins": pa.large_list(pa.int64()),
    "gaps": pa.large_binary(),
    "codes": pa.large_binary(),
    "weights": pa.large_list(pa.float64()),
    "mean_length": pa.float64(),
    "dim": pa.int32(),
}


@dataclass(frozen=True)
class Slice:
    """The postings of some words; the columns above as arrays, `codes` as (n, width), `geometry` as (n, 2) or, without
    any, (n, 0), `starts` (V + 1,) into them."""

    image_ids: Int64s
    masses: npt.NDArray[np.float64]
    words: Int32s
    starts: Int64s
    begins: Int64s
    gaps: Pixels
    codes: Array
    geometry: Pixels
    weights: npt.NDArray[np.float64]
    mean_length: float
    dim: int

    def slots(self, words: Int32s) -> Int64s:
        """Where these words stand in `words`, -1 for those without postings."""
        if not len(self.words):
            return np.full(len(words), -1, np.int64)
        at = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
        return np.where(self.words[at] == words, at, -1)


def write_slice(path: Path, part: Slice) -> None:
    """Write the file; equal postings give equal bytes."""
    values = [
        _list(part.image_ids),
        _list(part.masses),
        _list(part.words),
        _list(np.diff(part.starts).astype(np.int32)),
        _list(part.begins),
        _binary(part.gaps),
        _binary(part.codes),
        _list(part.weights),
        pa.array([part.mean_length]),
        pa.array([part.dim], pa.int32()),
    ]
    columns = dict(_COLUMNS)
    if part.geometry.shape[1]:
        columns["geometry"] = pa.large_binary()
        values.append(_binary(part.geometry))
    metadata = {"code_dtype": part.codes.dtype.name, "code_bytes": str(part.codes.shape[1] * part.codes.itemsize)}
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    schema = pa.schema(fields, metadata=metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(values, schema=schema))


def _list(values: Array) -> pa.LargeListArray:
    items = pa.field("item", pa.from_numpy_dtype(values.dtype))
    return pa.LargeListArray.from_arrays(
        pa.array([0, len(values)], pa.int64()), pa.array(np.ascontiguousarray(values)), type=pa.large_list(items)
    )


def _binary(values: Array) -> pa.LargeBinaryArray:
    flat = np.ascontiguousarray(values)
    offsets = np.array([0, flat.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(flat)])


def read_slice(path: Path) -> Slice:
    """Map the file: postings stay on the disk until they are searched. ArtifactError if it is no such file."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{path}: not a whole Arrow file ({error}); run `cbir verify`") from None
    missing = _COLUMNS.keys() - set(table.schema.names)
    if missing or table.num_rows != 1:
        raise ArtifactError(f"{path}: is no inverted file: {table.num_rows} rows, without {', '.join(sorted(missing))}")
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    dtype = np.dtype(metadata["code_dtype"])
    codes = _bytes(table, "codes").view(dtype).reshape(-1, int(metadata["code_bytes"]) // dtype.itemsize)
    return Slice(
        image_ids=_values(table, "image_ids"),
        masses=_values(table, "masses"),
        words=_values(table, "words"),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(_values(table, "counts"), dtype=np.int64)]),
        begins=_values(table, "begins"),
        gaps=_bytes(table, "gaps"),
        codes=codes,
        geometry=_geometry(table, len(codes)),
        weights=_values(table, "weights"),
        mean_length=table.column("mean_length")[0].as_py(),
        dim=table.column("dim")[0].as_py(),
    )


def _geometry(table: pa.Table, num: int) -> Pixels:
    if "geometry" not in table.schema.names:
        return np.empty((num, 0), np.uint8)
    return _bytes(table, "geometry").reshape(num, NUM_COLUMNS)


def _values(table: pa.Table, name: str) -> Array:
    values: Array = table.column(name).chunk(0).values.to_numpy(zero_copy_only=True)
    return values


def _bytes(table: pa.Table, name: str) -> Pixels:
    column = table.column(name).chunk(0)
    size = len(column[0].as_buffer())
    return np.frombuffer(column[0].as_buffer(), np.uint8, size)
