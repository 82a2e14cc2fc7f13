"""Structured logs: one JSON object a line on the error stream, for whoever collects them; and what no log may hold."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["JsonLines", "is_json", "log_event", "log_json", "without_secrets"]

_LOG = logging.getLogger("cbir.run")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "CBIR_TOKEN")
_SHORTEST_SECRET = 8  # a shorter value is a word that may stand anywhere
_IN_A_URL = re.compile(r"(?<=://)[^/@\s\"']+(?=@)")


class JsonLines(logging.Formatter):
    """A log record as one line: time, level and event, then the figures that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is a field of it."""
        instant = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{instant}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(fields, default=str))


def log_json() -> Callable[[], None]:
    """From now on, every log of this process is JSON on the error stream; returns what ends that."""
    handler, root, ours = logging.StreamHandler(), logging.getLogger(), logging.getLogger("cbir")
    handler.setFormatter(JsonLines())
    root.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.INFO)

    def end() -> None:
        root.removeHandler(handler)
        ours.setLevel(level)

    return end


def is_json() -> bool:
    """Whether logs are JSON, so that nothing else belongs on the error stream."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def log_event(event: str, figures: Mapping[str, Any] | None = None, level: int = logging.INFO) -> None:
    """Log what happened, with figures by name; they must not be called time, level, logger or event."""
    _LOG.log(level, "%s", event, extra={"figures": figures or {}})


def without_secrets(text: str) -> str:
    """The text with stars for the credentials of the environment, as they are or inside of JSON, and of URLs."""
    for name in _SECRETS:
        secret = os.environ.get(name, "")
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***").replace(json.dumps(secret)[1:-1], "***")
    return _IN_A_URL.sub("***", text)
