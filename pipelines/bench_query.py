"""The command that measures a search under load."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cbir.errors import ConfigError
from pipelines.serve import TokenFile, read_token
from pipelines.terminal import err, fail, open_searcher, out, store_of

if TYPE_CHECKING:
    from cbir.search import Searcher
    from pipelines.query_pool import QueryPool
    from pipelines.query_targets import Queries

__all__ = ["bench_query"]

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="A store or the YAML that names it, or http://HOST:PORT of `cbir serve`.",
        show_default=False,
    ),
]  # fmt: skip


def bench_query(
    target: Target,
    rate: Annotated[float, typer.Option("--rate", min=0.001, help="Queries per second.")] = 20.0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.001, help="How long queries are sent.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the times at which queries are due.")] = 0,
    depth: Annotated[int, typer.Option("--depth", min=1, help="How many results.")] = 10,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Ask with the pictures of this folder, not with vectors.")
    ] = None,
    vectors_of: Annotated[
        str | None, typer.Option("--vectors-of", help="The index of which a service is asked with vectors.")
    ] = None,
    channel: Annotated[str | None, typer.Option("--channel", help="The channel of the vectors.")] = None,
    actors: Annotated[int, typer.Option("--actors", min=0, help="Search a store in actors; 0: in this process.")] = 0,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="How many actors hold the same.")] = 1,
    deadline: Annotated[float | None, typer.Option("--deadline", min=0.001, help="Seconds for a query.")] = None,
    token_file: TokenFile = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Put load on a search, and print latency, queries per second, errors and recall.

    Queries arrive as chance has it (a Poisson process of a seed), however long the answers before them take, and their
    time runs from when they were due. They are the vectors with which the build compared the index with exact search,
    so that recall is known, as in the build of other images than the query; or pictures. The exit code is 1 if a query
    failed.

    Example: `cbir bench-query my-index --rate 100 --seconds 30 --json load.json`

    Example: `cbir bench-query http://127.0.0.1:8000 --vectors-of my-index --rate 100`
    """
    from pipelines.load import figures, poisson_arrivals, send
    from pipelines.query_targets import ask_searcher, ask_service
    from pipelines.work import limit_threads

    limit_threads()
    is_service = target.startswith(("http://", "https://"))
    queries = _queries(vectors_of if is_service else target, pictures, channel)
    arrivals = poisson_arrivals(rate, seconds, seed)
    asked = depth if queries.truth is None else depth + 1  # an indexed query finds itself, which is not counted
    with contextlib.ExitStack() as opened:
        if is_service:
            ask = ask_service(target, queries, asked, deadline, read_token(token_file))
        else:
            searcher = opened.enter_context(_opened(target, actors, replicas))
            ask = ask_searcher(searcher, queries, asked, deadline)
        with err.status(f"sending {len(arrivals)} queries"):
            sent = send(ask, arrivals, len(queries))
    found = {"target": target, "rate": rate, "seconds": seconds, "seed": seed, "depth": depth}
    found |= asdict(figures(sent, arrivals, queries.truth, depth))
    _print(found)
    if as_json is not None:
        as_json.write_text(json.dumps(found, indent=2) + "\n")
    if found["errors"]:
        fail(f"{found['errors']} of {found['queries']} queries failed, the first by {found['first_error']}", 1)


def _queries(index: str | None, pictures: Path | None, channel: str | None) -> "Queries":
    from cbir.versions import Versions
    from pipelines.query_targets import pictures_in, probes_of

    if pictures is not None:
        return pictures_in(pictures)
    if index is None:
        raise ConfigError(
            "a service is asked with --pictures FOLDER, or with the vectors of its index: --vectors-of INDEX"
        )
    store = store_of(index)
    return probes_of(store, Versions(store).load(), channel)


@contextlib.contextmanager
def _opened(target: str, actors: int, replicas: int) -> "Iterator[Searcher | QueryPool]":
    """The current version of a store, in this process or in actors."""
    store = store_of(target)
    if not actors:
        yield open_searcher(store, None)
        return
    from pipelines.query_pool import QueryPool

    with QueryPool(store.uri, actors, replicas=replicas) as pool:
        yield pool


def _print(found: Mapping[str, Any]) -> None:
    table = Table("figure", "value", box=None, header_style="dim")
    for name, value in found.items():
        if name == "recall":
            for depth, recall in value.items():
                table.add_row(f"recall@{depth}", f"{recall:.4f}")
        else:
            table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    out.print(table)
