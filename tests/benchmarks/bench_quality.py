"""How good the methods are on real photographs: `python tests/benchmarks/bench_quality.py [--store DIR] [NAME ...]`.

A method is one YAML below tests/benchmarks/quality/ (or `--configs DIR`): its channels and its search, without images
and store. Each is trained once, on the databases of all sets and the distractors, as the references are; then it
indexes every set's database together with the distractors, and is measured before and after re-ranking. NAMEs choose
some methods or folders, such as `vlad` or `global`. The photographs and weights are found through CBIR_TEST_DATA, which
the YAMLs may name as `${CBIR_TEST_DATA}`. With `--store`, a second run reuses what the first made.

ms/query is the time of search and re-ranking over the whole index with one thread; the extraction of the queries, which
is done once for all methods, is not in it.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported; the processes below share the processors

import numpy as np
import pyarrow as pa
import pyarrow.csv
import yaml

from cbir.config import load_config
from cbir.evaluation.comparison import Comparison, Row, Table
from cbir.evaluation.ground_truth import GroundTruthQuery, read_ground_truth
from cbir.search import Searcher
from cbir.spec import fingerprint
from cbir.types import FeatureBatch
from pipelines.comparison import Measurement, candidates, compare
from pipelines.indexing import index
from pipelines.quality import RawFeatures
from pipelines.work import limit_threads

PROJECT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.setdefault("CBIR_TEST_DATA", str(PROJECT.parent / "shared" / "data")))
SETS = ("smvs_dvd", "paintings", "grocery_packages", "koe_places", "sfm_scenes")
PROCESSES = 2

REFERENCES = {
    "reference: the same network, plain script": (0.212, 0.843, 0.265, 0.762, 0.952),
    "reference: the same at 3 scales, whitened to 512 on the distractors": (0.339, 0.865, 0.283, 0.787, 0.983),
    "reference: VLAD, 64 words": (0.805, 0.895, 0.467, 0.633, 0.787),
    "reference: 16,384 words, tf-idf": (0.752, 0.837, 0.615, 0.688, 0.801),
    "reference: ASMK*, 16,384 words, 128 bits": (0.978, 0.985, 0.722, 0.687, 0.833),
    "reference: ASMK* and re-ranking of the best 100": (1.000, 0.986, 0.770, None, None),
    "reference: vocabulary tree of COLMAP, verified": (0.982, 0.935, None, None, None),
    "reference: plain sum of the network and ASMK*": (0.984, 0.987, 0.650, 0.807, 0.993),
}
"""mAP on the same sets by programs that share no code with this one."""


def truth_file(photographs: str) -> Path:
    return DATA / "photos" / photographs / "ground_truth.csv"


def link_databases(folder: Path) -> None:
    """A folder for each set and for the distractors, with links to the images that may be found."""
    for photographs in (*SETS, "distractors"):
        rows = pa.csv.read_csv(truth_file(photographs)).to_pylist()
        for image in (row["image"] for row in rows if row["role"] != "query"):
            link = folder / photographs / image.removeprefix("images/")
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(truth_file(photographs).parent / image)


class Configurations:
    """The configurations of all methods: one that trains each, and one for each set; all in one store."""

    def __init__(self, folder: Path, methods: Sequence[Path], store: Path) -> None:
        self._folder, self._store, self.methods = folder, store, methods
        self._databases = store.with_name(f"{store.name}-databases")
        link_databases(self._databases)

    def of_set(self, photographs: str) -> Path:
        """The folder of those of one set."""
        return self._folder / photographs

    def training(self, method: Path) -> Path:
        """Writes the one that trains a method."""
        return self._write("training", method, [self._databases], None)

    def write(self, method: Path, trained: int) -> None:
        """Writes those of a method for all sets, with the codebooks of a version."""
        for photographs in SETS:
            self._write(photographs, method, [self._databases / name for name in (photographs, "distractors")], trained)

    def _write(self, folder: str, method: Path, images: Sequence[Path], trained: int | None) -> Path:
        settings = yaml.safe_load(os.path.expandvars(method.read_text()))
        settings |= {"images": [str(place) for place in images], "store": str(self._store), "workers": 0}
        settings["evaluate"] = {"probes": 0}
        if trained is not None:
            settings["evaluate"]["ground_truth"] = str(truth_file(folder))
            for channel in settings["channels"].values():
                channel["codebooks"] = {"store": str(self._store), "version": trained}
        path = self._folder / folder / method.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path


class QueryFeatures:
    """Raw features of a set's queries, extracted once for all methods that share an extractor."""

    def __init__(self, photographs: str) -> None:
        self._truth = read_ground_truth(truth_file(photographs))
        self._held: dict[tuple[str, str], FeatureBatch] = {}

    def of(self, searcher: Searcher) -> RawFeatures:
        """As the channels of this searcher describe them."""
        return partial(self._features, searcher)

    def _features(self, searcher: Searcher, queries: Sequence[GroundTruthQuery]) -> Mapping[str, FeatureBatch]:
        channels = {name: self._identity(searcher, name) for name in searcher.config.channels}
        for query in queries:
            if any((identity, query.image) not in self._held for identity in channels.values()):
                extracted = searcher.encoder.extract([self._truth.picture(query).read_bytes()], [query.box])
                self._held |= {(channels[name], query.image): batch for name, batch in extracted.items()}
        return {
            name: FeatureBatch.concatenate([self._held[identity, query.image] for query in queries])
            for name, identity in channels.items()
        }

    @staticmethod
    def _identity(searcher: Searcher, channel: str) -> str:
        """Of all that comes before the encoders."""
        return fingerprint(searcher.config.channels[channel].model_dump(mode="json", include={"extractor", "mask"}))


def measured(photographs: str, folder: Path) -> tuple[Row, ...]:
    """All methods on one set, in this process."""
    limit_threads()
    chosen = candidates([str(folder)])
    for candidate in chosen:
        index(load_config(candidate.index))
    measurement = Measurement(before_reranking=True, raw_features=QueryFeatures(photographs).of)
    return compare(chosen, measurement, partial(print_progress, photographs)).rows


def print_progress(photographs: str, name: str, done: int, total: int) -> None:
    if done == total:
        print(f"{photographs}: {name}", file=sys.stderr, flush=True)


def with_references(table: Table) -> str:
    """Markdown, with the references below the methods."""
    lines = [table.markdown()]
    for name, precisions in REFERENCES.items():
        known = ["" if value is None else f"{value:.3f}" for value in precisions]
        mean = [
            f"{np.mean([value for value in precisions if value is not None]):.3f}" if None not in precisions else ""
        ]
        blank = [""] * (len(table.header) - len(known) - 2)
        lines.append(f"| {' | '.join([name, *known, *mean, *blank])} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these methods or folders")
    parser.add_argument("--configs", type=Path, default=Path(__file__).parent / "quality", help="folder of YAMLs")
    parser.add_argument("--store", help="keep the work in this folder")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if not (DATA / "photos").is_dir():
        sys.exit(f"no photographs at {DATA}/photos; set CBIR_TEST_DATA")
    found = sorted(chosen.configs.rglob("*.yaml"))
    methods = [path for path in found if not chosen.names or {path.stem, path.parent.name} & {*chosen.names}]
    if not methods:
        sys.exit(f"none of {', '.join(chosen.names) or '*.yaml'} in {chosen.configs}")
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as temporary:
        store = Path(chosen.store or f"{temporary}/store").resolve()
        configurations = Configurations(Path(temporary), methods, store)
        for method in methods:
            trained = index(load_config(configurations.training(method), [f"workers={PROCESSES}"]))
            configurations.write(method, trained.version)
            # The distractors belong to every set: all processes work on them here, and none of the later ones does.
            index(load_config(configurations.of_set(SETS[0]) / method.name, [f"workers={PROCESSES}"]))
            print(f"trained: {method.stem}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            rows = [row for some in pool.map(measured, SETS, map(configurations.of_set, SETS)) for row in some]
    print_tables(Comparison(tuple(rows)))


def print_tables(comparison: Comparison) -> None:
    overview = comparison.by_ground_truth()
    if overview is not None:
        print(with_references(overview), end="\n\n")
    print(comparison.table().markdown())
    for row in comparison.failed:
        print(f"{row.name}: {row.error}", file=sys.stderr)
    sys.exit(bool(comparison.failed))


if __name__ == "__main__":
    main()
