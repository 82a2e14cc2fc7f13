"""From the places that `images` names to a stream of shards; a million objects cost no more memory than a thousand."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from cbir.collection.lookahead import calls_in_flight, look_ahead
from cbir.collection.names import kind_of, refuse_compressed
from cbir.collection.parquet import count_rows
from cbir.collection.roots import objects_under
from cbir.collection.shard import ImageShard, InputSpec, Kind
from cbir.collection.vectors import count_vectors
from cbir.errors import DataError
from cbir.storage import ObjectInfo, Store
from cbir.types import image_id

__all__ = ["list_shards"]

LONGEST_GROUP = 4
"""A group of files has at most this many times the mean number."""


def list_shards(images: Sequence[str], spec: InputSpec) -> Iterator[ImageShard]:
    """Every shard under one or several URIs, one URI after the other and each in the order of its keys.

    A URI names an object, else a folder, else (s3 only) the beginning of names in a folder. DataError if one of them
    has no images, if a Parquet file lacks its columns, or if images lie under two of them.
    """
    if not images:
        raise DataError("`images` names no place: give a folder, a tar, a Parquet file or an s3:// prefix")
    shards = chain.from_iterable(_shards_under(uri, spec) for uri in images)
    return shards if len(images) == 1 else _with_unique_names(shards)


def _shards_under(uri: str, spec: InputSpec) -> Iterator[ImageShard]:
    store, infos, is_named = objects_under(uri)
    first = next(infos, None)
    if first is None:
        raise DataError(f"`images`: nothing lies under {uri}; check the path for a slip, and that it was filled")
    chosen = _chosen(store, chain([first], infos), spec, is_named)
    shard, with_rows = None, partial(_with_rows, store, spec)
    for shard in look_ahead(with_rows, _shards(uri, store.uri, chosen, spec), calls_in_flight(store, first.key)):
        yield shard
    if shard is None:
        raise DataError(_no_images(uri, spec))


def _chosen(
    store: Store, infos: Iterable[ObjectInfo], spec: InputSpec, is_named: bool
) -> Iterator[tuple[Kind, ObjectInfo]]:
    for info in infos:
        kind = spec.format if is_named and spec.format != "auto" else _kind(info.key, spec)
        if kind is not None and spec.format in ("auto", kind):
            if kind == "tar":
                refuse_compressed(store.place(info.key))
            yield kind, info


def _kind(key: str, spec: InputSpec) -> Kind | None:
    kind = kind_of(key)
    return "vectors" if kind == "parquet" and spec.format == "vectors" else kind


def _shards(source: str, root: str, chosen: Iterable[tuple[Kind, ObjectInfo]], spec: InputSpec) -> Iterator[ImageShard]:
    """Tars and Parquet files as they are, files in groups whose cuts depend on nothing but the keys around them.

    A group ends after a key whose id is a multiple of the mean number, so that a file more or less changes the groups
    up to the next such key, and no other.
    """
    group: list[ObjectInfo] = []
    for kind, info in chosen:
        if kind != "files":
            yield ImageShard(info.key, kind, source, root, (info,), spec.columns(kind))
            continue
        group.append(info)
        is_cut = image_id(info.key) % spec.shard_images == 0
        if is_cut or len(group) >= LONGEST_GROUP * spec.shard_images:
            yield _group_shard(source, root, group)
            group = []
    if group:
        yield _group_shard(source, root, group)


def _group_shard(source: str, root: str, group: Sequence[ObjectInfo]) -> ImageShard:
    name = f"files-{image_id(group[0].key):016x}"
    return ImageShard(name, "files", source, root, tuple(group), num_images=len(group))


def _with_rows(store: Store, spec: InputSpec, shard: ImageShard) -> ImageShard:
    match shard.kind:
        case "parquet":
            return replace(shard, num_images=count_rows(store, shard.objects[0], spec))
        case "vectors":
            return replace(shard, num_images=count_vectors(store, shard.objects[0], spec))
    return shard


def _with_unique_names(shards: Iterable[ImageShard]) -> Iterator[ImageShard]:
    """Tars of one name under several URIs are told apart by `~2`, `~3`; DataError for images that are listed twice."""
    roots: dict[str, str] = {}
    for shard in shards:
        name, number = shard.name, 1
        while name in roots:
            if shard.kind == "files" or roots[name] == shard.root:
                raise DataError(_listed_twice(shard, roots[name]))
            number += 1
            name = f"{shard.name}~{number}"
        roots[name] = shard.root
        yield replace(shard, name=name)


def _listed_twice(shard: ImageShard, known: str) -> str:
    key = shard.objects[0].key
    if known == shard.root:
        return f"`images` names {known}/{key} twice, alone or through its folder: take one of the entries out"
    places = f"{known}/{key} and {shard.root}/{key}"
    return f"two images have the key {key!r}: {places}; keys must be unique over all of `images`: move one of them"


def _no_images(uri: str, spec: InputSpec) -> str:
    """What lies there instead; lists again, as nothing of a listing is kept."""
    _, infos, _ = objects_under(uri)
    found = ", ".join(repr(info.key) for info in islice(infos, 3))
    wanted = "image, tar or Parquet file" if spec.format == "auto" else f"object of `input.format: {spec.format}`"
    return f"`images`: no {wanted} lies under {uri}; found are {found}, ... (hidden files and sidecars do not count)"
