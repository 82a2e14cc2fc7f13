"""Stage `drift`: how well a channel's trained state suits images that came after it, and what follows from that."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from cbir.artifacts import Done
from cbir.config import Reindex
from cbir.encoding.assigners import ExactAssigner
from cbir.index.dense import exact_search
from cbir.index.drift import Fit, fit_of
from cbir.index.index import Assignment
from cbir.queries import encode_all
from cbir.spec import fingerprint
from cbir.types import FeatureBatch, Int64s
from pipelines.build import PROBE_DEPTH
from pipelines.known import KnownImages, digests_of, rows_of
from pipelines.recall import index_recalls
from pipelines.tables import open_parquet, read_features
from pipelines.training import Trained, seeded_uniform
from pipelines.work import Asset, ChannelWork, Task, Worker

__all__ = ["Decision", "DriftTask", "decide"]

_MEASURED_IMAGES, _MEASURED_ROWS = 4096, 100_000

Choice = Literal["append", "retrain", "rebuild"]

_LEAST_IMAGES, _QUERIES = 20, 200

_Chosen = list[tuple[Done, Int64s]]


@dataclass(frozen=True)
class DriftTask(Task):
    """Compare images that no earlier work knows with those that the trained state comes from, in one channel."""

    stage: ClassVar[str] = "drift"
    work: ChannelWork
    train: Done
    new: tuple[Done, ...]
    old: tuple[Done, ...]
    old_images: int
    earlier: Asset | None
    base: Mapping[str, Any] | None

    @classmethod
    def of(
        cls,
        work: ChannelWork,
        train: Done,
        new: Sequence[Done],
        old: Sequence[Done],
        old_images: int,
        earlier: Asset | None,
        base: Mapping[str, Any] | None,
    ) -> "DriftTask":
        """`new` are the shards that changed, `old` some of those before, which had `old_images` in all. `base` is known
        if the state was there at an earlier re-index; else `old` is what it was trained on."""
        digest = earlier.sha256 if earlier else ""
        parts = [[done.fingerprint for done in some] for some in (new, old)]
        identity = fingerprint("drift", train.fingerprint, parts, old_images, digest, base)
        return cls(f"drift [{work.name}]", identity, work, train, tuple(new), tuple(old), old_images, earlier, base)

    def run(self, worker: Worker) -> Done:
        """The record counts new images. Its facts are the fits to what the state was trained on, `base`, to `new` and
        to `all` images, None where there are too few rows or no lists, and recall@10 of old and of new images as
        queries among both, where there is one vector per image."""
        trained = worker.cached(self.train.fingerprint, lambda: Trained.restore(worker, self.work, self.train))
        with worker.timer.phase("read"):
            unknown = _unknown(worker, self.new, KnownImages.of(worker, self.earlier))
        num_new = sum(len(ids) for _, ids in unknown)
        with worker.timer.phase("read"):
            known = _all_of(worker, self.old) or [(self.new[0], np.empty(0, np.int64))]
            old, new = _some_features(worker, known), _some_features(worker, unknown)
        with worker.timer.phase("device"):
            mixed = _mixed(old, new, num_new / max(self.old_images, 1))
            facts = {"base": self.base or _fit(trained, old), "new": _fit(trained, new), "all": _fit(trained, mixed)}
            facts["recall"] = None if trained.spec.local else _recalls(trained, old, new)
        return self.finish(worker, [], {"images": num_new}, facts)


def _some_features(worker: Worker, images: _Chosen) -> FeatureBatch:
    """The features of some of these images, evenly of all shards: those whose ids have the least hashes."""
    hashes = np.concatenate([np.empty(0), *(seeded_uniform(ids, 3) for _, ids in images)])
    most = np.sort(hashes)[_MEASURED_IMAGES - 1] if len(hashes) > _MEASURED_IMAGES else 1.0
    found = [next(read_features(worker.store, images[0][0])).take(np.arange(0))]
    for done, ids in images:
        for table in rows_of(worker.store, done.file("features"), ids[seeded_uniform(ids, 3) <= most]):
            found.append(FeatureBatch.from_arrow(table))
            if sum(len(batch.descriptors) for batch in found) >= _MEASURED_ROWS:
                return FeatureBatch.concatenate(found)
    return FeatureBatch.concatenate(found)


def _fit(trained: Trained, images: FeatureBatch) -> dict[str, Any] | None:
    assignment = _assignment(trained, images) if len(images.descriptors) > 1 else None
    return fit_of(assignment).to_json() if assignment and len(assignment.lists) > 1 else None


def _assignment(trained: Trained, images: FeatureBatch) -> Assignment | None:
    """To the words of the first encoder that has some, else to those of the index."""
    for encoder in trained.encoders:
        words = encoder.state().get("centroids")
        if words is not None:
            nearest, squared = ExactAssigner(words).nearest(images.descriptors, 1)
            return Assignment(nearest[:, 0].astype(np.int64), squared[:, 0], len(words))
        images = encoder.encode(images)
    return trained.index.assignment(images)


def _mixed(old: FeatureBatch, new: FeatureBatch, ratio: float) -> FeatureBatch:
    """Images of both, `ratio` times as many new ones as old ones."""
    num_old, num_new = len(old), round(ratio * len(old))
    if num_new > len(new):
        num_old, num_new = round(len(new) / ratio), len(new)
    return FeatureBatch.concatenate([old.take(np.arange(num_old)), new.take(np.arange(num_new))])


def _recalls(trained: Trained, old: FeatureBatch, new: FeatureBatch) -> dict[str, float] | None:
    """recall@10 among both, of some of each as queries; None if there are too few."""
    if min(len(old), len(new)) < _LEAST_IMAGES:
        return None
    old, new = encode_all(trained.encoders, old), encode_all(trained.encoders, new)
    both = FeatureBatch.concatenate([old, new])
    partition, found = trained.index.build(trained.index.entries(both)), {}
    for name, images in (("old", old), ("new", new)):
        queries = images.take(np.arange(_QUERIES if len(images) > _QUERIES else len(images)))
        exact = exact_search(queries, both, trained.spec.metric, PROBE_DEPTH)
        found[name] = index_recalls([partition], queries, exact)[10]
    return found


def _all_of(worker: Worker, shards: Sequence[Done]) -> _Chosen:
    return _unknown(worker, shards, KnownImages([], []))


def _unknown(worker: Worker, shards: Sequence[Done], known: KnownImages) -> _Chosen:
    """The ids of the images of each shard that are not known."""
    chosen = []
    for done in shards:
        table = open_parquet(worker.store, done.file("features")).read(["image_id", "content_sha256"])
        ids = table.column("image_id").to_numpy()
        chosen.append((done, ids[known.owners(ids, digests_of(table)) < 0]))
    return chosen


@dataclass(frozen=True)
class Decision:
    """What a re-index does about the trained state of a channel, why, and the figures that it rests on.

    `append` keeps it, `retrain` trains anew on the stored features, `rebuild` extracts them anew too, because the
    channel is another than before.
    """

    choice: Choice
    reason: str
    new_images: int = 0
    base: Mapping[str, Any] | None = None
    new: Mapping[str, Any] | None = None
    all: Mapping[str, Any] | None = None
    recall: Mapping[str, float] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data for the manifest."""
        return asdict(self)


def decide(limits: Reindex, drift: Done) -> Decision:
    """Append, unless one of the figures is beyond its limit."""
    facts = {
        "new_images": drift.counts["images"],
        **{name: drift.facts[name] for name in ("base", "new", "all", "recall")},
    }
    if facts["base"] is None and facts["recall"] is None:
        return Decision("append", "nothing in it divides features among lists or words", **facts)
    measured = list(_of_all(limits, facts["base"], facts["all"]))
    reasons = [f"{facts['new_images']} new images are too few to tell by themselves, the least is {limits.images}"]
    if facts["new_images"] >= limits.images:
        measured += [*_of_new(limits, facts["base"], facts["new"]), *_recall(limits, facts["recall"])]
        reasons = []
    for one in measured:
        reasons.append(f"{one.words} {one.value:.2f} (limit {one.limit:g}{', beyond it' if one.is_beyond else ''})")
    choice: Choice = "retrain" if any(one.is_beyond for one in measured) else "append"
    return Decision(choice, "; ".join(reasons), figures={one.name: one.value for one in measured}, **facts)


@dataclass(frozen=True)
class _Figure:
    """One figure of a decision and its limit."""

    name: str
    words: str
    value: float
    limit: float
    is_beyond: bool


def _of_all(
    limits: Reindex, trained: Mapping[str, Any] | None, together: Mapping[str, Any] | None
) -> Iterator[_Figure]:
    """What all images show, however few came since the version before: a little every night adds up."""
    if trained is None or together is None:
        return
    base, everything = map(Fit.from_json, (trained, together))
    yield _error("error_of_all", "all images", everything, base, limits)
    imbalance = everything.imbalance / max(base.imbalance, _TINY)
    words = "list imbalance over that before"
    yield _Figure("list_imbalance", words, imbalance, limits.imbalance, imbalance > limits.imbalance)
    entropy = everything.entropy / max(base.entropy, _TINY)
    words = "assignment entropy over that before"
    yield _Figure("assignment_entropy", words, entropy, limits.entropy, entropy < limits.entropy)


def _of_new(limits: Reindex, trained: Mapping[str, Any] | None, added: Mapping[str, Any] | None) -> Iterator[_Figure]:
    if trained is not None and added is not None:
        base, new = map(Fit.from_json, (trained, added))
        yield _error("quantisation_error", "new images", new, base, limits)


def _error(name: str, whose: str, fit: Fit, base: Fit, limits: Reindex) -> _Figure:
    ratio = fit.error / max(base.error, _TINY)
    words = f"quantisation error of {whose} over that of those trained on"
    return _Figure(name, words, ratio, limits.error, ratio > limits.error)


def _recall(limits: Reindex, recall: Mapping[str, float] | None) -> Iterator[_Figure]:
    if recall is not None:
        less = recall["old"] - recall["new"]
        words = f"recall@10 {recall['new']:.3f} of new images, less than of old ones by"
        yield _Figure("recall_loss", words, less, limits.recall, less > limits.recall)


_TINY = 1e-12
