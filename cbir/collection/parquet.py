"""Images in Parquet: one row per image, a column of keys and a column of the bytes of image files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbir.collection.shard import InputSpec, Place, RawImage
from cbir.errors import DataError
from cbir.spec import nearest
from cbir.storage import ObjectInfo, Store

__all__ = ["check_column", "count_rows", "explained", "footer", "is_key", "opened", "read_parquet", "read_row"]

BUFFER_BYTES = 4 << 20
"""What is read at a time of a column: a row group costs no more memory than its largest page, however long it is."""

BATCH_BYTES = 8 << 20

FOOTER_BYTES = 64 << 10
"""More than most footers have."""

_UNREADABLE = (pa.ArrowException, OSError, RuntimeError, ValueError, IndexError, OverflowError, MemoryError)
"""What pyarrow raises for damaged files: errors of its own, and Python's in the place of those of C++."""

BOMB_BYTES, BOMB_RATIO = 512 << 20, 100
"""Image files hardly compress: a row group of more bytes, and of more times those of its file, is to fill memory."""


def count_rows(store: Store, info: ObjectInfo, spec: InputSpec) -> int:
    """Rows of a file, from its footer. DataError for no Parquet file, a bomb, and columns of no right type."""
    with explained(store, info.key), pq.ParquetFile(pa.BufferReader(footer(store, info))) as file:
        _leaves(file.schema_arrow, spec, store.place(info.key))
        _refuse_bomb(file.metadata, info, store.place(info.key))
        return int(file.metadata.num_rows)


def read_parquet(store: Store, key: str, spec: InputSpec, max_bytes: int) -> Iterator[RawImage]:
    """Every row, in small batches. DataError if a key is null or empty, or the file cannot be read."""
    with opened(store, key) as file:
        leaves = _leaves(file.schema_arrow, spec, store.place(key))
        rows = count()
        for batch in file.iter_batches(_batch_rows(file.metadata), columns=leaves, use_threads=False):
            keys, values = (_values(batch, leaf) for leaf in leaves)
            yield from _images(store.uri, key, rows, keys, values, max_bytes)


def read_row(store: Store, place: Place, spec: InputSpec) -> bytes:
    """The image of one row; decodes only its row group, up to that row."""
    with opened(store, place.object) as file:
        _, leaf = _leaves(file.schema_arrow, spec, store.place(place.object))
        group, row = _row_group(file.metadata, place.start)
        groups = [] if group is None else [group]
        for batch in file.iter_batches(_batch_rows(file.metadata), groups, columns=[leaf], use_threads=False):
            if row < len(batch):
                return _values(batch, leaf)[row].as_py() or b""
            row -= len(batch)
    raise DataError(f"{store.place(place.object)} has no row {place.start} any more: it changed, index it again")


def footer(store: Store, info: ObjectInfo) -> bytes:
    """The end of the file with its whole footer; mostly one small request, where opening would fetch a block."""
    tail = store.read(info.key, start=max(0, info.size - FOOTER_BYTES))
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < footer_bytes <= info.size:
        tail = store.read(info.key, start=info.size - footer_bytes)
    return tail


@contextmanager
def opened(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, to be read by columns in small pieces; errors inside are DataErrors that name it."""
    with (
        explained(store, key),
        store.open(key) as stream,
        pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False) as file,
    ):
        yield file


@contextmanager
def explained(store: Store, key: str) -> Iterator[None]:
    """DataError that names the file for what pyarrow finds wrong inside the block."""
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(
            f"{store.place(key)} cannot be read as Parquet ({error}): copy it again from its origin or write it "
            f"again, or take it out of `images`"
        ) from error


def _images(
    source: str, object_key: str, rows: Iterator[int], keys: pa.Array, values: pa.Array, max_bytes: int
) -> Iterator[RawImage]:
    for key, value, row in zip(keys, values, rows, strict=False):
        data = value.as_py() or b""  # no bytes at all: an empty image, to be quarantined
        place = Place("parquet", object_key, row, len(data))
        text = place.describe(source, "")
        if not key.is_valid or key.as_py() == "":
            raise DataError(f"{text} has no key; every row of the key column needs one")
        yield RawImage(str(key.as_py()), text, place, data if len(data) <= max_bytes else None)


def _refuse_bomb(metadata: pq.FileMetaData, info: ObjectInfo, uri: str) -> None:
    """DataError for a small file that unpacks to so much that no worker could hold a page of it.

    Columns are not looked at one by one: of some damaged ones, pyarrow ends the process.
    """
    unpacked = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    if unpacked > max(BOMB_BYTES, BOMB_RATIO * info.size):
        raise DataError(
            f"{uri} has {info.size:,} bytes, and a row group of it unpacks to {unpacked:,}, as no image files do: take "
            "it out of `images`, or write it again in smaller row groups"
        )


def _batch_rows(metadata: pq.FileMetaData) -> int:
    num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(1, min(1024, BATCH_BYTES * int(metadata.num_rows) // max(1, int(num_bytes))))


def _row_group(metadata: pq.FileMetaData, row: int) -> tuple[int | None, int]:
    """The row group of a row, and the row's number within it."""
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if row < num_rows:
            return group, row
        row -= num_rows
    return None, row


def _leaves(schema: pa.Schema, spec: InputSpec, uri: str) -> tuple[str, str]:
    """The columns of keys and of image bytes, which may lie in a struct. DataError that names what the file has."""
    image_leaf = spec.image_column
    image_type = _type_of(schema, image_leaf)
    if image_type is not None and pa.types.is_struct(image_type):
        image_leaf += ".bytes"
        image_type = _type_of(schema, image_leaf)
    check_column(schema, uri, "key_column", spec.key_column, "text or integers", is_key)
    wanted = "binary (or a struct with a field `bytes`)"
    check_column(schema, uri, "image_column", spec.image_column, wanted, lambda _: _is_bytes(image_type))
    return spec.key_column, image_leaf


def check_column(
    schema: pa.Schema, uri: str, setting: str, column: str, wanted: str, suits: Callable[[pa.DataType], bool]
) -> None:
    """DataError that names what the file has unless it has this column, of a type that suits."""
    found = _type_of(schema, column)
    if found is None:
        hint = nearest(column, schema.names)
        raise DataError(f"{uri} has no column {column!r}{hint}; it has {_columns(schema)}; set `input.{setting}`")
    if not suits(found):
        raise DataError(f"{uri}: column {column!r} must be {wanted}; it has {_columns(schema)}; set `input.{setting}`")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema) or "no columns"


def is_key(found: pa.DataType) -> bool:
    """Whether a column of this type can hold keys."""
    found = found.value_type if pa.types.is_dictionary(found) else found
    kinds = pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(is_kind(found) for is_kind in kinds)


def _is_bytes(found: pa.DataType | None) -> bool:
    if found is None:
        return False
    found = found.value_type if pa.types.is_dictionary(found) else found
    return any(is_kind(found) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column, or of a field inside a struct column ("image.path")."""
    if column in schema.names:
        return schema.field(column).type
    outer, dot, inner = column.rpartition(".")
    parent = _type_of(schema, outer) if dot else None
    if parent is None or not pa.types.is_struct(parent) or parent.get_field_index(inner) < 0:
        return None
    return parent.field(inner).type


def _values(batch: pa.RecordBatch, column: str) -> pa.Array:
    if column in batch.schema.names:
        return batch.column(column)
    outer, _, inner = column.rpartition(".")
    return pc.struct_field(_values(batch, outer), inner)
