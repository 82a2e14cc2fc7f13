"""A proxy before an S3 server that does, on demand, what networks and servers do on bad days.

with FaultServer("http://127.0.0.1:5000") as faults:
    faults.plan("truncate", method="GET", key="part-", times=2)
    ...                                     # clients of faults.endpoint see two cut bodies
    assert faults.hits == 2
"""

import http.client
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

__all__ = ["ALWAYS", "FaultServer", "Kind"]

Kind = Literal[
    "error",  # answered with `status`, not passed on
    "reset",  # the connection is reset, the request not passed on
    "truncate",  # half of the body, then the connection ends
    "stall",  # half of the body, then silence
    "flip",  # one wrong byte in the body
    "applied_then_silence",  # passed on and done, but no answer comes
    "applied_then_reset",  # passed on and done, then the connection is reset
    "applied_then_error",  # passed on and done, then answered with `status`
    "pass",  # nothing happens; spares the first requests a later fault
    "ignore_conditions",  # passed on without If-Match and If-None-Match
]
ALWAYS = 1 << 30
_HOP_BY_HOP = {"connection", "expect", "transfer-encoding", "server", "date"}
_CODES = {404: "NoSuchKey", 403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


@dataclass
class _Fault:
    kind: Kind
    method: str
    key: str
    times: int
    status: int
    code: str


@dataclass
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class FaultServer:
    """A proxy on a free port of loopback; `hits` counts the faults that happened, `requests` lists all requests."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.requests: list[tuple[str, str]] = []
        self.hits = 0
        self.closing = threading.Event()
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.faults = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def plan(
        self, kind: Kind, *, method: str = "", key: str = "", times: int = 1, status: int = 500, code: str = ""
    ) -> None:
        """Let the next `times` requests of the method whose path holds `key` meet this fault."""
        with self._lock:
            self._faults.append(_Fault(kind, method, key, times, status, code or _CODES.get(status, "Unknown")))

    def get_well(self) -> None:
        """Let every request pass again."""
        with self._lock:
            self._faults.clear()

    def count(self, method: str, key: str) -> int:
        """How many requests of the method had a path that holds `key`."""
        return sum(found == method and key in path for found, path in self.requests)

    def take(self, method: str, path: str) -> _Fault | None:
        """Record a request and use up the first fault that is planned for it."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.times and fault.method in ("", method) and fault.key in path:
                    fault.times -= 1
                    self.hits += 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # threads that are silent on purpose hold nothing up
    faults: FaultServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_request(self) -> None:
        """Meet one request."""
        faults = self.server.faults
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = faults.take(self.command, unquote(self.path))
        kind = fault.kind if fault else None
        if fault and kind == "error":
            self._send(_error(fault.status, fault.code))
        elif kind == "reset":
            self._reset()
        else:
            answer = self._forward(body, conditions=kind != "ignore_conditions")
            self._finish(fault, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _forward(self, body: bytes, *, conditions: bool) -> _Answer:
        dropped = _HOP_BY_HOP if conditions else _HOP_BY_HOP | {"if-match", "if-none-match"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        upstream = http.client.HTTPConnection(self.server.faults.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body=body, headers=headers)
            response = upstream.getresponse()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
            return _Answer(response.status, kept, response.read())
        finally:
            upstream.close()

    def _finish(self, fault: _Fault | None, answer: _Answer) -> None:
        kind, half = fault.kind if fault else None, len(answer.body) // 2
        if kind == "applied_then_silence":
            self._be_silent()
        elif kind == "applied_then_reset":
            self._reset()
        elif fault and kind == "applied_then_error":
            self._send(_error(fault.status, fault.code))
        elif kind == "truncate":
            self._send(answer, answer.body[:half])
            self.close_connection = True
        elif kind == "stall":
            self._send(answer, answer.body[:half])
            self._be_silent()
        elif kind == "flip":
            self._send(answer, answer.body[:half] + bytes([answer.body[half] ^ 1]) + answer.body[half + 1 :])
        else:
            self._send(answer)

    def _send(self, answer: _Answer, body: bytes | None = None) -> None:
        """Send the answer, with another body under the same headers if one is given."""
        self.send_response(answer.status)
        for name, value in answer.headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = next((value for name, value in answer.headers if name.lower() == "content-length"), None)
        self.send_header("Content-Length", length or str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if body is None else body)
        self.wfile.flush()

    def _be_silent(self) -> None:
        self.server.faults.closing.wait(60)
        self.close_connection = True

    def _reset(self) -> None:
        # with no time to linger, closing sends RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _error(status: int, code: str) -> _Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>planned by the test</Message></Error>".encode()
    return _Answer(status, [("Content-Type", "application/xml")], body)
