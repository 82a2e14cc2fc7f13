import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cbir.evaluation.gallery import Gallery, choose_cases
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery
from cbir.evaluation.metrics import evaluate
from cbir.evaluation.report import (
    ChannelDecision,
    Counts,
    IndexChoice,
    QuarantineRow,
    Report,
    SearchFigures,
    Since,
    StageRow,
    TrialRow,
    write_report,
)

HOSTILE = '<script>alert("x")</script>&.jpg'


def drifted() -> ChannelDecision:
    errors = {"trained on": [0.1, 0.2, 0.4], "new": [0.2, 0.5, 0.9]}
    return ChannelDecision("global", "retrain", f"quantisation error 1.41 {HOSTILE}", errors)


def full_report() -> Report:
    queries = tuple(GroundTruthQuery(f"q{i}{HOSTILE}", None, frozenset("ab"), frozenset("j")) for i in range(4))
    truth = GroundTruth("hand", Path(), queries, frozenset("z"))
    rankings = [["a", "b", "j"], ["x", "a", "b"], ["x", HOSTILE, "y"], ["b", "x", "a"]]
    quality = evaluate(rankings, truth)
    worst, best = choose_cases(quality, rankings, truth, count=2)
    return Report(
        title=f"Report of {HOSTILE}",
        version=12,
        created="yesterday at noon",
        configuration=f"images: {HOSTILE}",
        counts=Counts(1_234_567, 1_234_560, 7, 99_000, 16, 5_300_000_000),
        since=Since(
            11, {"added": 41, "deleted": 5}, [drifted(), ChannelDecision("flat", "append", "nothing is trained")]
        ),
        stages=[StageRow("extract", 40, 3, 3725.0, 331.5, {"read": 0.25, "device": 0.745, "write": 0.005})],
        quarantine=[QuarantineRow("truncated", 7, (f"broken/{HOSTILE}",))],
        quality=quality,
        choices=[IndexChoice("global", f"ivfpq {HOSTILE}", 200, 800, [TrialRow("ivfpq", 16, 64, 4, 0.912, 1.2, True)])],
        ann_recall={1: 0.99, 10: 0.875},
        recall_by_effort={"probes of global": {1: 0.511, 4: 0.722}},
        search=SearchFigures(12.34, 40.25, 64.0),
        gallery=Gallery(
            worst, best, lambda key: None if key == "y" else f"jpeg {key}".encode(), lambda query: b"query"
        ),
    )


class Page(HTMLParser):
    """The tags of a page and its text outside of the style sheet."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def addresses(self) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in {"src", "href"}]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "new" / "folder", full_report())


def test_every_figure_is_on_the_page(written: Path):
    text = Page(written).text.replace("\u202f", " ")
    for figure in (
        "version 12",
        "yesterday at noon",
        "1 234 567",
        "5.3 GB",
        "1 h 02 min",
        "331.5",
        "read 25 %",
        "write < 1 %",
    ):
        assert figure in text
    for figure in ("12.3 ms", "40.2 ms", "64 B", "0.990", "0.875", "truncated", "1 right answers are not in the index"):
        assert figure in text
    for figure in ("Since version 11", "images added", "global: retrain. quantisation error 1.41", "flat: append."):
        assert figure in text
    for figure in ("Choice of the index", "ivfpqchosen", "0.912", "1.200", "200 images of the sample"):
        assert figure in text


def test_the_page_needs_nothing_from_outside_and_runs_no_script(written: Path):
    page = Page(written)
    assert all(address.startswith("data:image/") for address in page.addresses())
    assert "script" not in {tag for tag, _ in page.tags}
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_keys_are_shown_as_they_are(written: Path):
    page = Page(written)
    assert page.text.count(HOSTILE) >= 5
    assert "<script" not in page.source


def test_results_are_framed_by_their_relevance(written: Path):
    page = Page(written)
    classes = [(attrs.get("class") or "").split() for _, attrs in page.tags]
    frames = [sorted({"positive", "junk", "wrong"} & set(names)) for names in classes if "thumb" in names]
    shown = [frame[0] for frame in frames if frame]
    assert {name: shown.count(name) for name in ("positive", "junk", "wrong")} == {"positive": 6, "junk": 1, "wrong": 5}
    assert page.text.count("no picture") == 1


def test_the_json_beside_it_has_the_same_figures(written: Path):
    content = json.loads(written.with_suffix(".json").read_text())
    assert content["quality"]["map"] == full_report().quality.mean_average_precision()
    assert content["quality"]["missing_positives"] == 1
    assert len(content["quality"]["per_query"]) == 4
    assert content["counts"]["quarantined"] == 7
    assert content["stages"][0]["shares"] == {"read": 0.25, "device": 0.745, "write": 0.005}
    assert content["ann_recall"] == {"1": 0.99, "10": 0.875}
    assert content["choices"][0]["trials"][0]["probes"] == 4
    assert content["recall_by_effort"] == {"probes of global": {"1": 0.511, "4": 0.722}}
    assert content["worst"][0]["results"][0] == {"key": "x", "relevance": "wrong"}


def test_the_same_report_has_the_same_bytes(written: Path, tmp_path: Path):
    assert write_report(tmp_path, full_report()).read_bytes() == written.read_bytes()


def test_sections_without_content_are_left_out(tmp_path: Path):
    page = Page(write_report(tmp_path, Report("Nothing yet")))
    assert re.findall(r"<h2", page.source) == []
    assert page.addresses() == []
    assert json.loads((tmp_path / "report.json").read_text())["quality"] is None


@pytest.mark.parametrize("ranking", [[], ["x"], ["x"] * 3, [f"k{i}" for i in range(1500)]], ids=len)
def test_rankings_of_any_length_can_be_plotted(tmp_path: Path, ranking: list[str]):
    truth = GroundTruth("hand", Path(), (GroundTruthQuery("q", None, frozenset("a"), frozenset()),))
    page = Page(write_report(tmp_path, Report("Misses", quality=evaluate([ranking], truth))))
    assert len(page.addresses()) == 4


def test_importing_the_package_loads_no_plots_and_no_templates():
    program = "import sys, cbir.evaluation; print(sorted({'matplotlib', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
