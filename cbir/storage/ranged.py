"""A seekable file over ranged reads, which fetches the next block while the last one is used."""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["RangedReader"]


class RangedReader(io.RawIOBase):
    """`size` bytes behind `fetch(start, length)`.

    Blocks are fetched whole. While blocks are read in sequence, the next one is already on its way; at most the last
    used block, the present one and the next are held.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block_bytes: int) -> None:
        self._fetch = fetch
        self._size = size
        self._block_bytes = block_bytes
        self._position = 0
        self._last = -1
        self._blocks: dict[int, Future[bytes]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="cbir-read-ahead")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move without fetching anything; ValueError before the beginning."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Bytes up to the end of the block; 0 at the end of the object."""
        if self.closed:
            raise ValueError("read of a closed reader")
        if self._position >= self._size:
            return 0
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, self._block_bytes)
        part = memoryview(self._block(number))[offset : offset + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        """Drop the blocks; what is on its way ends by itself."""
        if not self.closed:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._blocks.clear()
        super().close()

    def _block(self, number: int) -> bytes:
        wanted = [number, number + 1] if number in (self._last, self._last + 1) else [number]
        for other in set(self._blocks) - {self._last, *wanted}:
            self._blocks.pop(other).cancel()
        for each in wanted:
            start = each * self._block_bytes
            if each not in self._blocks and start < self._size:
                length = min(self._block_bytes, self._size - start)
                self._blocks[each] = self._threads.submit(self._fetch, start, length)
        self._last = number
        return self._blocks[number].result()
