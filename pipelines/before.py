"""The version that a run goes on from: the shards it was made of, its trained state, and the work that knows images."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cbir.artifacts import Done, find_done
from cbir.collection import ImageShard
from cbir.config import Config, parse_config
from cbir.layout import Layout
from cbir.storage import Store
from cbir.versions import Manifest, Versions
from pipelines.assets import differences, published_channel, store_asset
from pipelines.build import build_fingerprint
from pipelines.extract import ExtractTask
from pipelines.plans import read_plan
from pipelines.work import Asset, ChannelWork

__all__ = ["Before"]


_SOME_SHARDS = 16


@dataclass(frozen=True)
class Before:
    """The version that CURRENT named when the run began."""

    store: Store
    manifest: Manifest
    shards: Sequence[ImageShard]

    @classmethod
    def load(cls, store: Store) -> "Before | None":
        """That of a store; None if nothing was published, or by a cbir that kept no plan."""
        versions = Versions(store)
        if versions.current() is None:
            return None
        manifest = versions.load()
        file = next((file for file in manifest.files if file.key == manifest.plan), None)
        return None if file is None else cls(store, manifest, read_plan(store, file))

    def as_found(self, shards: Sequence[ImageShard]) -> list[ImageShard]:
        """Shards of a listing with the `content` that a look at their bytes found, if they have not changed since."""
        found = {(old.source, old.name, old.objects): old.content for old in self.shards if old.content}
        return [replace(shard, content=found.get((shard.source, shard.name, shard.objects), "")) for shard in shards]

    def knowledge(
        self, shards: Sequence[ImageShard], work: ChannelWork, config: Config, train: Done | None = None
    ) -> Asset | None:
        """The list for `KnownImages.of` of the work on what is not among these shards any more; None if all is.

        With `train`, also of the entries that were made with it.
        """
        now = {shard.identity for shard in shards}
        gone = [shard for shard in self.shards if shard.identity not in now]
        rows = [
            [extract, build_fingerprint(work, extract, train) if train else ""]
            for extract in self._extracts(gone, work, config)
        ]
        return store_asset(self.store, json.dumps(rows).encode(), ".json") if rows else None

    @cached_property
    def _config(self) -> Config:
        return parse_config(self.manifest.config, f"version {self.manifest.version} of {self.store.uri}")

    @staticmethod
    def _extracts(shards: Sequence[ImageShard], work: ChannelWork, config: Config) -> list[str]:
        """The fingerprints of `extract` of shards from sources that are there still."""
        return [ExtractTask.of(shard, work, config).fingerprint for shard in shards if shard.source in config.images]

    def trains(self, works: Sequence[ChannelWork]) -> dict[str, Done]:
        """Records of the trained state of the channels that are described and trained as they were then."""
        trains: dict[str, Done] = {}
        for work in (work for work in works if work.name in self._config.channels):
            theirs = published_channel(self.manifest, self._config, work.name)
            given, held = ([state.sha256 for state in one.states] for one in (work, theirs))
            if differences(work, theirs) is None and given in ([], held):
                key = theirs.states[-1].key
                trains.update((work.name, done) for done in self._trained() if done.file("index").key == key)
        return trains

    def difference(self, work: ChannelWork) -> str:
        """How a channel differs from what it was, in words."""
        if work.name not in self._config.channels:
            return "the version before has no such channel"
        theirs = published_channel(self.manifest, self._config, work.name)
        return differences(work, theirs) or "the trained state of the version before is gone, or was given anew"

    def some_features(self, work: ChannelWork, config: Config) -> list[Done]:
        """The features of a few of its shards."""
        extracts = sorted(self._extracts(self.shards, work, config))[:_SOME_SHARDS]
        return [done for done in (find_done(self.store, "extract", extract) for extract in extracts) if done]

    def _trained(self) -> Iterator[Done]:
        """The records of `train` that the version rests on, of any channel."""
        for prefix in self.manifest.work:
            _, stage, fingerprint, _ = prefix.split("/")
            done = find_done(self.store, stage, fingerprint) if stage == "train" else None
            if done is not None:
                yield done

    def backgrounds(self) -> dict[str, float]:
        """What the fusion knew of irrelevant images, by channel."""
        layout = Layout.from_json(self.manifest.layout)
        return {name: part.background for name, part in layout.channels.items() if part.background is not None}
