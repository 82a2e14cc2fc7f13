"""The command that answers queries over HTTP."""

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbir.errors import ConfigError
from pipelines.terminal import IndexOrConfig, out, store_of, warn

if TYPE_CHECKING:
    from pipelines.service import Service

__all__ = ["TOKEN_VARIABLE", "TokenFile", "listen", "read_token", "serve"]

TOKEN_VARIABLE = "CBIR_TOKEN"

TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help=f"File with the bearer token of the service; else ${TOKEN_VARIABLE}, if set."),
]


def serve(
    index: IndexOrConfig,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    actors: Annotated[int, typer.Option("--actors", min=1, help="Processes that share the partitions.")] = 1,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="How many times each share is held: with 2, one may die.")
    ] = 1,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster; else one starts here.")] = None,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0.001, help="Seconds for a query; late partitions are left out.")
    ] = 10.0,
    max_megabytes: Annotated[float, typer.Option("--max-megabytes", min=0.001, help="Largest body.")] = 20.0,
    poll: Annotated[
        float, typer.Option("--poll", min=0.01, help="Seconds between looks for a newer published version.")
    ] = 5.0,
    token_file: TokenFile = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare every file with its sha256 before it is served.")
    ] = True,
) -> None:
    """Answer searches over HTTP, and swap to every version that is published, without a failed query.

    `POST /search` takes the bytes of a picture, or a vector as JSON; `/docs` describes all. `/health` has the version,
    `/metrics` is for Prometheus.

    `curl --data-binary @holiday.jpg 'http://127.0.0.1:8000/search?depth=5&box=120,40,300,300'`

    `curl --json '{"vector": [0.1, 0.2], "channel": "global"}' http://127.0.0.1:8000/search`

    Example: `cbir serve my-index --actors 2 --replicas 2 --port 8000`
    """
    from pipelines.query_pool import QueryPool
    from pipelines.service import Service, Settings
    from pipelines.work import limit_threads

    limit_threads()
    token = read_token(token_file)
    store = store_of(index)
    with listen(host, port) as listener:
        if token is None and not host.startswith("127.") and host not in ("localhost", "::1"):
            warn(f"everybody who reaches {host} may search; set ${TOKEN_VARIABLE} to ask for a token")
        with QueryPool(store.uri, actors, address=ray, replicas=replicas, verify=verify) as pool:
            settings = Settings(deadline, round(max_megabytes * 1e6), poll, token)
            where = f"http://{_in_url(host)}:{listener.getsockname()[1]}"
            out.print(f"serving version {pool.version} of {store.uri} at {where} (API: {where}/docs)", soft_wrap=True)
            _run(Service(pool, settings), listener)


def read_token(file: Path | None) -> str | None:
    """The token in a file or in the environment, never of the command line, which other users of the machine see."""
    text = file.read_text() if file is not None else os.environ.get(TOKEN_VARIABLE)
    if text is not None and not text.strip():
        raise ConfigError(f"the token in {file or '$' + TOKEN_VARIABLE} is empty")
    return text.strip() if text is not None else None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ConfigError if that is not possible."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    # Connections inherit it. asyncio sets it itself only where the protocol was named, and 40 ms are lost without it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _run(service: "Service", listener: socket.socket) -> None:
    """Serve until SIGTERM, after which queries that are under way are still answered, or Ctrl-C."""
    import uvicorn

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    config = uvicorn.Config(
        service.app,
        log_config=None,  # its log is that of this process
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    signal.signal(signal.SIGTERM, _end)  # the server raises the signal that ended it again, when it is through
    uvicorn.Server(config).run(sockets=[listener])


def _end(*_: Any) -> None:
    sys.exit(0)
