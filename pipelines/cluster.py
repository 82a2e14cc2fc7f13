"""The only place where Ray is started and actors are made."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

# Keeps a single-machine Ray on the loopback interface; read when Ray is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray as _ray

from cbir.config import Config, Pool
from cbir.storage.retry import EVERYWHERE, answered
from pipelines.work import Report, Task, Worker

__all__ = ["connect", "new_worker", "ray", "start_ray"]

ray: Any = _ray
"""Ray without its types, which do not know actors."""


def start_ray(config: Config) -> bool:
    """Join the cluster at `config.ray`, or start one on this machine with a processor per worker; as `connect`."""
    pools = (config.pools.extract, config.pools.build)
    cpus = max(1, *(round((pool.workers or config.workers) * pool.cpus) for pool in pools))
    gpus = max(round((pool.workers or config.workers) * pool.gpus) for pool in pools)
    return connect(config.ray, cpus, gpus)


def connect(address: str | None, num_cpus: int, num_gpus: int = 0) -> bool:
    """Join the Ray cluster at an address, or start one of this size here; False if this process is in one already.

    Without an address, clusters that others run on this machine are left alone.
    Only errors of Ray are logged: its notice that the cluster asks for a token is meant for who administers it.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is not None:
        options["address"] = address
    else:
        own = {"address": "local", "num_cpus": num_cpus, "num_gpus": num_gpus or None, "include_dashboard": False}
        options |= own | {"object_store_memory": 128 << 20}
    with _own_sigterm():
        ray.init(**options)
    return True


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray would end it on the spot, without its last words."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGTERM, before)


class _WorkerActor:
    """A worker in a process of its own."""

    def __init__(self, store_uri: str, device: str) -> None:
        answered(EVERYWHERE)  # the driver has reached the servers
        self._worker = Worker(store_uri, device)

    def is_there(self) -> bool:
        """Answered once the cluster had room for it and it has started."""
        return True

    def do(self, task: Task) -> Report:
        """Do one task."""
        return self._worker.do(task)

    def close(self) -> None:
        """End the child processes and delete the temporary files."""
        self._worker.close()


def new_worker(store_uri: str, pool: Pool) -> Any:
    """An actor of the pool's size; Ray restarts nothing by itself, the scheduler does."""
    options: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_restarts": 0}
    if pool.memory_gb:
        options["memory"] = int(pool.memory_gb * 1e9)
    return ray.remote(_WorkerActor).options(**options).remote(store_uri, "cuda" if pool.gpus else "cpu")
