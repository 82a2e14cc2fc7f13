"""The display of a run: a table on a terminal, lines elsewhere, and the figures that both show."""

import io
import re
import time

import pytest
from rich.console import Console

from cbir.artifacts import Done
from pipelines import progress
from pipelines.progress import RunProgress, StageFigures
from pipelines.work import Report, Task

TASK = Task.__new__(type("AnyTask", (Task,), {"stage": "extract", "run": lambda self, worker: None}))


def report(images: int = 0, quarantined: int = 0, **seconds: float) -> Report:
    return Report(Done("extract", "f", (), {"images": images, "quarantined": quarantined}), seconds)


def console(*, terminal: bool, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.file.getvalue())


class TestStageFigures:
    def stage(self, **known: object) -> StageFigures:
        return StageFigures("extract", 10, started=100.0, ended=120.0, **known)  # type: ignore[arg-type]

    def test_speed_counts_what_was_worked_on(self) -> None:
        stage = self.stage()
        stage.add(report(images=40, quarantined=3, read=1.0, device=3.0), reused=False)
        stage.add(report(images=60, quarantined=2), reused=True)
        assert (stage.done, stage.reused, stage.images, stage.quarantined) == (2, 1, 40, 5)
        assert stage.images_per_s == 2.0
        assert stage.shares == {"read": 0.25, "decode": 0.0, "device": 0.75, "write": 0.0}

    def test_nothing_is_known_of_an_empty_stage(self) -> None:
        stage = self.stage()
        assert stage.shares == {}
        assert stage.eta_s is None
        assert StageFigures("plan", None, started=5.0, ended=5.0).images_per_s == 0.0

    def test_the_rest_is_expected_to_go_as_the_tasks_that_were_worked_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: 130.0)
        stage = StageFigures("extract", 10, started=100.0, done=5, reused=2)
        assert stage.wall_s == 30.0
        assert stage.eta_s == 50.0
        assert StageFigures("extract", 10, started=100.0, done=5, reused=5).eta_s is None
        assert StageFigures("workers", None, started=100.0, done=5).eta_s is None
        stage.ended = 130.0
        assert stage.eta_s is None


class TestOffATerminal:
    def test_a_stage_is_one_line_at_its_end(self) -> None:
        shown = console(terminal=False, width=20)
        with RunProgress(shown) as run:
            run.stage("plan", None)
            run.stage("extract", 1_200)
            run.report(TASK, report(images=1_500, quarantined=7, read=1.0, decode=1.0, device=2.0), reused=False)
            run.report(TASK, report(images=5), reused=True)
        lines = text_of(shown).splitlines()
        assert [line.split()[0] for line in lines] == ["plan", "extract"]
        assert "tasks 2/1,200  reused 1  images 1,500  images/s " in lines[1]
        assert "quarantined 7  time 0.0s  share of time read 25% decode 25% device 50%" in lines[1]
        assert "ETA" not in lines[1]

    def test_a_line_every_ten_seconds_also_while_nothing_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One task that takes long in this process: the watching thread prints. Ten seconds are shortened to 0.05."""
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
        monkeypatch.setattr(progress, "_LOOK_EVERY_S", 0.01)
        shown = console(terminal=False)
        with RunProgress(shown) as run:
            run.stage("extract", 3)
            run.report(TASK, report(images=4, read=1.0), reused=False)
            deadline = time.monotonic() + 20
            while text_of(shown).count("\n") < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        lines = text_of(shown).splitlines()
        assert len(lines) >= 4
        assert all(line.startswith("extract   tasks 1/3  images 4") for line in lines)
        assert all("ETA" in line for line in lines[:-1])
        assert not run._watch.is_alive() or run._ended.is_set()

    def test_no_line_before_ten_seconds_have_passed(self) -> None:
        shown = console(terminal=False)
        with RunProgress(shown) as run:
            run.stage("extract", 3)
            for _ in range(5):
                run.tick()
            assert text_of(shown) == ""

    def test_messages_are_printed_as_they_are(self) -> None:
        shown = console(terminal=False, width=10)
        with RunProgress(shown) as run:
            run.say("shard [red]a.tar[/red] was lost :smile:")
        assert text_of(shown) == "shard [red]a.tar[/red] was lost :smile:\n"


class TestOnATerminal:
    def test_a_table_has_a_row_for_every_stage(self) -> None:
        shown = console(terminal=True)
        with RunProgress(shown) as run:
            run.stage("plan", None)
            run.stage("extract", 4)
            run.report(TASK, report(images=12, quarantined=1, read=1.0, decode=3.0), reused=False)
            run.stage("train", 1)
        rows = text_of(shown).rpartition("stage")[2].splitlines()
        assert rows[0].split() == [
            "tasks",
            "reused",
            "images",
            "images/s",
            "quarantined",
            "time",
            "ETA",
            "share",
            "of",
            "time",
        ]
        assert rows[1].split()[0] == "plan"
        assert rows[2].split()[:3] == ["extract", "1/4", "12"]
        assert rows[2].rstrip().endswith("read 25% decode 75%")
        assert rows[3].split()[:2] == ["train", "0/1"]

    def test_the_table_moves_while_a_task_is_under_way(self) -> None:
        shown = console(terminal=True)
        with RunProgress(shown) as run:
            run.stage("extract", 4)
            run.report(TASK, report(images=12), reused=False)
            assert run._live is not None
            run._live.refresh()
            first = text_of(shown)
            time.sleep(0.15)
            run._live.refresh()
            assert text_of(shown)[len(first) :].count("extract") >= 1
            times = re.findall(r"(\d+\.\ds) +\d", text_of(shown))
            assert len(set(times)) >= 2

    def test_a_run_that_fails_leaves_its_last_table(self) -> None:
        shown = console(terminal=True)
        run = RunProgress(shown)

        def fail() -> None:
            with run:
                run.stage("extract", 4)
                raise RuntimeError("disk")

        with pytest.raises(RuntimeError, match="disk"):
            fail()
        assert "extract" in text_of(shown)
        assert run.stages[0].ended is not None


DURATIONS = [(0.04, "0.0s"), (59.94, "59.9s"), (59.96, "1m00s"), (61, "1m01s"), (3599.6, "1h00m"), (7260, "2h01m")]


@pytest.mark.parametrize(("seconds", "words"), DURATIONS)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
