"""The decoder process: reads image files from a pipe, paints pixels into shared memory, ends when the pipe is closed.

A request is REQUEST, the file's length, and the file. An answer is ANSWER: H and W of the image (H, W, 3) that now lies
in the shared memory, height and width of its upright original, and 0; or four times 0, the length of a text and the
text, which is the reason and the detail of a BadImage on two lines. One byte, READY, comes before all answers.
"""

import mmap
import os
import resource
import signal
import struct
import sys
import warnings
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import cast, get_args

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, Image

from cbir._decoding import BadImage, Decoded, Fit, Reason, Terms, decode_image

__all__ = ["ANSWER", "READY", "REQUEST", "arguments", "canvas_bytes", "main", "parse_bad_image"]

READY = b"+"
REQUEST = struct.Struct("<Q")
ANSWER = struct.Struct("<IIIIQ")


def arguments(terms: Terms, memory_bytes: int, seconds: float, canvas_file: int) -> list[str]:
    """The command line that `main` understands."""
    values = (*astuple(terms), memory_bytes, seconds, canvas_file)
    return [str(value) for value in values]


def canvas_bytes(terms: Terms) -> int:
    """The largest image that is ever delivered."""
    return terms.size * terms.size * 3


def parse_bad_image(payload: bytes) -> BadImage:
    """Back from the payload of an answer without pixels."""
    reason, detail = payload.decode().split("\n")
    assert reason in get_args(Reason)
    return BadImage(cast(Reason, reason), detail)


def main() -> None:
    """Serve until standard input ends. No image may use more than the given seconds of processor time."""
    size, fit, oversampling, max_bytes, max_pixels, memory_bytes, seconds, canvas_file = sys.argv[1:]
    terms = Terms(int(size), cast(Fit, fit), float(oversampling), int(max_bytes), int(max_pixels))
    canvas = np.frombuffer(mmap.mmap(int(canvas_file), canvas_bytes(terms)), np.uint8)
    answers = _claim_standard_output()
    _limit_process(terms, int(memory_bytes))
    with suppress(BrokenPipeError):  # nobody waits for the answer any more
        _serve(terms, float(seconds), canvas, answers)


def _serve(terms: Terms, seconds: float, canvas: npt.NDArray[np.uint8], answers: int) -> None:
    os.write(answers, READY)
    _silence(2)  # from here on, the libraries' complaints about broken files are of no use
    requests = sys.stdin.buffer
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        data = requests.read(REQUEST.unpack(header)[0])
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = decode_image(data, terms)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(answers, canvas, verdict)


def _claim_standard_output() -> int:
    """Keep it for answers; what a library prints goes nowhere."""
    answers = os.dup(1)
    _silence(1)
    return answers


def _silence(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _limit_process(terms: Terms, memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # kills even inside a library
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = terms.max_pixels // 2  # Pillow's own check is for twice that
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(answers: int, canvas: npt.NDArray[np.uint8], verdict: Decoded | BadImage) -> None:
    if isinstance(verdict, Decoded):
        canvas[: verdict.pixels.size] = verdict.pixels.reshape(-1)
        os.write(answers, ANSWER.pack(*verdict.pixels.shape[:2], *verdict.size, 0))
    else:
        text = f"{verdict.reason}\n{verdict.detail}".encode()
        os.write(answers, ANSWER.pack(0, 0, 0, 0, len(text)) + text)  # short enough to go through in one piece
