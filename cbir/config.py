"""The whole configuration of an index as one typed, flat YAML; every unknown or impossible thing in it is an error.

Every setting that changes what is stored enters fingerprints; `workers`, `pools` and `ray` never do.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cbir.collection import InputSpec
from cbir.encoding.encoder import EncoderSpec
from cbir.errors import ConfigError
from cbir.features.extractor import ExtractorSpec
from cbir.images import Limits
from cbir.index.index import IndexSpec
from cbir.rerank.reranker import FusionSpec, RerankerSpec
from cbir.spec import Spec, one_of

__all__ = ["Channel", "Config", "Evaluate", "Pool", "Pools", "Sample", "Search", "load_config", "parse_config"]

if TYPE_CHECKING:
    Extractor = ExtractorSpec
    Encoder = EncoderSpec
    Index = IndexSpec
    Reranker = RerankerSpec
    Fusion = FusionSpec
else:
    Extractor, Encoder, Index = one_of("extractor"), one_of("encoder"), one_of("index")
    Reranker, Fusion = one_of("reranker"), one_of("fusion")

ChannelName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Channel(Spec):
    """One way to describe images: an extractor, the encoders after it, and the index of the result."""

    extractor: Extractor
    encoders: tuple[Encoder, ...] = ()
    index: Index
    keep_features: bool = False
    """Publish the extractor's features beside the index, for rerankers that need them."""

    @model_validator(mode="after")
    def _one_descriptor_per_image(self) -> Self:
        is_local = self.extractor.local
        for position, encoder in enumerate(self.encoders):
            if encoder.aggregates and not is_local:
                raise ValueError(
                    f"encoders.{position}: {encoder.name} aggregates local features, but at this place there is one "  # type: ignore[attr-defined]
                    f"descriptor per image; remove it, or use a local extractor such as sift"
                )
            is_local = is_local and not encoder.aggregates
        if is_local:
            raise ValueError(
                "encoders: the index holds one descriptor per image, but nothing aggregates the local features of "
                f"{self.extractor.name}; add an encoder such as {{name: vlad}}"  # type: ignore[attr-defined]
            )
        return self


class Search(Spec):
    """What happens between the indexes and the answer."""

    depth: PositiveInt = 100
    """How many candidates each channel gives to fusion and re-ranking, and how many results there can be."""
    fuse: Fusion | None = None
    rerank: tuple[Reranker, ...] = ()


class Floor(Spec):
    """The least quality that a version needs to be published."""

    map: NonNegativeFloat | None = None
    recall_at_1: NonNegativeFloat | None = None
    ann_recall: NonNegativeFloat | None = None
    """Recall@10 of the index against exact search over the same vectors."""


class Evaluate(Spec):
    """How the quality of a version is measured before it is published."""

    ground_truth: str | None = None
    protocol: Literal["easy", "medium", "hard"] = "medium"
    probes: NonNegativeInt = 100
    """How many indexed images serve as queries of the comparison with exact search."""
    floor: Floor = Floor()


class Sample(Spec):
    """The images that codebooks are trained on, drawn over all shards by a seeded hash of the image id."""

    images: PositiveInt = 50_000
    features: PositiveInt = 2_000_000
    seed: NonNegativeInt = 0


class Pool(Spec):
    """The worker processes of some stages; unset fields follow the configuration's `workers`, one CPU and no GPU."""

    workers: PositiveInt | None = None
    cpus: NonNegativeFloat = 1.0
    gpus: NonNegativeFloat = 0.0
    memory_gb: NonNegativeFloat = 0.0


class Pools(Spec):
    """Workers by stage; catalog, sample, train and merge are run by the `build` pool."""

    extract: Pool = Pool()
    build: Pool = Pool()


class Config(Spec):
    """A whole index: where the images are, how they are described, how they are searched, where the index goes."""

    images: tuple[str, ...] = Field(min_length=1)
    store: str
    input: InputSpec = InputSpec()
    limits: Limits = Limits()
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of images that may be quarantined before the run stops."""
    sample: Sample = Sample()
    channels: dict[ChannelName, Channel] = Field(min_length=1)
    search: Search = Search()
    evaluate: Evaluate = Evaluate()
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
    def _channels_fit_together(self) -> Self:
        if len(self.channels) > 1 and self.search.fuse is None:
            raise ValueError("search.fuse: several channels need a fusion; add {name: late}")
        for position, reranker in enumerate(self.search.rerank):
            self._check_reranker(f"search.rerank.{position}", reranker)
        return self

    def _check_reranker(self, path: str, reranker: RerankerSpec) -> None:
        if reranker.channel is None:
            return
        channel = self.channels.get(reranker.channel)
        if channel is None:
            raise ValueError(
                f"{path}.channel: no channel {reranker.channel!r}{_among(reranker.channel, self.channels)}"
            )
        if not channel.keep_features:
            raise ValueError(
                f"{path}: needs the features of its channel; set channels.{reranker.channel}.keep_features: true"
            )
        if not channel.extractor.local:
            raise ValueError(
                f"{path}.channel: needs local features, but {reranker.channel!r} has one descriptor per image"
            )


def _among(word: str, words: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(words)}"


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file; `overrides` are `dotted.path=value` with a YAML value, as of `--set` on the command line."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of keys such as images, store and channels")
    for override in overrides:
        _override(data, override)
    return parse_config(data, str(path))


def parse_config(data: Mapping[str, Any], place: str) -> Config:
    """Validate plain data; ConfigError lists every mistake with its YAML path."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(detail)}" for detail in error.errors())
        raise ConfigError(f"{place} is not a valid configuration:\n{lines}") from None


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in _without_tags(detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "union_tag_invalid":
        tag, tags = detail["ctx"]["tag"], detail["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{path}.name: unknown method {tag!r}{_among(tag, tags)}"
    if detail["type"] in ("value_error", "unknown_key"):
        return f"{path}.{message}" if detail["type"] == "value_error" and path else f"{path or 'top level'}: {message}"
    if detail["type"] == "missing":
        return f"{path}: is missing"
    return f"{path}: {message}, found {detail['input']!r}"


def _without_tags(loc: Sequence[str | int]) -> list[str | int]:
    """The YAML path of a pydantic location, which also names the chosen member of a union."""
    path: list[str | int] = []
    for part in loc:
        chosen = path and (path[-1] in _METHOD_KEYS or (len(path) > 1 and path[-2] in _METHOD_LISTS))
        if chosen and isinstance(part, str) and part in _method_names():
            continue
        path.append(part)
    return path


_METHOD_KEYS = ("extractor", "index", "fuse", "pooling")
_METHOD_LISTS = ("encoders", "rerank")


def _method_names() -> set[str]:
    from cbir.spec import methods, roles

    return {name for role in roles() for name in methods(role)}


def _override(data: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override}: expected dotted.path=value")
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) and key.isdigit() else place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"--set {path}: {key} is a plain value, not a group of keys")
    if isinstance(place, list):
        place[int(last)] = yaml.safe_load(value)
    else:
        place[last] = yaml.safe_load(value)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error rather than silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
