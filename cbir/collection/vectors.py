"""Vectors in Parquet that were made elsewhere: one row per image, a column of keys and a column of vectors.

A vector is a list of numbers (of any length type), or binary: its numbers as little-endian bytes, as in the feature
files of an index, whose columns are `key` and `descriptors`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbir.collection.parquet import check_column, explained, footer, is_key, opened
from cbir.collection.shard import ImageShard, InputSpec, Place
from cbir.errors import DataError
from cbir.storage import ObjectInfo, Store, open_store
from cbir.types import Array

__all__ = ["VectorRows", "count_vectors", "read_vectors"]

_BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class VectorRows:
    """Some rows of a file: `keys`, `vectors` (n, D), and for each row "" or the reason why it cannot be used."""

    at: Place
    """Of the first row; `start` counts on, `size` is that of each vector."""
    keys: list[str]
    vectors: Array
    reasons: list[str]


def count_vectors(store: Store, info: ObjectInfo, spec: InputSpec) -> int:
    """Rows of a file, from its footer. DataError if it is no Parquet file or lacks a column of the right type."""
    with explained(store, info.key), pq.ParquetFile(pa.BufferReader(footer(store, info))) as file:
        _check(file.schema_arrow, spec, store.place(info.key))
        return int(file.metadata.num_rows)


def read_vectors(shard: ImageShard, spec: InputSpec, dim: int, dtype: str) -> Iterator[VectorRows]:
    """Every row of a shard in the order of the file, as vectors of D = `dim` numbers of a numpy type.

    DataError if a key is null or empty, or the file cannot be read.
    """
    store, (info,) = open_store(shard.root), shard.objects
    num_bytes, start = dim * np.dtype(dtype).itemsize, 0
    with opened(store, info.key) as file:
        _check(file.schema_arrow, spec, store.place(info.key))
        columns, step = [spec.key_column, spec.vector_column], max(1, _BATCH_BYTES // num_bytes)
        for batch in file.iter_batches(step, columns=columns, use_threads=False):
            at = Place("vectors", info.key, start, num_bytes)
            yield VectorRows(
                at, _keys(batch.column(0), store.uri, at), *_vectors(batch.column(1), dim, np.dtype(dtype))
            )
            start += len(batch)


def _check(schema: pa.Schema, spec: InputSpec, uri: str) -> None:
    check_column(schema, uri, "key_column", spec.key_column, "text or integers", is_key)
    wanted = "lists of numbers, or binary"
    check_column(schema, uri, "vector_column", spec.vector_column, wanted, lambda found: _is_list(found) or _raw(found))


def _is_list(found: pa.DataType) -> bool:
    kinds = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    if not any(is_kind(found) for is_kind in kinds):
        return False
    return bool(pa.types.is_floating(found.value_type) or pa.types.is_integer(found.value_type))


def _raw(found: pa.DataType) -> bool:
    kinds = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary
    return any(is_kind(found) for is_kind in kinds)


def _keys(column: pa.Array, source: str, at: Place) -> list[str]:
    keys: list[str] = column.cast(pa.string()).to_pylist()
    missing = next((row for row, key in enumerate(keys) if not key), None)
    if missing is not None:
        place = Place(at.kind, at.object, at.start + missing, at.size)
        raise DataError(f"{place.describe(source, '')} has no key; every row of the key column needs one")
    return keys


def _vectors(column: pa.Array, dim: int, dtype: np.dtype[np.generic]) -> tuple[Array, list[str]]:
    """Vectors (n, D), zeros where there is none, and the reasons for that."""
    is_raw = _raw(column.type)
    lengths = pc.binary_length(column) if is_raw else pc.list_value_length(column)
    whole = pc.fill_null(pc.equal(lengths, dim * dtype.itemsize if is_raw else dim), fill_value=False)
    fitting = column.filter(whole)
    vectors = np.zeros((len(column), dim), dtype)
    is_whole = whole.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # what is too large for the type is infinite then
        vectors[is_whole] = _numbers(fitting, dtype).reshape(-1, dim)
    finite = np.isfinite(vectors).all(axis=1)
    vectors[~finite] = 0
    reasons = np.where(is_whole, np.where(finite, "", "not_finite"), "wrong_length")
    present: list[str] = np.where(column.is_valid().to_numpy(zero_copy_only=False), reasons, "no_vector").tolist()
    return vectors, present


def _numbers(column: pa.Array, dtype: np.dtype[np.generic]) -> Array:
    """All numbers of vectors without nulls."""
    if not _raw(column.type):
        numbers: Array = column.flatten().to_numpy(zero_copy_only=False)
        return numbers
    if pa.types.is_fixed_size_binary(column.type):
        return np.frombuffer(column.buffers()[1] or b"", dtype, len(column) * column.type.byte_width // dtype.itemsize)
    return np.frombuffer(b"".join(column.to_pylist()), dtype)
