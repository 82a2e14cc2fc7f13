"""The HTTP service in front of a query pool: pictures or vectors in, keys and scores out.

It is a plain ASGI application (FastAPI) in the process that encodes the queries. Ray Serve would put a proxy and a
router, two more processes, between the client and the pool, which already has what Serve gives: replicas, batched
calls, and a swap of versions without a failed query.
"""

import contextlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cbir.errors import CbirError, DataError
from cbir.queries import Box
from cbir.search import Answer
from pipelines.query_pool import QueryPool

__all__ = ["Service", "Settings"]

_LOG = logging.getLogger("cbir.serve")
_JSON = "application/json"
_MOST_AT_ONCE = 256
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class Settings:
    """How the service behaves: the deadline of a query, the largest body, how often CURRENT is read, the token."""

    deadline_s: float = 10.0
    max_body_bytes: int = 20_000_000
    poll_s: float = 5.0
    token: str | None = None


class VectorQuery(BaseModel):
    """A descriptor of a channel, as its encoders make it of a query."""

    model_config = ConfigDict(extra="forbid")

    vector: Annotated[list[float], Field(min_length=1)]
    channel: str | None = None
    """Needed if several channels have one descriptor per image."""


class Found(BaseModel):
    """One image: its key, its final score, and its score in every channel that found it."""

    key: str
    score: float
    channels: dict[str, float]


class SearchAnswer(BaseModel):
    """The best images, best first; all from one version."""

    version: int
    missing: list[int]
    """The partitions that did not answer before the deadline: the answer is partial if there are any."""
    results: list[Found]


class Health(BaseModel):
    """Which version answers."""

    version: int
    partitions: int


_QUERY_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of an image file, or a vector as JSON.",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            _JSON: {"schema": VectorQuery.model_json_schema()},
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is empty or not valid JSON"},
    401: {"description": "The bearer token is missing or wrong"},
    413: {"description": "The body is larger than the service accepts"},
    415: {"description": "The body is a form; send the bytes of the picture themselves"},
    422: {"description": "The picture, vector, box or channel cannot be used"},
    503: {"description": "The index cannot answer now, or too many queries wait"},
    504: {"description": "No partition answered before the deadline"},
}


class Metrics:
    """What Prometheus reads, in a registry of its own."""

    def __init__(self, pool: QueryPool) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("cbir_requests", "Searches by HTTP status.", ["status"], registry=registry)
        self.errors = Counter("cbir_errors", "Searches that the service failed to answer.", registry=registry)
        self.partial = Counter("cbir_partial_answers", "Answers without some partition.", registry=registry)
        self.seconds = Histogram(
            "cbir_search_seconds", "From a request to its answer.", buckets=_SECONDS, registry=registry
        )
        self.refresh_errors = Counter(
            "cbir_refresh_errors", "How often a newer version could not be opened.", registry=registry
        )
        version = Gauge("cbir_version", "The version that answers.", registry=registry)
        version.set_function(lambda: pool.version)
        partitions = Gauge("cbir_partitions", "The partitions of that version.", registry=registry)
        partitions.set_function(lambda: pool.num_partitions)

    def observe(self, status: int, seconds: float) -> None:
        """One search has been answered."""
        self.requests.labels(str(status)).inc()
        self.seconds.observe(seconds)
        if status >= 500:
            self.errors.inc()


class _Measured:
    """Counts and times searches, whatever becomes of them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/search":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.observe(status, time.perf_counter() - begun)


class Service:
    """The application `app` over a pool: POST /search, GET /health, GET /metrics, and the API's page at /docs.

    While it runs, it follows CURRENT and swaps to what is published.
    """

    def __init__(self, pool: QueryPool, settings: Settings) -> None:
        self._pool, self._settings = pool, settings
        self._under_way = 0
        self.metrics = Metrics(pool)
        self.app = FastAPI(
            title="cbir", description="Finds the indexed images that show what a picture shows.", lifespan=self._running
        )
        self.app.add_middleware(_Measured, metrics=self.metrics)
        self.app.add_exception_handler(DataError, _refused)
        self.app.add_exception_handler(CbirError, _unavailable)
        guarded, admitted = Depends(self._checked()), Depends(self._admitted)
        search: dict[str, Any] = {"responses": _ERRORS, "openapi_extra": _QUERY_BODY}
        add = self.app.add_api_route
        add("/search", self._search, methods=["POST"], dependencies=[guarded, admitted], **search)
        add("/health", self._health, methods=["GET"])
        add("/metrics", self._read_metrics, methods=["GET"], dependencies=[guarded], response_class=Response)

    @contextlib.asynccontextmanager
    async def _running(self, _app: FastAPI) -> AsyncIterator[None]:
        ended = threading.Event()
        thread = threading.Thread(target=self._follow, args=(ended,), daemon=True)
        thread.start()
        yield
        ended.set()
        await run_in_threadpool(thread.join)

    def _follow(self, ended: threading.Event) -> None:
        """Swap to each version that CURRENT comes to name; a version that cannot be opened changes nothing."""
        while not ended.wait(self._settings.poll_s):
            try:
                if self._pool.refresh():
                    _LOG.warning("serving version %d", self._pool.version)
            except CbirError as error:
                self.metrics.refresh_errors.inc()
                _LOG.error("still serving version %d: %s", self._pool.version, error)

    def _checked(self) -> Callable[..., Awaitable[None]]:
        """The dependency of a path that needs the token, if there is one."""
        token = self._settings.token
        if token is None:

            async def check() -> None:
                """Everybody may ask."""

            return check
        scheme = HTTPBearer(auto_error=False)

        async def check_token(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
            if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
                raise HTTPException(
                    401, "send the header `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"}
                )

        return check_token

    async def _admitted(self) -> AsyncIterator[None]:
        """Too many queries at once are sent away, not kept in memory until their deadline."""
        if self._under_way >= _MOST_AT_ONCE:
            raise HTTPException(503, "too many queries are waiting; try again later", {"Retry-After": "1"})
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _search(
        self,
        request: Request,
        depth: Annotated[int, Query(ge=1, le=1000, description="How many results.")] = 10,
        box: Annotated[
            str | None, Query(description="X,Y,W,H: search for this part of the picture, in pixels.")
        ] = None,
        deadline: Annotated[float | None, Query(gt=0, description="Seconds; less than the service's own.")] = None,
    ) -> SearchAnswer:
        """Find the images that show what the picture in the body shows, or that are near a vector."""
        region, body = _box(box), await self._body(request)
        deadline_s = min(deadline or self._settings.deadline_s, self._settings.deadline_s)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == _JSON:
            if region is not None:
                raise HTTPException(422, "box is a part of a picture; a vector has none")
            query = _vector_query(body)
            vectors = np.array([query.vector])
            answer = await run_in_threadpool(self._pool.answer_vectors, vectors, depth, query.channel, deadline_s)
        else:
            answer = await run_in_threadpool(self._pool.answer, [body], [region], depth, deadline_s)
        return self._said(answer)

    async def _body(self, request: Request) -> bytes:
        """The body, which is never held beyond the limit."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the bytes of the picture as the body: curl --data-binary @picture.jpg URL")
        limit, body = self._settings.max_body_bytes, bytearray()
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise HTTPException(413, f"the body has {length} bytes, this service accepts {limit}")
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"the body has more than the {limit} bytes that this service accepts")
        if not body:
            raise HTTPException(400, "the body is empty; send the bytes of a picture, or a vector as JSON")
        return bytes(body)

    def _said(self, answer: Answer) -> SearchAnswer:
        if answer.missing:
            self.metrics.partial.inc()
            if len(answer.missing) == self._pool.num_partitions:
                raise HTTPException(504, "no partition answered before the deadline; try again, or allow more time")
        results = [
            Found(key=result.key, score=result.score, channels=dict(result.channels)) for result in answer.results(0)
        ]
        return SearchAnswer(version=answer.version, missing=list(answer.missing), results=results)

    async def _health(self) -> Health:
        """Which version answers."""
        return Health(version=self._pool.version, partitions=self._pool.num_partitions)

    async def _read_metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _vector_query(body: bytes) -> VectorQuery:
    try:
        return VectorQuery.model_validate(json.loads(body))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from None
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, mistake['loc'])) or 'body'}: {mistake['msg']}" for mistake in error.errors()]
        raise HTTPException(422, "; ".join(mistakes[:5])) from None


def _box(text: str | None) -> Box | None:
    if text is None:
        return None
    try:
        x, y, width, height = (float(part) for part in text.split(","))
    except ValueError:
        raise HTTPException(422, f"box must be X,Y,W,H in pixels, found {text!r}") from None
    return x, y, width, height


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    """The query's own fault."""
    return JSONResponse({"detail": str(error)}, 422)


async def _unavailable(_request: Request, error: Exception) -> JSONResponse:
    """The store or the pool; the details are for those who run the service."""
    _LOG.error("a search failed: %s", error)
    return JSONResponse({"detail": "the index cannot answer now; the service's log says why"}, 503)
