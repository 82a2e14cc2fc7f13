"""One decoder process, seen from the process that owns it."""

import fcntl
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import numpy as np

from cbir._decode_child import ANSWER, READY, REQUEST, arguments, canvas_bytes, parse_bad_image
from cbir._decoding import BadImage, Decoded, Terms
from cbir.errors import CbirError

__all__ = ["DecodeProcess"]

_START_S = 60.0
_PATIENCE = 5  # by the clock, a decoder may take this many times its processor time: the machine may be busy
_PIPE_BYTES = 1 << 20

_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # freed pixels stay with the process, or each image pays for its pages again [2 x slower at 1024 px]
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}


class _Hung(Exception):
    """The deadline passed."""


class _Ended(Exception):
    """The other end of the pipe is closed."""


class DecodeProcess:
    """A decoder process, the pipes to it and the memory it paints into; replaced at once when it has to be given up.

    Requests and answers go through pipes, pixels through shared memory: on a busy machine each time that a full pipe
    makes the two processes wait for each other costs milliseconds.
    """

    def __init__(self, terms: Terms, memory_bytes: int, seconds: float) -> None:
        self._seconds = seconds
        self._canvas_file = _shared_memory(canvas_bytes(terms))
        self._canvas = np.frombuffer(mmap.mmap(self._canvas_file, canvas_bytes(terms)), np.uint8)
        self._arguments = arguments(terms, memory_bytes, seconds, self._canvas_file)
        self._start()

    def decode(self, data: bytes) -> Decoded | BadImage:
        """Decode one image, whatever it does to the process."""
        verdict = self._attempt(data)
        if verdict is None:  # SIGKILL comes from outside: once may be bad luck, twice is the image's fault
            verdict = self._attempt(data)
        return verdict or BadImage("decoder_died", "the decoder was ended by SIGKILL twice")

    def close(self) -> None:
        """End the process."""
        self._stop()
        os.close(self._canvas_file)

    def _start(self) -> None:
        self._process = _spawn(self._arguments, self._canvas_file)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = (self._process.stdin, self._process.stdout)
        self._requests, self._answers = (pipe.fileno() for pipe in self._pipes)
        for descriptor in (self._requests, self._answers):
            os.set_blocking(descriptor, False)
        _widen(self._requests)
        self._ready = False
        self._owes_answer = False

    def _stop(self) -> int:
        """End the process by closing its pipes; its exit code, as `subprocess` counts it."""
        for pipe in self._pipes:
            pipe.close()
        self._requests = self._answers = -1  # nobody may write to a number that some other file gets
        try:
            return self._process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _replace(self) -> int:
        exit_code = self._stop()
        self._start()
        return exit_code

    def _await_start(self) -> None:
        if self._ready:
            return
        try:
            _read(self._answers, len(READY), time.monotonic() + _START_S)
        except (_Hung, _Ended) as error:
            self._process.kill()
            self._replace()
            raise CbirError("the image decoder process does not start; what it said stands on stderr") from error
        self._ready = True

    def _attempt(self, data: bytes) -> Decoded | BadImage | None:
        if self._owes_answer:  # an interrupt left it so: its next answer would be for another image
            self._process.kill()
            self._replace()
        self._await_start()
        patience = _PATIENCE * self._seconds
        try:
            return self._exchange(data, time.monotonic() + patience)
        except _Hung:
            self._process.kill()
            self._replace()
            return BadImage("too_slow", f"no answer within {patience:g} s")
        except _Ended:
            return self._verdict_on_death(self._replace())

    def _exchange(self, data: bytes, deadline: float) -> Decoded | BadImage:
        self._owes_answer = True
        _write(self._requests, REQUEST.pack(len(data)), deadline)
        _write(self._requests, data, deadline)
        rows, columns, height, width, num_bytes = ANSWER.unpack(_read(self._answers, ANSWER.size, deadline))
        text = _read(self._answers, num_bytes, deadline)
        self._owes_answer = False
        if rows == 0:
            return parse_bad_image(text)
        pixels = self._canvas[: rows * columns * 3].reshape(rows, columns, 3).copy()
        return Decoded(pixels, (height, width))

    def _verdict_on_death(self, exit_code: int) -> BadImage | None:
        if exit_code == -signal.SIGKILL:
            return None
        if exit_code == -signal.SIGPROF:
            return BadImage("too_slow", f"more than {self._seconds:g} s of processor time")
        if exit_code < 0:
            return BadImage("decoder_died", f"the decoder was ended by {signal.Signals(-exit_code).name}")
        return BadImage("decoder_died", f"the decoder ended with exit code {exit_code}")


def _shared_memory(num_bytes: int) -> int:
    """A descriptor of memory that two processes can map; pages that are never written cost nothing."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("cbir-decoder")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def _spawn(arguments: list[str], canvas_file: int) -> subprocess.Popen[bytes]:
    """A new interpreter that finds modules where this one does; no fork of this process and its threads."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from cbir._decode_child import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | _ENVIRONMENT,
        pass_fds=[canvas_file],
    )


def _widen(descriptor: int) -> None:
    """Let the pipe hold a whole photograph, so that the decoder wakes once; refused to a user of many pipes."""
    if sys.platform == "linux":
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _await(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
        raise _Hung


def _write(descriptor: int, data: bytes, deadline: float) -> None:
    left = memoryview(data)
    while left:
        _await(descriptor, select.POLLOUT, deadline)
        try:
            left = left[os.write(descriptor, left) :]
        except BrokenPipeError as error:
            raise _Ended from error


def _read(descriptor: int, num_bytes: int, deadline: float) -> bytes:
    parts = []
    while num_bytes:
        _await(descriptor, select.POLLIN, deadline)
        parts.append(os.read(descriptor, num_bytes))
        if not parts[-1]:
            raise _Ended
        num_bytes -= len(parts[-1])
    return b"".join(parts)
