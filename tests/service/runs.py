"""Runs of the whole pipeline that end badly, and what has to hold afterwards."""

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from cbir.config import Config, parse_config
from cbir.storage import Store, open_store
from cbir.verification import check_files
from cbir.versions import Versions
from pipelines.indexing import index
from pipelines.run import Silent
from pipelines.work import Report, Task

__all__ = [
    "Recorder",
    "assert_current_is_whole",
    "assert_goes_on_after_kill",
    "run_in_child",
    "run_until_killed",
    "spawned",
    "stages_of",
]

spawned = multiprocessing.get_context("forkserver")
"""Makes processes that have imported what they need."""
spawned.set_forkserver_preload(["pipelines.indexing", "cbir.storage.s3", "torch"])  # once, not in every child


class Recorder(Silent):
    """Remembers the records of the tasks that were done and of those that were reused."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.reused: list[str] = []

    def report(self, task: Task, report: Report, *, reused: bool) -> None:
        (self.reused if reused else self.done).append(f"{task.prefix}DONE.json")


def stages_of(store: Store) -> dict[str, str]:
    """sha256 of every object of the stages by its key."""
    return {info.key: hashlib.sha256(store.read(info.key)).hexdigest() for info in store.list("stages/")}


def run_until_killed(settings: dict[str, Any], failpoint: str) -> None:
    """Index in a child process that dies at the failpoint."""
    child = run_in_child(index, settings, failpoint)
    assert child.exitcode == -signal.SIGKILL, f"{failpoint} was never reached"


def run_in_child(command: Callable[[Config], Any], settings: dict[str, Any], failpoint: str) -> BaseProcess:
    """A child process that has run a command with these settings and this CBIR_FAILPOINT."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "CBIR_"))}
    child = spawned.Process(target=_run, args=(command, settings, {**environment, "CBIR_FAILPOINT": failpoint}))
    child.start()
    child.join(120)
    return child


def _run(command: Callable[[Config], Any], settings: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    command(parse_config(settings, "the child"))


def assert_goes_on_after_kill(settings: dict[str, Any], failpoint: str, undisturbed: dict[str, str]) -> None:
    """Killed at the failpoint, the same command again reuses all that was finished and ends with the same bytes."""
    store = open_store(settings["store"])
    run_until_killed(settings, failpoint)
    assert_current_is_whole(store)
    finished = {key for key in stages_of(store) if key.endswith("DONE.json")}
    again = Recorder()
    manifest = index(parse_config(settings, "again"), again)
    assert finished.isdisjoint(again.done), "what was finished is not done again"
    assert manifest.version == 1
    assert Versions(store).numbers() == [1]
    assert stages_of(store) == undisturbed
    assert_current_is_whole(store)


def assert_current_is_whole(store: Store) -> None:
    """CURRENT names nothing, or a version whose files are all there and right."""
    versions = Versions(store)
    if versions.current() is not None:
        check_files(store, versions.load())
