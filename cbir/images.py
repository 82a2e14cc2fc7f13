"""From the bytes of an image file to upright RGB pixels, with limits that a hostile file cannot pass.

`decode` works in the caller's process and checks bytes and pixels. `Decoder` has processes of its own, which are also
held to memory and time: a file that kills, hangs or bloats its decoder costs itself and nothing else. Both give the
same bytes. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that covers the view; resizing is bilinear and
antialiased. Transparent pixels lie on white, animations show their first frame, embedded colour profiles are ignored.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Annotated, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt

from cbir._decode_process import DecodeProcess
from cbir._decoding import BadImage, Decoded, Fit, Reason, Terms, decode_image, refuse
from cbir.spec import Spec

__all__ = ["BadImage", "Decoded", "Decoder", "Limits", "Reason", "View", "decode"]

T = TypeVar("T")

_BYTES_PER_PIXEL = 24  # the dearest format, JPEG 2000, peaks at 20; WebP and 32-bit TIFF at 17, PNG at 12
_BASE_BYTES = 256 << 20
_READ_AHEAD_IMAGES = 8  # per process
_READ_AHEAD_BYTES = 64 << 20


class View(Spec):
    """The size at which an extractor wants its pixels.

    `stretch`: exactly size x size pixels, whatever the aspect ratio, larger or smaller than the original.
    `longest`: the longest side is at most size, the aspect ratio kept, never enlarged.
    `oversampling`: a JPEG is decoded at a half, quarter or eighth of its size only if that is still so many times
    larger than asked for; 1 is fastest, 2 keeps the result close to that of a full decode.
    """

    size: PositiveInt
    fit: Fit = "longest"
    oversampling: Annotated[float, Field(ge=1)] = 1.0


class Limits(Spec):
    """What one image may cost; an image beyond a limit is quarantined and the run goes on.

    `megapixels` are 10^6 pixels, `megabytes` 10^6 bytes of the file, `seconds` processor time, so that a busy machine
    does not change which images are indexed.
    """

    megapixels: PositiveFloat = 120.0
    megabytes: PositiveFloat = 100.0
    seconds: PositiveFloat = 20.0

    @property
    def memory_bytes(self) -> int:
        """What a decoder process may allocate for an image: enough for any allowed one, in any format."""
        return _BASE_BYTES + int(1e6 * (_BYTES_PER_PIXEL * self.megapixels + 4 * self.megabytes))


def decode(data: bytes, view: View, limits: Limits) -> Decoded | BadImage:
    """Decode in this process: bytes and pixels are limited, memory and time are not."""
    return decode_image(data, _terms(view, limits))


def _terms(view: View, limits: Limits) -> Terms:
    return Terms(view.size, view.fit, view.oversampling, int(1e6 * limits.megabytes), int(1e6 * limits.megapixels))


class Decoder:
    """A pool of decoder processes; one that dies, hangs or passes a limit costs one image and is replaced.

    Any number of threads may decode at the same time. The processes end with `close`, with this process, however that
    ends, or at the end of a `with`.
    """

    def __init__(self, view: View, limits: Limits, processes: int = 1) -> None:
        if processes < 1:
            raise ValueError(f"a decoder needs at least one process, found {processes}")
        self._terms = _terms(view, limits)
        self._processes = processes
        self._idle: SimpleQueue[DecodeProcess] = SimpleQueue()
        for _ in range(processes):
            self._idle.put(DecodeProcess(self._terms, limits.memory_bytes, limits.seconds))
        self._threads = ThreadPoolExecutor(processes, "decoder")
        self._closed = False

    def decode(self, data: bytes) -> Decoded | BadImage:
        """Decode one image; waits for an idle process."""
        if self._closed:
            raise ValueError("the decoder is closed")
        if (refused := refuse(data, self._terms)) is not None:
            return refused
        process = self._idle.get()
        try:
            return process.decode(data)
        finally:
            self._idle.put(process)

    def map(self, items: Iterable[tuple[T, bytes]]) -> Iterator[tuple[T, Decoded | BadImage]]:
        """Decode many images, in their order, with all processes.

        Reads ahead at most 8 images per process and 64 MiB of files; the consumer's own work overlaps with decoding.
        """
        ahead: deque[tuple[T, int, Future[Decoded | BadImage]]] = deque()
        held_bytes = 0
        try:
            for key, data in items:
                while ahead and (self._is_far(ahead) or held_bytes + len(data) > _READ_AHEAD_BYTES):
                    done, num_bytes, future = ahead.popleft()
                    held_bytes -= num_bytes
                    yield done, future.result()
                ahead.append((key, len(data), self._threads.submit(self.decode, data)))
                held_bytes += len(data)
            while ahead:
                done, _, future = ahead.popleft()
                yield done, future.result()
        finally:
            for _, _, future in ahead:
                future.cancel()

    def _is_far(self, ahead: deque[tuple[T, int, Future[Decoded | BadImage]]]) -> bool:
        return len(ahead) >= _READ_AHEAD_IMAGES * self._processes

    def close(self) -> None:
        """End the processes; images that are being decoded are waited for."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self._processes):
            self._idle.get().close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
