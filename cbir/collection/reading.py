"""From a shard to the undecoded bytes of its images, each with its key and its place."""

from collections.abc import Iterator
from functools import partial

from cbir.collection.lookahead import calls_in_flight, look_ahead
from cbir.collection.parquet import read_parquet, read_row
from cbir.collection.roots import store_of
from cbir.collection.shard import ImageShard, InputSpec, Place, RawImage
from cbir.collection.tar import read_tar
from cbir.errors import DataError, ObjectMissing
from cbir.storage import ObjectInfo, Store, open_store

__all__ = ["read_images", "read_place"]


def read_images(shard: ImageShard, spec: InputSpec, max_bytes: int) -> Iterator[RawImage]:
    """Every image of the shard, in a fixed order; those of more than `max_bytes` without their data.

    DataError if two images have one key, if an object is damaged, or if it changed since it was listed.
    """
    if shard.columns != spec.columns(shard.kind):
        raise ValueError(f"{shard.name} was listed with the columns {shard.columns}, not {spec.columns(shard.kind)}")
    store = open_store(shard.root)
    places: dict[str, Place] = {}
    for image in _images(store, shard, spec, max_bytes):
        first = places.setdefault(image.key, image.at)
        if first is not image.at:
            raise DataError(
                f"two images have the key {image.key!r}: {first.describe(shard.root, image.key)} and {image.place}; "
                f"keys must be unique, so rename one or take it out"
            )
        yield image


def read_place(source: str, place: Place, spec: InputSpec) -> bytes:
    """The bytes of one image again; `source` is the entry of `images`, or the root itself.

    DataError if other bytes than before lie there, ObjectMissing if none.
    """
    store = store_of(source, place.object)
    match place.kind:
        case "tar":
            data = store.read(place.object, start=place.start, length=place.size)
        case "parquet":
            data = read_row(store, place, spec)
        case "files":
            data = store.read(place.object)
        case "vectors":
            raise DataError(f"{place.describe(source, '')} is a vector, not a picture, so it cannot be shown")
    if len(data) != place.size:
        raise DataError(
            f"{place.describe(source, 'image')} has {len(data)} bytes, {place.size} when it was indexed: "
            f"the source changed since, index it again"
        )
    return data


def _images(store: Store, shard: ImageShard, spec: InputSpec, max_bytes: int) -> Iterator[RawImage]:
    if shard.kind == "files":
        read = partial(_read_file, store, max_bytes)
        return look_ahead(read, shard.objects, calls_in_flight(store, shard.objects[0].key))
    (info,) = shard.objects
    _refuse_changed(store, info)
    if shard.kind == "tar":
        return read_tar(store, info, max_bytes)
    return read_parquet(store, info.key, spec, max_bytes)


def _read_file(store: Store, max_bytes: int, info: ObjectInfo) -> RawImage:
    place = Place("files", info.key, 0, info.size)
    data = None
    if info.size <= max_bytes:
        try:
            data = store.read(info.key)
        except ObjectMissing as error:
            raise _changed(store, info, "it is gone") from error
        if len(data) != info.size:
            raise _changed(store, info, f"it has {len(data)} bytes, not {info.size}")
    return RawImage(info.key, place.describe(store.uri, info.key), place, data)


def _refuse_changed(store: Store, info: ObjectInfo) -> None:
    try:
        now = store.stat(info.key)
    except ObjectMissing as error:
        raise _changed(store, info, "it is gone") from error
    if now != info:
        raise _changed(store, info, f"it has {now.size} bytes and the tag {now.tag}, not {info.size} and {info.tag}")


def _changed(store: Store, info: ObjectInfo, how: str) -> DataError:
    return DataError(f"{store.place(info.key)} changed while indexing ({how}): run again")
