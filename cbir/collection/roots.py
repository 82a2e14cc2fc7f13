"""What a URI of `images` names: an object, a folder, or the beginning of names in a folder."""

from collections.abc import Iterator
from itertools import chain
from urllib.parse import unquote

from cbir.errors import ObjectMissing, StorageError
from cbir.storage import ObjectInfo, Store, open_store

__all__ = ["objects_under", "store_of"]


def objects_under(uri: str) -> tuple[Store, Iterator[ObjectInfo], bool]:
    """The root that keys are relative to, what the URI names below it, and whether that is one object of this name.

    A folder is its own root; that of an object and of a beginning of names (s3 only) is the folder they lie in.
    """
    folder, name = _split(uri)
    refused: StorageError | None = None
    if name:
        parent = open_store(folder)
        try:
            return parent, iter([parent.stat(name)]), True
        except StorageError as error:  # missing, or beyond what the credentials allow although the folder is not
            refused = error
    store = open_store(uri)
    infos = store.list()
    first = next(infos, None)
    if first is not None:
        return store, chain([first], infos), False
    if refused is not None and not isinstance(refused, ObjectMissing):
        raise refused
    if name and uri.startswith("s3://"):
        return parent, parent.list(name), False
    return store, iter([]), False


def store_of(uri: str, key: str) -> Store:
    """The root of a URI from which an object with this key was listed; asks only where the key leaves a doubt."""
    _, name = _split(uri)
    is_doubtful = key.startswith(name) if uri.startswith("s3://") else key == name
    return objects_under(uri)[0] if name and is_doubtful else open_store(uri)


def _split(uri: str) -> tuple[str, str]:
    """The URI of the folder and the key in it; no key if the URI can only be a folder or a bucket."""
    scheme, separator, path = uri.rpartition("://")
    folder, slash, name = path.rpartition("/")
    if name in ("", ".", "..") or (scheme == "s3" and not folder):
        return uri, ""
    return f"{scheme}{separator}{folder or slash or '.'}", unquote(name) if scheme == "file" else name
