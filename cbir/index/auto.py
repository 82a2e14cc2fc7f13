"""The index that is chosen by measuring several on the sample."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import faiss
import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from cbir.errors import ArtifactError
from cbir.index.choice import Choice, candidates, choose
from cbir.index.codes import inverted_file
from cbir.index.dense import Metric, open_mapped
from cbir.index.flat import Flat
from cbir.index.index import Assignment, Index, IndexSpec, SearchIndex
from cbir.index.ivfflat import IvfFlat
from cbir.index.ivfpq import IvfPq
from cbir.index.ivfrabitq import IvfRabitq
from cbir.index.scalar import NumberFormat, ScalarCode
from cbir.types import FeatureBatch, State

__all__ = ["Auto", "AutoIndex"]

_KEY = "choice"


class Auto(IndexSpec):
    """Chooses an index by measuring (as Muja and Lowe 2009): of a few that fit into `bytes`, the one that reads the
    fewest bytes of codes per query among those with the recall wanted; if none has it, the one with the best.

    Tried are `flat`, `ivfflat` (float16, sq8), `ivfpq` (also with `opq`) and `ivfrabitq`, with `refine` where it fits
    and as few `probes` as are needed. Part of the sample serves as queries, on which nothing is trained. In a
    collection much larger than the sample neighbours are closer, and short codes find fewer of them: see what the build
    measures. A sample of less than 320 images gives `flat`. Partitions and entries are those of the index chosen.
    """

    name: Literal["auto"] = "auto"
    paper: ClassVar[str] = (
        "Muja and Lowe, Fast approximate nearest neighbors with automatic algorithm configuration, VISAPP 2009"
    )
    suffix: ClassVar[str] = "faiss"

    recall: float = Field(
        default=0.95, gt=0, le=1, description="the recall@10 wanted, against exact search, for vectors not indexed"
    )
    bytes: PositiveInt = Field(default=32, description="the most bytes of a vector's codes; ids are not counted")
    metric: Metric = Field(default="ip", description="ip: inner product; l2: Euclidean distance")

    def train(self, sample: FeatureBatch, seed: int) -> "AutoIndex":
        """Try, choose, and train the index chosen; DataError for values that are not finite."""
        return AutoIndex(*choose(sample, self.recall, self.bytes, self.metric, seed))

    def restore(self, state: State) -> "AutoIndex":
        """The index chosen, from its own state and the record of the choice."""
        choice = Choice.from_json(json.loads(state[_KEY].tobytes()))
        return AutoIndex(choice.spec, choice.spec.restore(state), choice)

    def load(self, *paths: Path) -> SearchIndex:
        """Open a partition as that of the index which it says it is."""
        (path,) = paths
        return _spec_of(open_mapped(path), path, self.metric).load(path)

    def entry_bytes(self, dim: int) -> int:
        """The most that one of the indexes to try takes."""
        return max(spec.entry_bytes(dim) for spec in candidates(dim, self.bytes, self.metric))


class AutoIndex(Index):
    """A trained index of the settings `spec`, and why it was chosen."""

    def __init__(self, spec: IndexSpec, index: Index, choice: Choice) -> None:
        self.spec, self.choice, self._index = spec, choice, index

    def entries(self, batch: FeatureBatch) -> pa.Table:
        """Those of the index chosen."""
        return self._index.entries(batch)

    def assignment(self, batch: FeatureBatch) -> Assignment | None:
        """That of the index chosen."""
        return self._index.assignment(batch)

    def build(self, entries: pa.Table, totals: State | None = None) -> SearchIndex:
        """A partition of the index chosen."""
        return self._index.build(entries, totals)

    def state(self) -> State:
        """That of the index chosen, and `choice`, the record as JSON."""
        record = json.dumps(self.choice.to_json(), sort_keys=True).encode()
        return {**self._index.state(), _KEY: np.frombuffer(record, np.uint8)}


def _spec_of(index: faiss.Index, path: Path, metric: Metric) -> IndexSpec:
    """The settings with which a partition is opened, as far as they matter to a search."""
    inner: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    if isinstance(inner, faiss.IndexFlat):
        return Flat(metric=metric)
    refine: NumberFormat | None = None
    if isinstance(inner, faiss.IndexRefine):
        refine = ScalarCode.of_index(faiss.downcast_index(inner.refine_index)).form
        inner = faiss.downcast_index(inner.base_index)
    ivf = inverted_file(inner)
    if isinstance(ivf, faiss.IndexIVFScalarQuantizer):
        return IvfFlat(probes=ivf.nprobe, metric=metric, code=ScalarCode.of_index(ivf).form)
    if isinstance(ivf, faiss.IndexIVFPQ):
        return IvfPq(probes=ivf.nprobe, metric=metric, refine=refine)
    if isinstance(ivf, faiss.IndexIVFRaBitQ):
        return IvfRabitq(probes=ivf.nprobe, metric=metric, refine=refine)
    raise ArtifactError(f"{path}: holds a faiss {type(ivf).__name__}, which the index auto never chooses")
