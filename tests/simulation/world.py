"""Virtual time, and processes whose threads take turns: the same seed gives the same order of everything.

Real code runs in real threads of which exactly one holds the baton; it hands it on where the code sleeps, waits or
sends a request. What runs next is whatever is due first in virtual time: latencies drawn from the seed make the order.
"""

import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

__all__ = ["Actor", "Crash", "Machine", "World"]

_threads = ThreadPoolExecutor(max_workers=256, thread_name_prefix="simulated")


class Crash(BaseException):
    """The process is gone; no clean-up of it reaches anything outside."""


@dataclass(eq=False)
class Machine:
    """A simulated process: its clocks, whether it runs, and the token that it believes to hold."""

    name: str
    host: str
    pid: int
    wall_skew_s: float
    asleep_until: float = 0.0
    crashed: bool = False
    ended: bool = False
    token: int = 0
    collects: bool = False


@dataclass(eq=False)
class Actor:
    """A thread of a simulated process."""

    machine: Machine
    run: Callable[[], None]
    due: float
    begun: bool = False
    done: bool = False
    joined_by: "Actor | None" = None
    baton: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.baton.acquire()

    def ready_at(self) -> float:
        """When it goes on."""
        machine = self.machine
        if machine.crashed:
            return 0.0
        return self.due if self.due > machine.asleep_until else machine.asleep_until


class World:
    """The scheduler of one schedule."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.failure: BaseException | None = None
        self._actors: list[Actor] = []
        self._running: Actor | None = None
        self._all_done = threading.Lock()
        self._numbers = 0

    @property
    def actor(self) -> Actor:
        """The thread that runs now."""
        assert self._running is not None
        return self._running

    @property
    def machine(self) -> Machine:
        """The process that runs now."""
        return self.actor.machine

    def number(self) -> int:
        """A new number."""
        self._numbers += 1
        return self._numbers

    def spawn(self, machine: Machine, run: Callable[[], None], delay_s: float = 0.0) -> Actor:
        """Another thread of a process, which begins later."""
        actor = Actor(machine, run, self.now + delay_s)
        self._actors.append(actor)
        return actor

    def run(self) -> None:
        """Until every thread has ended; the first failure of one is raised."""
        self._all_done.acquire()
        self._hand_on()
        self._all_done.acquire()
        self._all_done.release()
        if self.failure is not None:
            raise self.failure

    def sleep(self, seconds: float) -> None:
        """Let others run; Crash if the process died meanwhile."""
        actor = self.actor
        if not actor.machine.crashed:
            actor.due = self.now + seconds
            self._hand_on(actor)
        if actor.machine.crashed:
            raise Crash

    def join(self, actor: Actor) -> None:
        """Wait for the end of another thread."""
        actor.joined_by = self.actor
        while not actor.done:
            self.sleep(math.inf)

    def wake(self, actor: Actor) -> None:
        """Let a sleeping thread go on now."""
        actor.due = min(actor.due, self.now)

    def crash(self) -> None:
        """Kill the running process."""
        self.machine.crashed = True
        raise Crash

    def _hand_on(self, giver: Actor | None = None) -> None:
        """Give the baton to the thread that is due first, and wait for it if the giver is to run again."""
        receiver = min(self._actors, key=Actor.ready_at, default=None)
        if receiver is None:
            self._all_done.release()
            return
        self.now = max(self.now, receiver.ready_at())
        self._running = receiver
        if receiver is giver:
            return
        if receiver.begun:
            receiver.baton.release()
        else:
            receiver.begun = True
            _threads.submit(self._perform, receiver)
        if giver is not None:
            giver.baton.acquire()

    def _perform(self, actor: Actor) -> None:
        try:
            actor.run()
        except Crash:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the thread of the test
            self.failure = self.failure or error
            for other in self._actors:
                other.machine.crashed = True
        actor.done = True
        if actor.joined_by is not None:
            self.wake(actor.joined_by)
        self._actors.remove(actor)
        self._hand_on()
