"""Partitions of a published version, opened from their files, and what a searcher asks of them."""

import bisect
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors

from cbir.artifacts import StoredFile, sha256_of
from cbir.config import Config
from cbir.errors import ArtifactError
from cbir.hidden import Hidden
from cbir.index.index import SearchIndex
from cbir.layout import FeatureFile, IdMap, Labels, PartitionLayout
from cbir.storage import Store
from cbir.types import FeatureBatch, Hits, Int64s
from cbir.versions import Manifest

__all__ = ["Found", "LocalFiles", "Partition", "Partitions"]

_NO_IDS = np.empty(0, np.int64)

_FEW = 64
"""Images whose labels are read one by one, which costs less than a call of Arrow's kernels for each partition."""

_SMALL_BYTES = 4 << 20
"""Files of up to so many bytes are compared with their sha256 whenever they are opened; it takes 3 ms at most."""


class LocalFiles:
    """Files of a store as local files: in place for a local store, else fetched once into a cache by content.

    Size and, of small files, sha256 are checked always; with `verify` the sha256 of large files too [0.75 s per GiB].
    A search in a mapped file whose bytes were flipped can give wrong results, or end this process by a signal.
    """

    def __init__(self, store: Store, manifest: Manifest, cache: Path | None = None, *, verify: bool = False) -> None:
        self.store = store
        self._verify = verify
        self._files = {file.key: file for file in manifest.files}
        self._cache = cache or Path(os.environ.get("CBIR_CACHE", Path.home() / ".cache" / "cbir"))

    def path(self, key: str) -> Path:
        """The local file with the content of this key; ArtifactError if it is damaged. In the cache it is replaced."""
        file, local = self._files[key], self.store.local_path(key)
        if local is not None:
            if problem := self._difference(local, file):
                raise ArtifactError(
                    f"{local} {problem}; run `cbir verify --repair` and `cbir index`, or `cbir rollback`"
                )
            return local
        target = self._cache / f"{file.sha256}.{key.rsplit('.', 1)[-1]}"
        if not target.exists() or self._difference(target, file):
            self.store.fetch(key, target, file.sha256)
        return target

    def _difference(self, path: Path, file: StoredFile) -> str | None:
        """What is wrong with a local file."""
        if (found := path.stat().st_size) != file.num_bytes:
            return f"has {found} bytes, its record says {file.num_bytes}"
        if (self._verify or found <= _SMALL_BYTES) and sha256_of(path) != file.sha256:
            return f"has other bytes than its record says (sha256 {file.sha256})"
        return None

    def state(self, key: str) -> Mapping[str, np.ndarray[Any, Any]]:
        """The arrays of a safetensors file."""
        return load_safetensors(self.store.read(key, sha256=self._files[key].sha256))


class Partition:
    """One partition of one version, opened from its files."""

    def __init__(self, config: Config, layout: PartitionLayout, files: LocalFiles) -> None:
        self.low, self.high = layout.low, layout.high
        self.ids = IdMap(files.path(layout.ids))
        self.hidden = Hidden.ids(files.path(layout.hidden), self.low, self.high) if layout.hidden else _NO_IDS
        self.indexes: dict[str, SearchIndex] = {
            name: config.channels[name].index.load(*map(files.path, keys)) for name, keys in layout.indexes.items()
        }
        self._features = {name: FeatureFile(files.path(key)) for name, key in layout.features.items()}
        self._signatures = {name: FeatureFile(files.path(key)) for name, key in layout.signatures.items()}

    def matches(self, queries: Mapping[str, FeatureBatch]) -> Mapping[str, Int64s]:
        """How much each row of the encoded queries matches here, by channel; for indexes that damp matches."""
        return {name: self.indexes[name].matches(batch) for name, batch in queries.items()}

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of these images, in this order."""
        return self._features[channel].read(image_ids)

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored signatures of these images, in this order."""
        return self._signatures[channel].read(image_ids)

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The rows of the id map of these images, in this order."""
        return self.ids.records(image_ids)

    def labels(self, image_ids: Int64s) -> Labels:
        """What results show of these images, in this order."""
        return self.ids.labels(image_ids)

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition that results can show."""
        keys = dict(zip(self.ids.image_ids.tolist(), self.ids.table.column("key").to_pylist(), strict=True))
        return {image: key for image, key in keys.items() if image not in self.hidden} if len(self.hidden) else keys


@dataclass(frozen=True)
class Found:
    """What partitions found: hits by channel, the labels of those that were to be labelled, and the numbers of the
    partitions for which no time was left."""

    hits: Mapping[str, Hits]
    labels: Labels
    missing: frozenset[int] = frozenset()

    @classmethod
    def merge(cls, parts: Sequence["Found"], queries: Mapping[str, FeatureBatch], depth: int) -> "Found":
        """The best of what several partitions found, or none of them."""
        if len(parts) == 1:
            return parts[0]
        hits = {name: merged([part.hits[name] for part in parts], len(batch), depth) for name, batch in queries.items()}
        return cls(hits, Labels.concatenate([part.labels for part in parts]))

    def of_queries(self, some: Mapping[str, slice]) -> "Found":
        """What was found for some of the queries of each channel; labels stay those of all."""
        hits = {name: Hits(self.hits[name].image_ids[at], self.hits[name].scores[at]) for name, at in some.items()}
        return replace(self, hits=hits)


class Partitions:
    """The partitions of a version that one process holds, by number, which are searched together.

    Where indexes can be joined, a search costs about as much as in one partition of all that they hold.
    """

    def __init__(self, parts: Mapping[int, Partition]) -> None:
        self.parts = dict(sorted(parts.items()))
        self._ids = [part.ids for part in self.parts.values()]
        self._edges = [part.low for part in self.parts.values()]
        self._hidden = np.concatenate([_NO_IDS, *(part.hidden for part in self.parts.values())])
        names = next(iter(self.parts.values())).indexes if self.parts else ()
        self._indexes = {name: self._joined(name) for name in names}

    def _joined(self, channel: str) -> list[tuple[frozenset[int], SearchIndex]]:
        """The indexes to search, each with the numbers of its partitions."""
        alone = [(frozenset([number]), part.indexes[channel]) for number, part in self.parts.items()]
        first, *others = [index for _, index in alone]
        whole = first.joined(others) if others else None
        return alone if whole is None else [(frozenset(self.parts), whole)]

    def only(self, numbers: Collection[int]) -> "Partitions":
        """Those with these numbers."""
        if len(numbers) == len(self.parts):
            return self
        return Partitions({number: self.parts[number] for number in numbers})

    def search(
        self, queries: Mapping[str, FeatureBatch], depth: int, labelled: int = 0, end: float = math.inf
    ) -> Found:
        """The best `depth` images for encoded queries by channel, until `end` by `time.monotonic`.

        The first `labelled` of each query get labels, for which there must be one channel.
        """
        missing: set[int] = set()
        hits = {name: self._hits(name, batch, depth, end, missing) for name, batch in queries.items()}
        if not labelled:
            return Found(hits, Labels.none(), frozenset(missing))
        (shown,) = hits.values()
        return Found(hits, self._labels(shown.image_ids[:, :labelled]), frozenset(missing))

    def _hits(self, channel: str, batch: FeatureBatch, depth: int, end: float, missing: set[int]) -> Hits:
        found = []
        for numbers, index in self._indexes[channel]:
            if time.monotonic() > end:
                missing |= numbers
            else:
                found.append(self._shown(index, batch, depth))
        return merged(found, len(batch), depth)

    def _shown(self, index: SearchIndex, batch: FeatureBatch, depth: int) -> Hits:
        """The best images that are not hidden; as many more are looked for as are hidden, so that none is missed."""
        if not len(self._hidden):
            return index.search(batch, depth)
        return index.search(batch, depth + len(self._hidden)).without(self._hidden, depth)

    def _labels(self, image_ids: Int64s) -> Labels:
        wanted = image_ids[image_ids >= 0]
        if len(image_ids) > 1:
            wanted = np.unique(wanted)
        if len(self._ids) == 1:
            return self._ids[0].labels(wanted)
        if len(wanted) <= _FEW:
            owners = [self._ids[bisect.bisect_right(self._edges, image) - 1] for image in wanted.tolist()]
            rows = [owner.label(image) for owner, image in zip(owners, wanted.tolist(), strict=True)]
            return Labels(
                wanted, [key for key, _, _ in rows], np.array([row[1:] for row in rows], np.int32).reshape(-1, 2)
            )
        cuts = np.searchsorted(wanted, self._edges[1:])
        return Labels.concatenate(
            [ids.labels(some) for ids, some in zip(self._ids, np.split(wanted, cuts), strict=True) if len(some)]
        )


def merged(parts: Sequence[Hits], num_queries: int, depth: int) -> Hits:
    """The best of several partitions; one by itself as it is."""
    if len(parts) == 1:
        return parts[0]
    none = Hits(np.empty((num_queries, 0), np.int64), np.empty((num_queries, 0), np.float32))
    return Hits.merge(parts or [none], depth)
