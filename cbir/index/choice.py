"""The choice of an index for vectors, by what each of a few finds and costs on a sample.

What an index costs is the bytes of codes that a query reads: a figure that does not depend on the machine, so that the
same sample and seed always give the same choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cbir.evaluation.metrics import ann_recall
from cbir.index.dense import Metric, exact_search, float_rows
from cbir.index.flat import Flat
from cbir.index.index import Index, IndexSpec
from cbir.index.ivf import InvertedFile
from cbir.index.ivfflat import IvfFlat
from cbir.index.ivfpq import IvfPq
from cbir.index.ivfrabitq import IvfRabitq
from cbir.index.refine import RefinableFile
from cbir.index.scalar import NumberFormat, bytes_of
from cbir.spec import methods
from cbir.types import FeatureBatch, State

__all__ = ["Choice", "Trial", "candidates", "choose"]

DEPTH = 10
FORMS: tuple[NumberFormat, ...] = ("float16", "sq8")
"""Formats in which vectors are stored one number per dimension, the finest first."""
FLOAT16_MAX = float(np.finfo(np.float16).max)
LEAST_IMAGES = 320
"""The fewest of which 256 are left for the words of a code of 8 bits when a fifth of them are queries."""
MOST_QUERIES = 256
MOST_SEARCHED = 1 << 16
MOST_TRAINED = 1 << 14
"""How many vectors of a sample are searched, and how many of these the indexes that are tried are trained on; the
chosen one is then trained on the whole sample, and measured again."""

_QUERY_SHARE = 5
_NOISE = 0.005
"""More probes for less additional recall than this are not worth it where the recall wanted is out of reach: it is the
standard error of a recall of 0.95 that is measured with 200 queries."""


@dataclass(frozen=True)
class Trial:
    """An index that was tried, with the fewest probes that reach the recall wanted.

    `bytes`: of a code, ids not counted. `recall`: recall@10. `cost`: bytes of codes that a query reads for every vector
    that is indexed.
    """

    index: str
    bytes: int
    lists: int
    probes: int
    recall: float
    cost: float
    chosen: bool = False


@dataclass(frozen=True)
class Choice:
    """Which index was chosen and why.

    `recall` and `bytes` are what was wanted, `queries` and `vectors` what the trials were measured with, `index` the
    settings of the chosen index.
    """

    recall: float
    bytes: int
    queries: int
    vectors: int
    index: Mapping[str, Any]
    trials: tuple[Trial, ...]
    summary: str

    @property
    def spec(self) -> IndexSpec:
        """The chosen index."""
        return cast(IndexSpec, methods("index")[self.index["name"]].model_validate(self.index))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Choice":
        """Back from `to_json`, also after a round trip through JSON."""
        return cls(**{**data, "trials": tuple(Trial(**trial) for trial in data["trials"])})


def candidates(
    dim: int, num_bytes: int, metric: Metric, forms: Sequence[NumberFormat] = FORMS
) -> list[Flat | InvertedFile]:
    """The indexes to try for vectors of D = dim with codes of at most so many bytes; at least one always fits.

    Whole vectors; two bytes or one per dimension; product codes, then the same with a rotation; RaBitQ. Short codes are
    refined where the bytes suffice for that; a product code then has one byte for 8 dimensions, else up to one for two.
    `forms`: those of `FORMS` that hold the vectors.
    """
    found: list[Flat | InvertedFile] = [Flat(metric=metric)] if bytes_of("float32", dim) <= num_bytes else []
    found += [IvfFlat(code=form, metric=metric) for form in forms if bytes_of(form, dim) <= num_bytes]
    refine = _finest(dim, num_bytes - max(1, dim // 8), forms)
    parts = min(num_bytes, max(1, dim // (8 if refine else 2)))
    divisor = next(number for number in range(parts, 0, -1) if dim % number == 0)
    rest = dim % parts
    found.append(IvfPq(bytes=divisor, refine=refine, metric=metric))
    found.append(IvfPq(bytes=parts, refine=refine, metric=metric, opq=True, opq_dim=dim - rest if rest else None))
    short = IvfRabitq(metric=metric).code_bytes(dim)
    if short <= num_bytes:
        found.append(IvfRabitq(refine=_finest(dim, num_bytes - short, forms), metric=metric))
    return found


def _finest(dim: int, num_bytes: int, forms: Sequence[NumberFormat]) -> NumberFormat | None:
    """The first of these formats that fits."""
    return next((form for form in forms if bytes_of(form, dim) <= num_bytes), None)


def choose(
    sample: FeatureBatch, recall: float, num_bytes: int, metric: Metric, seed: int
) -> tuple[IndexSpec, Index, Choice]:
    """The cheapest index that reaches a recall@10 with codes of at most so many bytes, trained on the sample.

    If none does, that with the best recall. A sample too small to be measured gives `flat`, whatever its bytes.
    DataError for values that are not finite.
    """
    most = float(np.abs(float_rows(sample)).max(initial=0.0))
    sample = sample.take(np.flatnonzero(sample.counts))
    if len(sample) < LEAST_IMAGES:
        flat = Flat(metric=metric)
        summary = f"flat: {len(sample)} images with vectors are too few to measure others on (at least {LEAST_IMAGES})"
        settings = flat.model_dump(mode="json")
        return flat, flat.train(sample, seed), Choice(recall, num_bytes, 0, 0, settings, (), summary)
    held_out = _HeldOut(sample, metric, seed)
    specs = candidates(sample.descriptors.shape[1], num_bytes, metric, FORMS if most <= FLOAT16_MAX else FORMS[1:])
    attempts, best = _tried(held_out, specs, recall, seed)
    chosen = attempts[best]
    trials = tuple(replace(each.trial, chosen=number == best) for number, each in enumerate(attempts))
    num_queries, num_vectors = len(held_out.queries), len(held_out.searched.descriptors)
    settings, summary = chosen.spec.model_dump(mode="json"), _summary(trials, best, recall, num_bytes)
    return chosen.spec, chosen.index, Choice(recall, num_bytes, num_queries, num_vectors, settings, trials, summary)


def _tried(
    held_out: "_HeldOut", specs: Sequence[Flat | InvertedFile], recall: float, seed: int
) -> tuple[list["_Attempt"], int]:
    """What came of these indexes, of which the best one, at this position, was trained on the whole sample."""
    num_vectors, dim = held_out.trained_on.descriptors.shape
    attempts: list[_Attempt] = []
    for spec in specs:
        # A rotation is by far the dearest to train, and helps only the codes before it that fall short without.
        rotates = isinstance(spec, IvfPq) and spec.opq
        if not rotates or (attempts[-1].trial.recall < recall and num_vectors >= dim):
            attempts.append(held_out.tried(spec, spec.train(held_out.trained_on, seed), recall))
    best = _best([attempt.trial for attempt in attempts], recall)
    if len(held_out.trained_on) < len(held_out.others):
        spec = attempts[best].given
        attempts[best] = held_out.tried(spec, spec.train(held_out.others, seed), recall)
    return attempts, best


def _best(trials: Sequence[Trial], recall: float) -> int:
    """The position of the cheapest that reaches the recall, or of that with the best recall."""
    reached = [position for position, trial in enumerate(trials) if trial.recall >= recall]
    if reached:
        return min(reached, key=lambda position: trials[position].cost)
    return min(range(len(trials)), key=lambda position: (-trials[position].recall, trials[position].cost))


def _summary(trials: Sequence[Trial], chosen: int, recall: float, num_bytes: int) -> str:
    trial = trials[chosen]
    lists = f", {trial.probes} of {trial.lists} lists" if trial.lists > 1 else ""
    found = f"{trial.index} ({trial.bytes} bytes{lists}) with recall@10 {trial.recall:.3f}"
    if trial.recall >= recall:
        return f"{found}, the cheapest of {len(trials)} tried for a recall of {recall:g}"
    return (
        f"{found}, the best of {len(trials)} tried, but below the recall of {recall:g} wanted; allow more than "
        f"{num_bytes} bytes, or less recall"
    )


@dataclass(frozen=True)
class _Attempt:
    """A trial of the settings `given`, with the trained index and its settings, lists and probes among them."""

    trial: Trial
    given: Flat | InvertedFile
    spec: IndexSpec
    index: Index


class _HeldOut:
    """Images of a sample as queries, on which nothing is trained, and the exact answers to them.

    `others`: the rest of the sample. `searched`, `trained_on`: those of them that are searched, and trained on to try.
    """

    def __init__(self, sample: FeatureBatch, metric: Metric, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(sample))
        num_queries = min(MOST_QUERIES, len(sample) // _QUERY_SHARE)
        self.queries, self.others = sample.take(order[:num_queries]), sample.take(order[num_queries:])
        self.searched, self.trained_on = self._first(MOST_SEARCHED), self._first(MOST_TRAINED)
        self._exact = exact_search(self.queries, self.searched, metric, DEPTH).image_ids

    def _first(self, num_vectors: int) -> FeatureBatch:
        """As many of the others as have at most so many vectors."""
        num_images = int(np.searchsorted(np.cumsum(self.others.counts), num_vectors, side="right"))
        return self.others if num_images == len(self.others) else self.others.take(np.arange(num_images))

    def tried(self, spec: Flat | InvertedFile, index: Index, recall: float) -> _Attempt:
        """An index with the fewest probes that reach the recall; if it cannot, with those that reach about its best."""
        dim, num_vectors = self.searched.descriptors.shape[1], len(self.searched.descriptors)
        if isinstance(spec, Flat):
            num_bytes = bytes_of("float32", dim)
            return _Attempt(Trial(spec.name, num_bytes, 1, 1, recall=1.0, cost=float(num_bytes)), spec, spec, index)
        entries, state = index.entries(self.searched), index.state()
        shares = self._shares(spec, state, entries)
        probes, found = self._probes(spec, state, entries, len(shares), recall)
        settled = spec.model_copy(update={"lists": len(shares), "probes": probes})
        short, fine, factor = spec.code_bytes(dim), 0, 0
        if isinstance(spec, RefinableFile) and spec.refine:
            fine, factor = bytes_of(spec.refine, dim), spec.refine_factor
        cost = float(shares[probes - 1]) * short + factor * DEPTH * fine / num_vectors
        trial = Trial(_label(spec), short + fine, len(shares), probes, found, round(cost, 4))
        return _Attempt(trial, spec, settled, settled.restore(state))

    def _shares(self, spec: InvertedFile, state: State, entries: pa.Table) -> npt.NDArray[np.float64]:
        """The mean share of the entries that lie in the nearest 1, 2, ... lists of a query's rows (lists,)."""
        quantisers = spec.restored_file(state).quantisers
        num_lists = quantisers.coarse.num_lists
        lists, _ = quantisers.coarse.nearest_lists(quantisers.rotate(float_rows(self.queries)), num_lists)
        sizes = np.bincount(entries.column("list").to_numpy(), minlength=num_lists)
        return np.asarray(np.cumsum(sizes[lists], axis=1).mean(0) / entries.num_rows)

    def _probes(
        self, spec: InvertedFile, state: State, entries: pa.Table, num_lists: int, wanted: float
    ) -> tuple[int, float]:
        """The fewest probes, among powers of two, that reach the recall or about the best there is, and theirs."""
        recalls: dict[int, float] = {}
        for probes in (1 << bit for bit in range(num_lists.bit_length())):
            partition = spec.model_copy(update={"probes": probes}).restore(state).build(entries)
            found = partition.search(self.queries, DEPTH).image_ids
            recalls[probes] = ann_recall(found, self._exact, DEPTH)
            if recalls[probes] >= wanted:
                return probes, recalls[probes]
        best = max(recalls.values())
        return next((probes, recall) for probes, recall in recalls.items() if recall >= best - _NOISE)


def _label(spec: InvertedFile) -> str:
    """An index in a few words."""
    words: list[str] = [spec.name]
    if isinstance(spec, IvfFlat):
        words.append(spec.code)
    if isinstance(spec, IvfPq) and spec.opq:
        words.append("opq")
    if isinstance(spec, RefinableFile) and spec.refine:
        words.append(f"refined by {spec.refine}")
    return " ".join(words)
