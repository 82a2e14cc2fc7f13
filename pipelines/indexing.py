"""A build from the beginning: plan, train on a sample of all that is there, build, evaluate, publish."""

import contextlib
from collections.abc import Iterator

from cbir.config import Config
from cbir.storage import open_store
from cbir.versions import Manifest, Versions
from pipelines.assets import channel_work
from pipelines.before import Before
from pipelines.executor import executor_for
from pipelines.gate import check_ground_truth
from pipelines.plans import plan
from pipelines.run import Progress, Run, Silent
from pipelines.stages import Extracted

__all__ = ["begun", "extract", "index"]


def index(config: Config, progress: Progress | None = None, *, hold: bool = False) -> Manifest:
    """Build what is missing, gate it, publish it. Returns the published manifest, which may be the one before.

    With `hold`, readers stay with the version that they have.
    """
    check_ground_truth(config)
    with begun(config, "cbir index", progress or Silent()) as run:
        candidate = run.evaluate(run.build(run.extract(), kept={}))
        run.progress.stage("publish", None)
        return Versions(run.store).publish(candidate, run.held, hold=hold)


def extract(config: Config, progress: Progress | None = None) -> dict[str, list[Extracted]]:
    """The features of all shards by channel, extracted where they are missing; nothing is trained or published."""
    with begun(config, "cbir extract", progress or Silent()) as run:
        return run.extract()


@contextlib.contextmanager
def begun(config: Config, owner: str, progress: Progress) -> Iterator[Run]:
    """A run with its lease, its plan and its workers; LeaseError while another run writes to the store."""
    store = open_store(config.store)
    progress.stage("plan", None)
    store.probe()
    shards = plan(config)
    with Versions(store).writing(owner, progress.say) as held:
        before = Before.load(store)
        shards = shards if before is None else before.as_found(shards)
        works = [channel_work(store, config, name) for name in config.channels]
        with contextlib.closing(executor_for(config)) as executor:
            yield Run(config, store, executor, progress, shards, works, before, held)
