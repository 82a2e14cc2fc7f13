"""Several configurations measured one after the other, for one table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cbir.config import Config, Evaluate, load_config, parse_config
from cbir.errors import ArtifactError, CbirError, ConfigError
from cbir.evaluation.comparison import Comparison, Figures, Row
from cbir.layout import Layout
from cbir.search import Searcher, searcher_of
from cbir.storage import Store, open_store
from cbir.versions import Manifest, Versions
from pipelines.quality import RawFeatures, judge
from pipelines.terminal import CONFIG_SUFFIXES, store_of

__all__ = ["Candidate", "Measurement", "candidates", "compare", "is_folder_of_configurations"]

SETTINGS = ("images", "input", "limits", "sample", "channels", "search")
"""What a version and a configuration must have in common, so that the one was built by the other."""


def is_folder_of_configurations(index: str) -> bool:
    """Whether it holds YAML files and is no store."""
    folder = Path(index)
    return folder.is_dir() and not (folder / "CURRENT").exists() and any(_configurations(folder))


def _configurations(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix in CONFIG_SUFFIXES)


@dataclass(frozen=True)
class Candidate:
    """What is measured, a store or a configuration, and the name of its row."""

    name: str
    index: str


def candidates(indexes: Sequence[str]) -> list[Candidate]:
    """Stores and configurations as given; a folder of configurations stands for all of them, by their names."""
    found = []
    for index in indexes:
        if is_folder_of_configurations(index):
            paths = _configurations(Path(index))
            found += [Candidate(path.relative_to(index).with_suffix("").as_posix(), str(path)) for path in paths]
        else:
            found.append(Candidate(Path(index).stem if index.endswith(CONFIG_SUFFIXES) else index, index))
    if len({candidate.name for candidate in found}) < len(found):
        return [Candidate(candidate.index, candidate.index) for candidate in found]
    return found


@dataclass(frozen=True)
class Measurement:
    """How every configuration is measured: a ground truth and a protocol in place of its own, if they are given, and
    whether the rankings before re-ranking are judged too."""

    ground_truth: str | None = None
    protocol: Literal["easy", "medium", "hard"] | None = None
    before_reranking: bool = False
    raw_features: Callable[[Searcher], RawFeatures] | None = None
    """The features of the queries, for a caller that has extracted them; the time of a query is then without that."""

    def truth(self, settings: Evaluate) -> str:
        """The ground truth of an index with these settings; ConfigError if there is none."""
        if (path := self.ground_truth or settings.ground_truth) is None:
            raise ConfigError("no ground truth: give --ground-truth FILE, or set evaluate.ground_truth in the YAML")
        return path


def compare(
    chosen: Sequence[Candidate],
    measurement: Measurement,
    on_progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> Comparison:
    """A row for each; what keeps one of them from being measured becomes its row, and the others go on."""
    rows = []
    for candidate in chosen:
        try:
            rows.append(_measured(candidate, measurement, on_progress))
        except (CbirError, OSError) as error:
            rows.append(Row(candidate.name, error=" ".join(str(error).split())))
    return Comparison(tuple(rows))


def _measured(candidate: Candidate, measurement: Measurement, on_progress: Callable[[str, int, int], None]) -> Row:
    store, manifest, settings = _opened(candidate.index)
    truth = measurement.truth(settings)
    searcher = searcher_of(store, manifest)
    judged = judge(
        searcher,
        truth,
        measurement.protocol or settings.protocol,
        lambda done, total: on_progress(candidate.name, done, total),
        measurement.raw_features(searcher) if measurement.raw_features else None,
    )
    before = judged.before_reranking if measurement.before_reranking else None
    index_bytes, feature_bytes = _bytes_per_image(manifest)
    return Row(
        candidate.name,
        judged.truth.name,
        Figures.of(judged.quality, judged.query_seconds),
        Figures.of(before.quality, before.query_seconds) if before is not None else None,
        manifest.version,
        manifest.counts["indexed"],
        len(judged.quality.queries),
        index_bytes,
        feature_bytes,
    )


def _opened(index: str) -> tuple[Store, Manifest, Evaluate]:
    """The version to measure, and the settings of its evaluation: the YAML's where a YAML is given."""
    if index.endswith(CONFIG_SUFFIXES):
        config = load_config(index)
        store = open_store(config.store)
        return store, _built_by(config, Versions(store)), config.evaluate
    store = store_of(index)
    manifest = Versions(store).load()
    return store, manifest, parse_config(manifest.config, f"version {manifest.version} of {store.uri}").evaluate


def _built_by(config: Config, versions: Versions) -> Manifest:
    """The version of this configuration: the current one, else the newest, because configurations may share a store."""
    current = versions.load()
    if not (differing := _differing(config, current)):
        return current
    for number in reversed(versions.numbers()):
        manifest = versions.load(number)
        if not _differing(config, manifest):
            return manifest
    raise ArtifactError(
        f"{versions.store.uri} has no version of this configuration (the current one has other settings of "
        f"{', '.join(differing)}); run `cbir index` with it"
    )


def _differing(config: Config, manifest: Manifest) -> list[str]:
    """The settings in which a version was built otherwise; every one of a version that this cbir cannot read."""
    try:
        theirs = parse_config(manifest.config, f"version {manifest.version}")
    except ConfigError:
        return list(SETTINGS)
    return [key for key in SETTINGS if getattr(theirs, key) != getattr(config, key)]


def _bytes_per_image(manifest: Manifest) -> tuple[float, float]:
    """Of the index, and of what is kept of the features for re-ranking; without what was trained."""
    sizes = {file.key: file.num_bytes for file in manifest.files}
    parts = Layout.from_json(manifest.layout).partitions
    index = {key for part in parts for keys in part.indexes.values() for key in keys}
    kept = {key for part in parts for key in (*part.features.values(), *part.signatures.values())}
    images = max(manifest.counts["indexed"], 1)
    return sum(sizes[key] for key in index) / images, sum(sizes[key] for key in kept) / images
