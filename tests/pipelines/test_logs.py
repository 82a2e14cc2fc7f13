"""Structured logs: every line of the error stream is one JSON object, and holds no credentials."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from cbir.artifacts import Done
from pipelines import logs
from pipelines.cli import app
from pipelines.logs import is_json, log_event, log_json, without_secrets
from pipelines.progress import LogProgress
from pipelines.work import Report, Task

TASK = Task.__new__(type("AnyTask", (Task,), {"stage": "extract", "run": lambda self, worker: None}))


class Stream(io.StringIO):
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    end = log_json()
    yield stream
    end()


def test_a_line_has_time_level_event_and_figures(logged: Stream) -> None:
    log_event("stage ended", {"stage": "extract", "done": 3})
    logging.getLogger("cbir.serve").warning("serving version %d", 7)
    logging.getLogger("other").info("not ours, and only for information")
    first, second = logged.events()
    assert first | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "cbir.run",
        "event": "stage ended",
        "stage": "extract",
        "done": 3,
    }
    assert first["time"].endswith("Z")
    assert (second["level"], second["logger"], second["event"]) == ("warning", "cbir.serve", "serving version 7")


def test_a_traceback_is_a_field_of_its_line(logged: Stream) -> None:
    try:
        raise RuntimeError("odd")
    except RuntimeError:
        logging.getLogger("cbir.serve").exception("a search failed")
    (event,) = logged.events()
    assert event["traceback"].endswith("RuntimeError: odd")


def test_it_ends_where_it_is_ended() -> None:
    level = logging.getLogger("cbir").level
    end = log_json()
    assert is_json()
    end()
    assert not is_json()
    assert logging.getLogger("cbir").level == level


def test_a_run_is_a_sequence_of_events(logged: Stream) -> None:
    with LogProgress() as run:
        run.stage("extract", 2)
        run.report(TASK, Report(Done("extract", "f", (), {"images": 4}), {"read": 1.5}), reused=False)
        run.say("warning: a disk is almost full")
        run.say("metrics at http://127.0.0.1:9100/metrics")
    started, warning, said, ended = logged.events()
    assert (started["event"], started["stage"], started["tasks"]) == ("stage started", "extract", 2)
    assert (warning["level"], warning["event"]) == ("warning", "a disk is almost full")
    assert (said["level"], said["event"]) == ("info", "metrics at http://127.0.0.1:9100/metrics")
    assert (ended["event"], ended["stage"], ended["done"], ended["images"]) == ("stage ended", "extract", 1, 4)
    assert ended["read_s"] == 1.5


@pytest.mark.parametrize("how", [{"args": ["--log-format", "json"]}, {"env": {"CBIR_LOG_FORMAT": "json"}}])
def test_an_error_of_a_command_is_an_event(how: dict[str, Any]) -> None:
    arguments = [*how.get("args", ()), "versions", "/nowhere/at/all"]
    result = CliRunner(env=how.get("env", {})).invoke(app, arguments)
    (line,) = result.stderr.splitlines()
    event = json.loads(line)
    assert (event["level"], event["exit_code"], result.exit_code) == ("error", 2, 2)
    assert event["event"].startswith("/nowhere/at/all is neither a folder")
    assert not is_json()


def test_credentials_are_stars(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(logs._SECRETS):
        monkeypatch.setenv(name, f"planted-{number}")
    text = " ".join(f"a planted-{number} b" for number in range(len(logs._SECRETS)))
    assert without_secrets(text) == " ".join(["a *** b"] * len(logs._SECRETS))
    assert without_secrets("s3://bucket/a@b and https://u:p@host/x") == "s3://bucket/a@b and https://***@host/x"


def test_a_short_word_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CBIR_TOKEN", "index")
    assert without_secrets("the index") == "the index"


def test_no_line_of_a_log_holds_a_credential(logged: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CBIR_TOKEN", 'quoted "planted" token')
    log_event('failed with quoted "planted" token', {"header": 'Bearer quoted "planted" token'})
    assert "planted" not in logged.getvalue()
    assert logged.events()[0]["header"] == "Bearer ***"
