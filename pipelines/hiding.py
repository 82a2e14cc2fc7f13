"""Versions that are the one before but for the images that they hide: published at once, without a merge."""

from collections.abc import Iterable
from dataclasses import replace

from cbir.artifacts import StoredFile
from cbir.config import parse_config
from cbir.errors import DataError
from cbir.hidden import Hidden
from cbir.layout import Layout
from cbir.lease import Lease
from cbir.partition import LocalFiles, Partition
from cbir.spec import nearest
from cbir.storage import Store
from cbir.types import image_id
from cbir.versions import Manifest, Versions
from pipelines.assembly import content_of, hiding
from pipelines.assets import store_asset
from pipelines.tables import parquet_bytes

__all__ = ["check_indexed", "hidden_in", "hide", "store_hidden"]


def hidden_in(store: Store, manifest: Manifest) -> Hidden:
    """The images that a version hides."""
    keys = {part.hidden for part in Layout.from_json(manifest.layout).partitions if part.hidden}
    return Hidden.read(LocalFiles(store, manifest).path(keys.pop())) if keys else Hidden()


def store_hidden(store: Store, hidden: Hidden) -> StoredFile | None:
    """The file of hidden images; None for none."""
    if not len(hidden):
        return None
    asset = store_asset(store, parquet_bytes(hidden.table()), ".parquet")
    return StoredFile("hidden", asset.key, store.stat(asset.key).size, asset.sha256)


def hide(versions: Versions, hidden: Hidden, held: Lease) -> Manifest:
    """Publish the current version with these images hidden, instead of those that it hides."""
    manifest, file = versions.load(), store_hidden(versions.store, hidden)
    layout = hiding(Layout.from_json(manifest.layout), file)
    config = parse_config(manifest.config, f"version {manifest.version} of {versions.store.uri}")
    files = [*(known for known in manifest.files if known.role != "hidden"), *([file] if file else [])]
    changed = replace(
        manifest,
        content=content_of(layout, config),
        layout=layout.to_json(),
        files=tuple(sorted(files, key=lambda one: one.key)),
        counts={**manifest.counts, "hidden": len(hidden)},
    )
    return versions.publish(changed, held)


def check_indexed(versions: Versions, keys: Iterable[str]) -> None:
    """DataError for a key that is not indexed, with the nearest that is, if that is nothing but a slip."""
    manifest = versions.load()
    config = parse_config(manifest.config, f"version {manifest.version} of {versions.store.uri}")
    layout, files = Layout.from_json(manifest.layout), LocalFiles(versions.store, manifest)
    partitions = [Partition(config, part, files) for part in layout.partitions]
    known = {image for part in partitions for image in part.ids.image_ids.tolist()}
    for key in keys:
        if image_id(key) not in known:
            hint = nearest(key, [name for part in partitions for name in part.keys().values()])
            raise DataError(f"no image {key!r} is indexed{hint if hint.startswith('; did') else ''}")
