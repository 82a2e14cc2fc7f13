"""The whole configuration of an index as one typed, flat YAML; every unknown or impossible thing in it is an error.

Every setting that changes what is stored enters fingerprints; `workers`, `pools` and `ray` never do.
"""

import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from cbir._mistakes import mistakes
from cbir._yaml import put, read_yaml
from cbir.collection import InputSpec
from cbir.encoding.encoder import EncoderSpec
from cbir.errors import ConfigError
from cbir.features.describer import Describer
from cbir.features.extractor import ExtractorSpec
from cbir.features.masks.mask import MaskSpec
from cbir.features.regions.proposer import ProposerSpec
from cbir.images import Limits
from cbir.index.index import IndexSpec
from cbir.rerank.reranker import FusionSpec, RerankerSpec
from cbir.spec import Spec, nearest, one_of

__all__ = [
    "Channel",
    "Codebooks",
    "Config",
    "Evaluate",
    "Pool",
    "Pools",
    "Reindex",
    "Sample",
    "Search",
    "assets_of",
    "load_config",
    "parse_config",
]

if TYPE_CHECKING:
    Extractor = ExtractorSpec
    Proposer = ProposerSpec
    Mask = MaskSpec
    Encoder = EncoderSpec
    Index = IndexSpec
    Reranker = RerankerSpec
    Fusion = FusionSpec
else:
    Extractor, Encoder, Index = one_of("extractor"), one_of("encoder"), one_of("index")
    Proposer, Mask = one_of("proposer"), one_of("mask")
    Reranker, Fusion = one_of("reranker"), one_of("fusion")

T = TypeVar("T")

ChannelName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Codebooks(Spec):
    """The trained state of another index, such as one of a larger collection or the version before.

    Its channel must have the same extractor, encoders and index. What is counted over a whole collection, such as idf,
    is counted over this one.
    """

    store: Annotated[str, StringConstraints(min_length=1)]
    """Where that index is: a folder or s3://bucket/prefix."""
    version: PositiveInt | None = None
    """Which of its versions; unset: the current one when the run starts."""
    channel: ChannelName | None = None
    """Which of its channels; unset: the one with the same name."""


class Channel(Spec):
    """One way to describe images: an extractor, the encoders after it, and the index of the result."""

    extractor: Extractor
    """From pixels to features."""
    mask: Mask | None = None
    """What of an image is wanted, of queries too: local features elsewhere are dropped, maps count less there."""
    proposer: Proposer | None = None
    """Which boxes of an indexed image may be objects, for encoders and indexes that look at regions."""
    encoders: tuple[Encoder, ...] = ()
    """From features to what the index holds: one after the other, in this order."""
    index: Index
    """How the results of the encoders are stored and compared."""
    codebooks: Codebooks | None = None
    """Take encoders and index as they were trained for another index, instead of training them on a sample of this
    collection."""
    keep_features: bool = False
    """Publish the extractor's features beside the index, for rerankers that need them."""
    keep_signatures: bool = False
    """Publish words, short codes and places of the features beside an inverted index, for verification by words."""

    @property
    def assets(self) -> dict[str, str]:
        """Files that it needs: those of the extractor by field, of its parts by `extractor.part.field`, of mask and
        proposer by `mask.field`, of encoders by `encoders.0.field`."""
        files = {f"extractor.{field}" if "." in field else field: uri for field, uri in self.extractor.assets.items()}
        more: dict[str, MaskSpec | ProposerSpec | EncoderSpec] = {
            method.role: method for method in (self.mask, self.proposer) if method is not None
        }
        more |= {f"encoders.{position}": encoder for position, encoder in enumerate(self.encoders)}
        return files | {f"{part}.{field}": uri for part, method in more.items() for field, uri in method.assets.items()}

    def describer(self, device: str, assets: Mapping[str, Path], *, regions: bool = True) -> Describer:
        """What makes its features of decoded images, on a torch device, with its assets as local files.

        Without `regions`, as for queries, nothing is proposed, and the assets of the proposer are not needed.
        """
        spec = self.extractor if regions else self.extractor.for_queries
        extractor = spec.build(device, assets_of("extractor", assets))
        mask, proposer = self.mask, self.proposer if regions else None
        return Describer(
            extractor,
            mask.build(device, assets_of("mask", assets)) if mask else None,
            mask.threshold if mask else 0.0,
            proposer.build(device, assets_of("proposer", assets)) if proposer else None,
        )

    @model_validator(mode="after")
    def _masks_and_regions_are_of_local_features(self) -> Self:
        mask = None if self.extractor.weighs_places else self.mask
        for place, method in (("mask", mask), ("proposer", self.proposer)):
            if method is not None and not self.extractor.local:
                raise ValueError(
                    f"{place}: needs local features, but {self.extractor.name} has one descriptor per image; "
                    "remove it, or use a local extractor such as sift"
                    f"{', or deep with a pooling that weighs places' if place == 'mask' else ''}"
                )
        readers: dict[str, EncoderSpec | IndexSpec] = {"index": self.index}
        readers |= {f"encoders.{position}": encoder for position, encoder in enumerate(self.encoders)}
        for place, reader in readers.items():
            if reader.needs_regions and self.proposer is None:
                raise ValueError(
                    f"{place}: {reader.name} looks at the regions of an image, but nothing proposes any; "
                    "add proposer: {name: grid} or another one to the channel"
                )
        return self

    @model_validator(mode="after")
    def _one_descriptor_per_image(self) -> Self:
        is_local = self.extractor.local
        for position, encoder in enumerate(self.encoders):
            if encoder.aggregates and not is_local:
                raise ValueError(
                    f"encoders.{position}: {encoder.name} aggregates local features, but at this place there is one "
                    f"descriptor per image; remove it, or use a local extractor such as sift"
                )
            if encoder.needs_one_row and is_local:
                raise ValueError(
                    f"encoders.{position}: {encoder.name} learns from one descriptor per image, but at this place "
                    "there are local features; put an encoder such as {name: vlad} before it"
                )
            is_local = is_local and not encoder.aggregates
        index = self.index.name
        if is_local and not self.index.local:
            raise ValueError(
                f"encoders: the index {index} holds one descriptor per image, but nothing aggregates the local "
                f"features of {self.extractor.name}; add an encoder such as {{name: vlad}}, or use an inverted "
                "index such as {name: asmk}"
            )
        if self.index.local and not is_local:
            raise ValueError(
                f"index: {index} holds the local features of an image, but here there is one descriptor per image; "
                "use the index flat or ivfpq, or a local extractor without an aggregating encoder"
            )
        if self.keep_signatures and not self.index.local:
            raise ValueError(f"keep_signatures: the index {index} has no visual words; use keep_features instead")
        return self


def assets_of(part: str, assets: Mapping[str, T]) -> dict[str, T]:
    """Those of one part of a channel (`extractor`, `mask`, `encoders.0`) by field, of all as by `Channel.assets`."""
    fields = {name: asset for name, asset in assets.items() if "." not in name and part == "extractor"}
    prefix = f"{part}."
    return fields | {name[len(prefix) :]: asset for name, asset in assets.items() if name.startswith(prefix)}


class Search(Spec):
    """What happens between the indexes and the answer."""

    depth: PositiveInt = 100
    """How many candidates each channel gives to fusion and re-ranking, and how many results there can be."""
    fuse: Fusion | None = None
    """How the rankings of several channels become one; needed if there are several."""
    rerank: tuple[Reranker, ...] = ()
    """What improves the ranking: one after the other, in this order."""


class Floor(Spec):
    """What a version needs to be published: the least quality and size, and the largest loss."""

    map: NonNegativeFloat | None = None
    """Mean average precision, rectangle form."""
    recall_at_1: NonNegativeFloat | None = None
    """Share of the queries whose first result is right."""
    ann_recall: NonNegativeFloat | None = None
    """Recall@10 of the index against exact search over the same vectors."""
    images: NonNegativeInt | None = None
    """How many images are indexed: a source that lost half of its images must not be published."""
    quarantined: NonNegativeFloat | None = None
    """The largest share of the images that could not be used; this one is a ceiling."""


class Evaluate(Spec):
    """How the quality of a version is measured before it is published."""

    ground_truth: str | None = None
    """A CSV (image, instance_id, role) or an Oxford-style JSON: with it, every version is measured."""
    protocol: Literal["easy", "medium", "hard"] = "medium"
    """Which graded labels of an Oxford-style JSON are asked for."""
    probes: NonNegativeInt = 100
    """How many indexed images serve as queries of the comparison with exact search."""
    floor: Floor = Floor()

    @model_validator(mode="after")
    def _floors_can_be_measured(self) -> Self:
        for name in ("map", "recall_at_1"):
            if getattr(self.floor, name) is not None and self.ground_truth is None:
                raise ValueError(f"floor.{name}: can be measured only with evaluate.ground_truth; set that too")
        if self.floor.ann_recall is not None and not self.probes:
            raise ValueError("floor.ann_recall: can be measured only with evaluate.probes above 0")
        return self


class Reindex(Spec):
    """When `cbir reindex` trains codebooks again instead of appending to the index with those that are there.

    New images are compared with those that the codebooks were trained on.
    """

    retrain: Literal["auto", "always", "never"] = "auto"
    """auto: by the figures below."""
    images: PositiveInt = 200
    """Fewer new images since the last version decide nothing by themselves; what all images show counts every time."""
    error: PositiveFloat = 1.25
    """The quantisation error (mean squared distance to list or word) of new images, and of all, over that of old ones,
    at most."""
    imbalance: PositiveFloat = 2.0
    """The imbalance factor of the lists or words of all images over that of old ones, at most."""
    entropy: PositiveFloat = 0.8
    """The entropy of the assignment of all images to lists or words over that of old ones, at least."""
    recall: NonNegativeFloat = 0.05
    """How much less recall@10 against exact search may be for new images as queries than for old ones."""


class Sample(Spec):
    """The images that codebooks are trained on, drawn over all shards by a seeded hash of the image id."""

    images: PositiveInt = 50_000
    """About how many images, at most."""
    features: PositiveInt = 2_000_000
    """About how many features of these images in all, at most."""
    seed: NonNegativeInt = 0


class Pool(Spec):
    """The worker processes of some stages; unset fields follow the configuration's `workers`, one CPU and no GPU."""

    workers: PositiveInt | None = None
    """Worker processes."""
    cpus: NonNegativeFloat = 1.0
    """Processors of one worker."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of one worker; two workers with 0.5 share one."""
    memory_gb: NonNegativeFloat = 0.0
    """Memory that Ray sets aside for one worker, in 10^9 bytes; 0: none."""


class Pools(Spec):
    """Workers by stage; catalog, sample, train and merge are run by the `build` pool."""

    extract: Pool = Pool()
    build: Pool = Pool()


_STRING_OR_STRINGS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
    "title": "Images",
}


class Config(Spec):
    """A whole index: where the images are, how they are described, how they are searched, where the index goes."""

    images: Annotated[tuple[str, ...], Field(min_length=1), WithJsonSchema(_STRING_OR_STRINGS)]
    """Where the images are: a folder, bucket, prefix, tar or Parquet file, or a list of these."""
    store: Annotated[str, StringConstraints(min_length=1)]
    """Where the index goes: a folder or s3://bucket/prefix."""
    input: InputSpec = InputSpec()
    limits: Limits = Limits()
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of images that may be quarantined before the run stops."""
    sample: Sample = Sample()
    channels: dict[ChannelName, Channel] = Field(min_length=1)
    """The ways to describe images, by a name of your own."""
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
    reindex: Reindex = Reindex()
    partition_megabytes: PositiveInt = 4096
    """The size of a partition, which is what one query actor holds."""
    workers: NonNegativeInt = 2
    """Worker processes; 0 runs every stage in this process, with the same bytes."""
    pools: Pools = Pools()
    ray: str | None = None
    """Address of a running Ray cluster; without it, one is started on this machine."""

    @model_validator(mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("images"), str):
            return {**data, "images": [data["images"]]}
        return data

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        self._check_store()
        self._check_input()
        self._check_fusion()
        for position, reranker in enumerate(self.search.rerank):
            self._check_reranker(f"search.rerank.{position}", reranker)
        return self

    def _check_store(self) -> None:
        for position, source in enumerate(self.images):
            if _lies_in(self.store, source):
                raise ValueError(
                    f"store: {self.store} lies in images.{position} ({source}), where its files would be taken for "
                    "images; choose a place outside of it"
                )

    def _check_input(self) -> None:
        has_vectors = self.input.format == "vectors"
        for name, channel in self.channels.items():
            extractor = channel.extractor
            if extractor.reads_vectors and not has_vectors:
                raise ValueError(
                    f"channels.{name}.extractor: {extractor.name} takes vectors of Parquet files in place of images; "
                    "set input.format: vectors"
                )
            if has_vectors and not extractor.reads_vectors:
                raise ValueError(
                    f"channels.{name}.extractor: {extractor.name} needs pictures, but input.format: vectors has none; "
                    "use {name: vectors, dim: ...}, or another input.format"
                )

    def _check_fusion(self) -> None:
        fuse = self.search.fuse
        if fuse is None:
            if len(self.channels) > 1:
                raise ValueError("search.fuse: several channels need a fusion; add {name: late}")
            return
        for name in fuse.channels:
            if name not in self.channels:
                raise ValueError(f"search.fuse.weights.{name}: no channel {name!r}{nearest(name, self.channels)}")

    def _check_reranker(self, path: str, reranker: RerankerSpec) -> None:
        if reranker.channel is None:
            return
        channel = self.channels.get(reranker.channel)
        if channel is None:
            hint = nearest(reranker.channel, self.channels)
            raise ValueError(f"{path}.channel: no channel {reranker.channel!r}{hint}")
        if not channel.extractor.local:
            raise ValueError(
                f"{path}.channel: needs local features, but {reranker.channel!r} has one descriptor per image"
            )
        if reranker.reads == "signatures" and not channel.index.local:
            raise ValueError(
                f"{path}: matches features by their visual words, but the index of {reranker.channel!r} has none; use "
                "an inverted index such as {name: asmk}, or matches: ratio"
            )
        if reranker.reads is not None and not getattr(channel, f"keep_{reranker.reads}"):
            raise ValueError(
                f"{path}: needs the {reranker.reads} of its channel; set "
                f"channels.{reranker.channel}.keep_{reranker.reads}: true"
            )


def _lies_in(place: str, folder: str) -> bool:
    """By their names alone, so that the answer does not depend on where the configuration is read."""
    place, folder = (posixpath.normpath(name.removeprefix("file://")) for name in (place, folder))
    return place == folder or place.startswith(folder.rstrip("/") + "/")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file; `overrides` are `dotted.path=value` with a YAML value, as of `--set` on the command line."""
    data = read_yaml(path)
    for override in overrides:
        put(data, override)
    return parse_config(data, str(path))


def parse_config(data: Mapping[str, Any], place: str) -> Config:
    """Validate plain data; ConfigError lists every mistake with its YAML path."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {mistake}" for mistake in mistakes(error))
        raise ConfigError(f"{place} is not a valid configuration:\n{lines}") from None
