"""A candidate version, put together from the records of all stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cbir.artifacts import Done, StoredFile
from cbir.config import Config
from cbir.errors import ArtifactError
from cbir.layout import ChannelLayout, Layout, PartitionLayout
from cbir.spec import fingerprint
from cbir.storage import Store
from cbir.versions import Manifest, unique_files
from pipelines.stages import Extracted
from pipelines.work import ChannelWork

__all__ = ["Built", "Part", "channel_layout", "checked_counts", "content_of", "hiding", "manifest_of", "partition"]

Part = tuple[int, str, str, int]
"""A file of a partition: the partition's least id, the channel, the role, and its number among those of this role."""


@dataclass(frozen=True)
class Built:
    """All parts of a candidate version."""

    layout: Layout
    records: Sequence[Done]
    works: Sequence[ChannelWork]
    counts: Mapping[str, int]
    builds: Mapping[str, Sequence[Done]]
    trains: Mapping[str, Done]
    plan: str
    """The file of the plan."""
    hidden: StoredFile | None = None


def manifest_of(config: Config, store: Store, built: Built) -> Manifest:
    """The manifest of all this, which has no number yet."""
    published = {built.plan, *_published(built.layout)}
    files = {file.key: file for done in built.records for file in done.files if file.key in published}
    files |= {built.hidden.key: built.hidden} if built.hidden else {}
    for work in built.works:
        for asset in work.assets.values():
            files[asset.key] = StoredFile("asset", asset.key, store.stat(asset.key).size, asset.sha256)
    return Manifest(
        version=0,
        content=content_of(built.layout, config),
        config=config.model_dump(mode="json"),
        files=unique_files(files.values()),
        layout=built.layout.to_json(),
        counts=built.counts,
        work=tuple(sorted({f"stages/{done.stage}/{done.fingerprint}/" for done in built.records})),
        plan=built.plan,
    )


def content_of(layout: Layout, config: Config) -> str:
    """What identifies what is searched, and how."""
    semantic = config.model_dump(mode="json", exclude={"workers", "pools", "ray", "store", "reindex"})
    ranking = [spec.identity() for spec in (config.search.fuse, *config.search.rerank) if spec is not None]
    return fingerprint(layout.to_json(), semantic, ranking)


def hiding(layout: Layout, hidden: StoredFile | None) -> Layout:
    """The same, without the images of this file in any result."""
    key = hidden.key if hidden else ""
    return replace(layout, partitions=tuple(replace(part, hidden=key) for part in layout.partitions))


def _published(layout: Layout) -> set[str]:
    keys = {key for channel in layout.channels.values() for key in (*channel.encoders, channel.index)}
    return keys.union(*(part.keys for part in layout.partitions))


def channel_layout(work: ChannelWork, train: Done, background: float | None) -> ChannelLayout:
    """The files of a trained channel."""
    encoders = tuple(train.file(f"encoder-{number}").key for number in range(len(work.channel.encoders)))
    assets = {name: asset.key for name, asset in work.assets.items()}
    return ChannelLayout(encoders, train.file("index").key, assets, background)


def partition(bound: tuple[int, int], catalog: Done, merges: Mapping[Part, Done]) -> PartitionLayout:
    """The files of one range of ids, out of all merged ones."""
    files: dict[str, dict[str, list[str]]] = {"index": {}, "features": {}, "signatures": {}}
    for (low, name, role, _), done in merges.items():
        if low == bound[0]:
            files[role].setdefault(name, []).append(done.file(role).key)
    return PartitionLayout(
        *bound,
        num_images=catalog.counts["indexed"],
        ids=catalog.file("ids").key,
        quarantine=catalog.file("quarantine").key,
        indexes={name: tuple(keys) for name, keys in files["index"].items()},
        features={name: keys[0] for name, keys in files["features"].items()},
        signatures={name: keys[0] for name, keys in files["signatures"].items()},
    )


def checked_counts(extracted: Sequence[Extracted], catalogs: Sequence[Done]) -> dict[str, int]:
    """images = indexed + quarantined, or an ArtifactError: the law that nothing is lost."""
    counts = {
        "images": sum(part.done.counts["images"] for part in extracted),
        "indexed": sum(done.counts["indexed"] for done in catalogs),
        "quarantined": sum(done.counts["quarantined"] for done in catalogs),
        "features": sum(part.done.counts["features"] for part in extracted),
        "bytes": sum(part.done.counts["bytes"] for part in extracted),
        "shards": len(extracted),
        "partitions": len(catalogs),
    }
    if counts["images"] != counts["indexed"] + counts["quarantined"]:
        raise ArtifactError(
            f"{counts['images']} images were read, but {counts['indexed']} are indexed and {counts['quarantined']} "
            "quarantined; please report this with the store's stages/ folder"
        )
    return counts
