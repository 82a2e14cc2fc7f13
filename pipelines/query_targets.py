"""What load is put on: an index in this process, a pool of actors, or a service; and the queries that are asked."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cbir.artifacts import Done, find_done
from cbir.config import parse_config
from cbir.errors import CbirError, ConfigError, DataError
from cbir.layout import Layout
from cbir.search import Answer, Searcher
from cbir.spec import fingerprint
from cbir.storage import Store
from cbir.types import FeatureBatch, Floats, image_id
from cbir.versions import Manifest
from pipelines.build import probe_hits
from pipelines.load import Ask, Reply, Truth
from pipelines.query_pool import QueryPool
from pipelines.tables import open_parquet
from pipelines.work import Worker

__all__ = ["Queries", "ask_searcher", "ask_service", "pictures_in", "probes_of"]

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Queries:
    """Pictures, or vectors (Q, D) of a channel, with what they should find where that is known."""

    pictures: Sequence[bytes] = ()
    vectors: Floats | None = None
    channel: str = ""
    truth: Truth | None = None

    def __len__(self) -> int:
        return len(self.pictures) if self.vectors is None else len(self.vectors)


def pictures_in(folder: Path) -> Queries:
    """The files of a folder, whatever they are; DataError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder} is no folder with pictures")
    return Queries([path.read_bytes() for path in files])


def probes_of(store: Store, manifest: Manifest, channel: str | None = None) -> Queries:
    """The vectors with which the build compared its index with exact search; the neighbours are what it found exactly.

    DataError if the version has none: built with `evaluate.probes: 0`, of local features only, or without its work.
    """
    config, layout = parse_config(manifest.config, f"version {manifest.version}"), Layout.from_json(manifest.layout)
    able = [name for name, spec in config.channels.items() if not spec.index.local]
    name = channel or (able[0] if able else "")
    if name not in able:
        known = f"; channels with vectors are: {', '.join(able)}" if able else ""
        raise DataError(
            f"version {manifest.version} has no vectors of a channel {name!r} to ask{known}; use --pictures"
        )
    dones = list(_work(store, manifest))
    train = next((d for d in dones if d.stage == "train" and layout.channels[name].index in _keys(d)), None)
    if train is None or not config.evaluate.probes:
        raise DataError(f"version {manifest.version} was built without probe vectors; use --pictures FOLDER")
    keep = config.channels[name].keep_signatures
    extracted = [d.fingerprint for d in dones if d.stage == "extract" and d.facts["channel"] == name]
    built = {fingerprint("build", shard, train.fingerprint, keep) for shard in extracted}
    builds = [done for done in dones if done.stage == "build" and done.fingerprint in built]
    probes = FeatureBatch.from_arrow(open_parquet(store, train.file("probes")).read())
    one_row = probes.counts == 1
    with contextlib.closing(Worker(store.uri)) as worker:
        exact = probe_hits(worker, builds, len(probes)).image_ids
    first_rows = probes.offsets[:-1][one_row]
    truth = Truth(exact[one_row], probes.image_ids[one_row])
    return Queries(vectors=probes.descriptors[first_rows], channel=name, truth=truth)


def _work(store: Store, manifest: Manifest) -> Iterator[Done]:
    for prefix in manifest.work:
        _, stage, identity, _ = prefix.split("/")
        if stage in ("train", "extract", "build") and (done := find_done(store, stage, identity)) is not None:
            yield done


def _keys(done: Done) -> set[str]:
    return {file.key for file in done.files}


def ask_searcher(searcher: Searcher | QueryPool, queries: Queries, depth: int, deadline_s: float | None) -> Ask:
    """Ask in this process, or the actors of a pool."""

    def ask(number: int) -> Reply:
        if queries.vectors is None:
            answer = searcher.answer([queries.pictures[number]], None, depth, deadline_s)
        else:
            vectors = queries.vectors[number : number + 1]
            answer = searcher.answer_vectors(vectors, depth, queries.channel, deadline_s)
        return _reply(answer)

    return ask


def _reply(answer: Answer) -> Reply:
    ids = answer.hits.image_ids[0]
    return Reply(ids[ids >= 0], answer.version, bool(answer.missing))


def ask_service(url: str, queries: Queries, depth: int, deadline_s: float | None, token: str | None) -> Ask:
    """Ask a service over HTTP, with a connection for each thread that asks; ConfigError if the URL is none."""
    parts, connections = urlsplit(url), threading.local()
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ConfigError(f"{url} is no http:// or https:// address of a service")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = f"{parts.path.rstrip('/')}/search?depth={depth}"
    path += f"&deadline={deadline_s:g}" if deadline_s is not None else ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    bodies = [_body(queries, number) for number in range(len(queries))]
    headers["Content-Type"] = "application/octet-stream" if queries.vectors is None else "application/json"

    def exchange(number: int) -> tuple[int, bytes]:
        connections.own.request("POST", path, bodies[number], headers)
        response = connections.own.getresponse()
        return response.status, response.read()

    def ask(number: int) -> Reply:
        kept = hasattr(connections, "own")
        if not kept:
            connections.own = kind(str(parts.hostname), parts.port, timeout=_TIMEOUT_S)
        try:
            try:
                status, data = exchange(number)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if not kept:
                    raise
                connections.own.close()  # the service had closed it while it was idle; the next request opens it
                status, data = exchange(number)
        except (OSError, http.client.HTTPException) as error:
            connections.own.close()
            raise CbirError(f"{url} did not answer: {type(error).__name__} {error}") from None
        if status != 200:
            raise CbirError(f"{url} answered {status}: {data[:200].decode(errors='replace')}")
        return _said(json.loads(data))

    return ask


def _body(queries: Queries, number: int) -> bytes:
    if queries.vectors is None:
        return queries.pictures[number]
    return json.dumps({"vector": queries.vectors[number].tolist(), "channel": queries.channel}).encode()


def _said(answer: dict[str, Any]) -> Reply:
    ids = np.array([image_id(result["key"]) for result in answer["results"]], np.int64)
    return Reply(ids, answer["version"], bool(answer["missing"]))
