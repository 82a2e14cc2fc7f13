"""How long and how often the S3 store tries."""

import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from cbir.errors import ConfigError

__all__ = ["EVERYWHERE", "S3Settings", "answered", "attempts"]

EVERYWHERE = "*"
"""All endpoints: in a process that was started by one that has reached those it needs."""

_MOST_DOUBLINGS = 30
_SMALLEST_PART = 5 << 20  # all but the last; S3's own limit
_jitter = random.SystemRandom()  # workers that failed together must not come back together; no result depends on it

_answering: set[str] = set()
"""Endpoints that have answered this process and that nobody has given up since."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Patience and sizes of the S3 store. Environment: `CBIR_S3_` and the field's name in capitals.

    Times in seconds. `read_s` is the longest silence of a connection, not the length of a transfer. The pauses between
    attempts double from `pause_s` to `longest_pause_s`. A request is given up after `attempts`; if the server has
    answered this process before, so that it is away rather than misnamed, not before `patience_s` have passed. A reader
    holds up to three blocks of `block_bytes`; a larger object than `part_bytes` is written in parts of that size, or
    larger where 10,000 of them would not suffice.
    """

    connect_s: float = 5.0
    read_s: float = 20.0
    attempts: int = 8
    patience_s: float = 180.0
    pause_s: float = 0.2
    longest_pause_s: float = 5.0
    block_bytes: int = 8 << 20
    part_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"S3 setting {field.name} must be positive, found {getattr(self, field.name)}")
        if self.part_bytes < _SMALLEST_PART:
            raise ConfigError(f"S3 setting part_bytes must be at least {_SMALLEST_PART}, found {self.part_bytes}")

    @classmethod
    def from_environment(cls) -> "S3Settings":
        """The defaults with what the environment says; ConfigError names a variable that holds no number."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            convert = int if isinstance(field.default, int) else float
            variable = f"CBIR_S3_{field.name.upper()}"
            if variable in os.environ:
                try:
                    found[field.name] = convert(os.environ[variable])
                except ValueError as error:
                    raise ConfigError(f"{variable} must be a number, found {os.environ[variable]!r}") from error
        return cls(**found)


def attempts(settings: S3Settings, endpoint: str) -> Iterator[int]:
    """0, 1, ... with a pause before each but the first, until the server at the endpoint is given up."""
    start = time.monotonic()
    for number in itertools.count():
        if number:
            is_away = not _answering.isdisjoint((endpoint, EVERYWHERE))
            is_late = time.monotonic() - start >= settings.patience_s
            if number >= settings.attempts and (is_late or not is_away):
                break
            longest = min(settings.longest_pause_s, settings.pause_s * 2 ** min(number - 1, _MOST_DOUBLINGS))
            time.sleep(longest * _jitter.uniform(0.5, 1.0))
        yield number
    _answering.discard(endpoint)


def answered(endpoint: str) -> None:
    """From now on, this server is waited for."""
    _answering.add(endpoint)
