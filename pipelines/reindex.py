"""A re-index: from the version before to the next, at the price of what changed.

Work that is there is found as in any run. Beyond that, images that lie in other shards than before, or in shards that
were rewritten around them, are known by their bytes; and codebooks stay as they are unless the new images say that they
do not suit them any more.
"""

import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cbir.artifacts import Done, find_done
from cbir.collection import ImageShard
from cbir.config import Config
from cbir.hidden import Hidden
from cbir.storage import open_store
from cbir.versions import Manifest, Versions
from pipelines.before import Before
from pipelines.changes import image_changes
from pipelines.drift import Decision, DriftTask, decide
from pipelines.extract import ExtractTask
from pipelines.gate import check_ground_truth
from pipelines.hiding import hidden_in, hide
from pipelines.indexing import begun
from pipelines.plans import Changes, plan
from pipelines.run import Progress, Run, Silent
from pipelines.stages import Extracted
from pipelines.verify_bytes import VerifyBytesTask

__all__ = ["Reindexed", "preview", "reindex"]


@dataclass(frozen=True)
class Reindexed:
    """The published version; how many images changed and what was decided by channel, if there was a version before."""

    manifest: Manifest
    images: Mapping[str, int]
    decisions: Mapping[str, Decision]

    def lines(self) -> Iterator[str]:
        """In words."""
        if self.images:
            yield "images: " + ", ".join(f"{number:,} {what}" for what, number in self.images.items())
        for name, decision in self.decisions.items():
            yield f"channel {name}: {decision.choice}, because {decision.reason}"


def preview(config: Config) -> Iterator[str]:
    """What a re-index would find changed, in words; reads listings only, and writes nothing."""
    before, now = Before.load(open_store(config.store)), plan(config)
    if before is None:
        yield f"{config.store} has no version yet: all {len(now):,} shards would be read and indexed"
        return
    yield f"since version {before.manifest.version}:"
    yield from Changes.between(before.shards, now).lines()


def reindex(
    config: Config, progress: Progress | None = None, *, verify_bytes: bool = False, hold: bool = False
) -> Reindexed:
    """Bring an index up to date with its collection; the first time, build it.

    With `verify_bytes`, what a listing calls unchanged is read and compared too; with `hold`, readers stay with the
    version that they have.
    """
    check_ground_truth(config)
    with begun(config, "cbir reindex", progress or Silent()) as run:
        if run.before is None:
            return Reindexed(_published(run, run.evaluate(run.build(run.extract(), {})), {}, hold=hold), {}, {})
        if verify_bytes:
            run.shards = _looked_at(run, run.before)
        changes = Changes.between(run.before.shards, run.shards)
        for line in changes.lines():
            run.progress.say(line)
        if not hold:
            _hide(run, changes.gone)
        extracted = run.extract()
        decisions, kept = _decided(run, run.before, extracted)
        for name, decision in decisions.items():
            run.progress.say(f"channel {name}: {decision.choice}, because {decision.reason}")
        candidate = run.evaluate(run.build(extracted, kept))
        tasks, same = image_changes(run.before.manifest, candidate)
        images = _added_up(run.stage("changes", tasks), same)
        told = {"from": run.before.manifest.version, "images": images, "channels": _json_of(decisions)}
        return Reindexed(_published(run, candidate, {"reindex": told}, hold=hold), images, decisions)


def _hide(run: Run, gone: Sequence[str]) -> None:
    """Take images whose files are gone out of the results now, and not only when all is merged."""
    if gone:
        versions = Versions(run.store)
        now = hidden_in(run.store, versions.load())
        manifest = hide(versions, Hidden.of(now.asked, gone), run.held)
        run.progress.say(f"version {manifest.version} hides {len(gone):,} images whose files are gone")


def _looked_at(run: Run, before: Before) -> list[ImageShard]:
    """The shards, those with `content` whose bytes are others than their objects tell."""
    known, nonce = {shard.identity for shard in before.shards}, uuid.uuid4().hex
    tasks = {}
    for shard in run.shards:
        extract = ExtractTask.of(shard, run.works[0], run.config).fingerprint
        features = find_done(run.store, "extract", extract) if shard.identity in known else None
        if features is not None:
            tasks[shard] = VerifyBytesTask.of(shard, run.config.input, run.config.limits, features, nonce)
    dones = dict(zip(tasks, run.stage("verify bytes", list(tasks.values())), strict=True))
    contents = {shard: str(done.facts["content"]) for shard, done in dones.items()}
    found = [replace(shard, content=contents.get(shard) or shard.content) for shard in run.shards]
    run.progress.say(f"{sum(map(bool, contents.values())):,} of {len(contents):,} unchanged shards have other bytes")
    return found


def _added_up(dones: Sequence[Done], same: int) -> dict[str, int]:
    counts = Counter(added=0, changed=0, deleted=0, moved=0, same=same)
    for done in dones:
        counts.update(done.counts)
    return dict(counts)


def _published(run: Run, candidate: Manifest, quality: Mapping[str, Any], *, hold: bool) -> Manifest:
    run.progress.stage("publish", None)
    told = replace(candidate, quality={**candidate.quality, **quality})
    return Versions(run.store).publish(told, run.held, hold=hold)


def _json_of(decisions: Mapping[str, Decision]) -> dict[str, Any]:
    return {name: decision.to_json() for name, decision in decisions.items()}


def _decided(
    run: Run, before: Before, extracted: Mapping[str, Sequence[Extracted]]
) -> tuple[dict[str, Decision], dict[str, Done]]:
    """What to do by channel, and the trained state of the channels that keep it."""
    trains, limits = before.trains(run.works), run.config.reindex
    decisions = {
        work.name: Decision("rebuild", before.difference(work)) for work in run.works if work.name not in trains
    }
    changed = {shard.name for shard in Changes.between(before.shards, run.shards).shards}
    if not changed:
        decisions |= {name: Decision("append", "nothing is new", base=_base(before.manifest, name)) for name in trains}
    elif limits.retrain == "auto":
        measured = _drifts(run, before, extracted, trains, changed)
        decisions |= {name: decide(limits, done) for name, done in measured.items()}
    else:
        told = Decision("append" if limits.retrain == "never" else "retrain", f"reindex.retrain is {limits.retrain}")
        decisions |= dict.fromkeys(trains, told)
    return decisions, {name: done for name, done in trains.items() if decisions[name].choice == "append"}


def _drifts(
    run: Run,
    before: Before,
    extracted: Mapping[str, Sequence[Extracted]],
    trains: Mapping[str, Done],
    changed: Collection[str],
) -> dict[str, Done]:
    """How well each channel's trained state suits the images that are new, in these shards."""
    works = [work for work in run.works if work.name in trains]
    tasks = [
        DriftTask.of(
            work,
            trains[work.name],
            [part.done for part in extracted[work.name] if part.shard in changed],
            before.some_features(work, run.config),
            before.manifest.counts["indexed"],
            run.earlier(work),
            _base(before.manifest, work.name),
        )
        for work in works
    ]
    return dict(zip((work.name for work in works), run.stage("drift", tasks), strict=True))


def _base(manifest: Manifest, channel: str) -> Mapping[str, Any] | None:
    """How the trained state fits what it was trained on, if that was measured since."""
    told: Mapping[str, Any] = manifest.quality.get("reindex", {}).get("channels", {}).get(channel, {})
    return told["base"] if told.get("choice") == "append" else None
