"""A partition of a published version, opened from its files, and what a searcher asks of one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load as load_safetensors

from cbir.artifacts import StoredFile
from cbir.config import Config
from cbir.errors import ArtifactError
from cbir.index.index import SearchIndex
from cbir.layout import FeatureFile, IdMap, PartitionLayout
from cbir.storage import Store
from cbir.types import FeatureBatch, Hits, Int64s
from cbir.versions import Manifest

__all__ = ["LocalFiles", "Partition", "PartitionLike"]


class LocalFiles:
    """Files of a store as local files: in place for a local store, else fetched once into a cache by content."""

    def __init__(self, store: Store, manifest: Manifest, cache: Path | None = None) -> None:
        self.store = store
        self._files = {file.key: file for file in manifest.files}
        self._cache = cache or Path(os.environ.get("CBIR_CACHE", Path.home() / ".cache" / "cbir"))

    def path(self, key: str) -> Path:
        """The local file with the content of this key; its sha256 is checked when it is fetched, else its size."""
        file, local = self._files[key], self.store.local_path(key)
        if local is not None:
            _check_size(local, file)
            return local
        target = self._cache / f"{file.sha256}.{key.rsplit('.', 1)[-1]}"
        if not target.exists():
            self.store.fetch(key, target, file.sha256)
        return target

    def state(self, key: str) -> Mapping[str, np.ndarray[Any, Any]]:
        """The arrays of a safetensors file."""
        return load_safetensors(self.store.read(key, sha256=self._files[key].sha256))


def _check_size(path: Path, file: StoredFile) -> None:
    """ArtifactError for a file that was cut or grew: mapped as it is, it could end this process by a signal."""
    if (found := path.stat().st_size) != file.num_bytes:
        raise ArtifactError(f"{path} has {found} bytes, its record says {file.num_bytes}; run `cbir verify`")


class PartitionLike(Protocol):
    """What a searcher asks of a partition, which in a query pool lives in an actor."""

    @property
    def low(self) -> int:
        """The least image id that it can hold."""
        ...

    def search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Mapping[str, Hits]:
        """Hits by channel for encoded queries by channel."""
        ...

    def matches(self, queries: Mapping[str, FeatureBatch]) -> Mapping[str, Int64s]:
        """How much each row of the encoded queries matches in this partition, by channel."""
        ...

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored features of these images of this partition."""
        ...

    def signatures(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        """Stored signatures of these images of this partition."""
        ...

    def records(self, image_ids: Int64s) -> list[dict[str, Any]]:
        """The rows of the id map of these images."""
        ...

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition."""
        ...


class Partition:
    """One partition of one version, opened from its files."""

    def __init__(self, config: Config, layout: PartitionLayout, files: LocalFiles) -> None:
        self.low, self.high = layout.low, layout.high
        self.ids = IdMap(files.path(layout.ids))
        self.indexes: dict[str, SearchIndex] = {
            name: config.channels[name].index.load(*map(files.path, keys)) for name, keys in layout.indexes.items()
        }
        self._features = {name: FeatureFile(files.path(key)) for name, key in layout.features.items()}
        self._signatures = {name: FeatureFile(files.path(key)) for name, key in layout.signatures.items()}

    def search(self, queries: Mapping[str, FeatureBatch], depth: int) -> Mapping[str, Hits]:
        """Hits by channel for encoded queries by channel."""
        return {name: self.indexes[name].search(batch, depth) for name, batch in queries.items()}

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

    def keys(self) -> dict[int, str]:
        """Key by id of every image of this partition."""
        return dict(zip(self.ids.image_ids.tolist(), self.ids.table.column("key").to_pylist(), strict=True))
