"""What no kept version needs, and its removal.

Versions are given up in CURRENT first, for ever (`Versions.give_up`), then deleted under the lease, which announces
what it deletes. So nothing is published that was deleted, or that a run which lost its lease may still delete.
"""

import itertools
from collections.abc import Iterable, Iterator

from cbir.lease import Lease
from cbir.storage import ObjectInfo
from cbir.versions import Versions

__all__ = ["garbage", "sweep"]

_AREAS = ("versions/", "candidates/", "stages/", "assets/")
_AT_ONCE = 1000


def garbage(versions: Versions, keep: int) -> Iterator[ObjectInfo]:
    """All that CURRENT, the last `keep` versions and the pinned ones do not need, also what a run is just making."""
    return _unneeded(versions, versions.kept(keep))


def sweep(versions: Versions, keep: int, held: Lease) -> Iterator[ObjectInfo]:
    """Delete the garbage; yields what is gone.

    Manifests go before the files that they name, and before the files of a piece of work its record, also one that is
    not listed: a run that lost its lease may write it in between.
    """
    unneeded = _unneeded(versions, versions.give_up(keep, held))
    while batch := list(itertools.islice(unneeded, _AT_ONCE)):
        sizes = {info.key: info for info in batch}
        for key in held.delete(_records_first(sizes)):
            if key in sizes:
                yield sizes[key]


def _records_first(keys: Iterable[str]) -> Iterator[str]:
    last = ""
    for key in keys:
        folder, _, name = key.rpartition("/")
        if folder.startswith("stages/") and name != "DONE.json" and folder != last:
            yield f"{folder}/DONE.json"
        yield key
        last = folder


def _unneeded(versions: Versions, kept: Iterable[int]) -> Iterator[ObjectInfo]:
    manifests = {number: versions.load(number) for number in kept}
    needed = {versions.key(number) for number in manifests} | {f.key for m in manifests.values() for f in m.files}
    work = {prefix for manifest in manifests.values() for prefix in manifest.work}
    for area in _AREAS:
        for info in versions.store.list(area):
            if info.key not in needed and info.key.rpartition("/")[0] + "/" not in work:
                yield info
