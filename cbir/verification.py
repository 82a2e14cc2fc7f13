"""Proof that a version is whole: every file there and unchanged, every count right."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cbir.artifacts import StoredFile
from cbir.errors import ArtifactError, ObjectMissing
from cbir.layout import Layout
from cbir.partition import Partition
from cbir.search import Searcher
from cbir.storage import Store
from cbir.versions import Manifest

__all__ = ["check_counts", "check_files", "forget_damaged"]

_BLOCK = 16 << 20
_THREADS = 4
_TRANSFERS = 3  # a byte that was flipped on the way is right the next time


def check_files(store: Store, manifest: Manifest, on_file: Callable[[StoredFile], None] = lambda _file: None) -> None:
    """Read every file of a version and compare size and sha256; ArtifactError lists all that differ.

    `on_file` is called with each file once it has been read.
    """
    problems = []
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda file: _problem(store, file), manifest.files)
        for file, problem in zip(manifest.files, found, strict=True):
            on_file(file)
            problems += [problem] if problem else []
    if problems:
        raise ArtifactError(
            f"{_damaged(store, manifest.version)}:\n" + "\n".join(f"  {problem}" for problem in problems)
        )


def _damaged(store: Store, version: int) -> str:
    if not version:
        return (
            f"files of {store.uri} were damaged before they could be published; "
            "delete the DONE.json beside each of them and run `cbir index` again"
        )
    return (
        f"version {version} of {store.uri} is damaged; run `cbir verify --repair` and `cbir index`, or `cbir rollback`"
    )


def _problem(store: Store, file: StoredFile) -> str | None:
    """What is wrong with a file, however often it is read."""
    problem = None
    for _ in range(_TRANSFERS):
        if (problem := _difference(store, file)) is None:
            return None
    return problem


def _difference(store: Store, file: StoredFile) -> str | None:
    try:
        digest, size = hashlib.sha256(), 0
        with store.open(file.key) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except ObjectMissing:
        return f"{file.key} is missing"
    if size != file.num_bytes:
        return f"{file.key} has {size} bytes, its record says {file.num_bytes}"
    if digest.hexdigest() != file.sha256:
        return f"{file.key} has other bytes than its record says (sha256 {digest.hexdigest()})"
    return None


def check_counts(searcher: Searcher, manifest: Manifest) -> None:
    """Images = indexed + quarantined, and every partition opens and holds what the manifest says."""
    counts = manifest.counts
    if counts["images"] != counts["indexed"] + counts["quarantined"]:
        raise ArtifactError(
            f"version {manifest.version}: {counts['images']} images are not {counts['indexed']} indexed "
            f"+ {counts['quarantined']} quarantined"
        )
    layout = Layout.from_json(manifest.layout)
    for part, partition in zip(layout.partitions, searcher.partitions, strict=True):
        assert isinstance(partition, Partition), "files are checked where they are opened"
        ids = partition.ids.image_ids
        if len(ids) != part.num_images or not ((part.low <= ids) & (ids < part.high)).all():
            raise ArtifactError(
                f"version {manifest.version}: {part.ids} holds {len(ids)} images, its record says {part.num_images} "
                f"with ids from {part.low} to below {part.high}"
            )
    if sum(part.num_images for part in layout.partitions) != counts["indexed"]:
        raise ArtifactError(f"version {manifest.version}: its partitions do not hold {counts['indexed']} images in all")


def forget_damaged(store: Store, manifest: Manifest) -> list[str]:
    """Delete what keeps the next run from making damaged files again; returns the keys or folders that it will make.

    For work, that is its DONE record. A damaged asset (weights) is deleted itself, and copied again from its source.
    """
    forgotten = set()
    for file in manifest.files:
        if _problem(store, file):
            folder = file.key.rpartition("/")[0] + "/"
            is_work = folder in manifest.work
            store.delete(f"{folder}DONE.json" if is_work else file.key)
            forgotten.add(folder if is_work else file.key)
    return sorted(forgotten)
