"""What a command costs with all its descendants, for benchmarks: watched through /proc."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
POLL_S = 0.1


@dataclass
class Cost:
    """Of a command with all its descendants: seconds by the clock and of processors, peak bytes of each Ray worker.

    Only a worker's own memory counts, not the pages of mapped files, which the system can take back at any time.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    worker_bytes: list[int] = field(default_factory=list)


def measured(*commands: Sequence[str]) -> Cost:
    """Run commands side by side to their end, watching them and their descendants through /proc."""
    start, cpu, peaks = time.perf_counter(), dict[int, float](), dict[int, int]()
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands
    ]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_S):
            for pid in _descendants([process.pid for process in processes]):
                _look_at(pid, cpu, peaks)

    thread = threading.Thread(target=watch)
    thread.start()
    codes = [process.wait() for process in processes]
    wall_s = time.perf_counter() - start
    ended.set()
    thread.join()
    assert not any(codes), f"{commands} ended with {codes}"
    return Cost(wall_s, sum(cpu.values()), sorted(peaks.values()))


def _descendants(roots: Sequence[int]) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (stat := _stat(int(folder.name))):
            children.setdefault(int(stat[1]), []).append(int(folder.name))
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        yield pid


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name; none if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _look_at(pid: int, cpu: dict[int, float], peaks: dict[int, int]) -> None:
    if not (stat := _stat(pid)):
        return
    cpu[pid] = (int(stat[11]) + int(stat[12])) / TICKS
    try:
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::_WorkerActor"):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            now = next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            peaks[pid] = max(now, peaks.get(pid, 0))
    except (OSError, StopIteration):
        return
