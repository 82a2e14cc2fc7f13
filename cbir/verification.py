"""Proof that a version is whole: every file there and unchanged, every count right."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cbir.artifacts import StoredFile
from cbir.errors import ArtifactError, ObjectMissing
from cbir.search import Partition, Searcher
from cbir.storage import Store
from cbir.versions import Manifest

__all__ = ["check_counts", "check_files", "forget_damaged"]

_BLOCK = 16 << 20


def check_files(store: Store, manifest: Manifest, on_file: Callable[[StoredFile], None] = lambda _file: None) -> None:
    """Read every file of a version and compare size and sha256; ArtifactError lists all that differ."""
    with ThreadPoolExecutor(4) as threads:
        problems = []
        for file, problem in zip(
            manifest.files, threads.map(lambda f: _problem(store, f), manifest.files), strict=True
        ):
            on_file(file)
            if problem:
                problems.append(problem)
    if problems:
        raise ArtifactError(
            f"version {manifest.version} of {store.uri} is damaged; run `cbir verify --repair` and `cbir index`, "
            f"or `cbir rollback`:\n" + "\n".join(f"  {problem}" for problem in problems)
        )


def _problem(store: Store, file: StoredFile) -> str | None:
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
        raise ArtifactError(f"version {manifest.version}: {counts['images']} images are not indexed + quarantined")
    held = sum(len(part.ids) for part in searcher.partitions if isinstance(part, Partition))
    if held != counts["indexed"]:
        raise ArtifactError(f"version {manifest.version}: the id maps hold {held} images, not {counts['indexed']}")


def forget_damaged(store: Store, manifest: Manifest) -> list[str]:
    """Delete the DONE records of work whose files are damaged, so that the next run does it again."""
    damaged = {file.key.rsplit("/", 1)[0] + "/" for file in manifest.files if _problem(store, file)}
    for prefix in sorted(damaged):
        store.delete(f"{prefix}DONE.json")
    return sorted(damaged)
