"""Configurations side by side: the same figures on a terminal, on the page, as Markdown and as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cbir.evaluation.comparison import Comparison, Figures, Row, write_comparison
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery
from cbir.evaluation.metrics import evaluate

HOSTILE = "<script>|<script>"
PLAIN, VERIFIED = Figures(0.5, 0.25, 0.4, 12.0), Figures(0.75, 0.5, 0.6, 1250.5)
VLAD = Row("day/vlad", "day", VERIFIED, PLAIN, 3, 40, 20, 2056.4, 80_000.0)


def test_figures_are_those_of_the_quality_and_the_median_query():
    truth = GroundTruth("hand", Path(), (GroundTruthQuery("q", None, frozenset("ab"), frozenset()),) * 3)
    quality = evaluate([["a", "b"], ["x", "a", "b"], ["x", "y"]], truth)
    figures = Figures.of(quality, [0.001, 0.5, 0.002])
    assert figures.map == pytest.approx((1 + (1 / 2 + 2 / 3) / 2 + 0) / 3)
    assert figures.mp_at_10 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert figures.recall_at_1 == pytest.approx(1 / 3)
    assert figures.median_ms == pytest.approx(2.0)


def test_rows_stay_in_their_order_and_a_failure_is_named_among_them():
    table = Comparison((replace(VLAD, name="z"), Row("broken", error="no such file"), replace(VLAD, name="a"))).table()
    assert [row[0] for row in table.rows] == ["z", "broken", "a"]
    assert dict(zip(table.header, table.rows[0], strict=True)) == {
        "configuration": "z",
        "index bytes/image": "2,056",
        "feature bytes/image": "80,000",
        "mAP before": "0.500",
        "mP@10 before": "0.250",
        "recall@1 before": "0.400",
        "ms/query before": "12.0",
        "mAP": "0.750",
        "mP@10": "0.500",
        "recall@1": "0.600",
        "ms/query": "1,250.5",
        "error": "",
    }
    assert [cell for cell in table.rows[1] if cell] == ["broken", "no such file"]


def test_columns_that_say_nothing_are_left_out():
    row = replace(VLAD, before=None, feature_bytes=0.0)
    assert Comparison((row,)).table().header == (
        "configuration",
        "index bytes/image",
        "mAP",
        "mP@10",
        "recall@1",
        "ms/query",
    )
    both = Comparison((row, replace(row, ground_truth="night")))
    assert both.table().header[1] == "ground truth"


def test_methods_by_ground_truth_have_a_mean_only_where_all_is_measured():
    night = replace(VLAD, name="night/vlad", ground_truth="night", figures=replace(VERIFIED, map=0.25, median_ms=0.5))
    bow = replace(VLAD, name="day/bow", before=None)
    table = Comparison((VLAD, bow, night, Row("night/bow", error="broken"))).by_ground_truth()
    assert table is not None
    assert table.header == ("mAP", "day", "night", "mean", "index bytes/image", "feature bytes/image", "ms/query")
    assert table.rows == (
        ("vlad", "0.500 → 0.750", "0.500 → 0.250", "0.500 → 0.500", "2,056", "80,000", "12.0 → 625.5"),
        ("bow", "0.750", "", "", "", "", ""),
    )


@pytest.mark.parametrize("rows", [(), (VLAD,), (VLAD, replace(VLAD, name="day/bow")),
                                  (VLAD, replace(VLAD, name="night/bow", ground_truth="night"))])  # fmt: skip
def test_there_is_no_such_table_of_one_ground_truth_or_of_methods_with_one_each(rows: tuple[Row, ...]):
    assert Comparison(rows).by_ground_truth() is None


def test_markdown_keeps_bars_in_names_out_of_the_columns():
    lines = Comparison((replace(VLAD, name=HOSTILE), Row("none"))).table().markdown().splitlines()
    assert len(lines) == 4
    assert {line.replace(r"\|", "").count("|") for line in lines} == {lines[1].count("|")}


def test_the_page_has_all_cells_escaped_and_needs_nothing_from_outside(tmp_path: Path):
    rows = (replace(VLAD, name=HOSTILE), replace(VLAD, ground_truth="night"), VLAD, Row("b", error=f"no {HOSTILE}"))
    page = write_comparison(tmp_path / "new" / "folder", Comparison(rows))
    text = page.read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;|") == 3, "in both tables, and in the error"
    for cells in Comparison(rows).tables:
        for row in cells.rows:
            assert all(f">{cell}</t" in text for cell in row if "<" not in cell)
    assert "1 could not be measured" in text
    assert "src=" not in text
    assert "href=" not in text


def test_the_json_beside_it_has_all_figures(tmp_path: Path):
    comparison = Comparison((VLAD, Row("b", error="broken")))
    written = json.loads(write_comparison(tmp_path, comparison).with_suffix(".json").read_text())
    assert written == comparison.to_json()
    first, second = written["configurations"]
    assert first["figures"]["map"] == 0.75
    assert first["before"]["median_ms"] == 12.0
    assert first["version"] == 3
    assert (second["name"], second["figures"], second["error"]) == ("b", None, "broken")


def test_the_page_shows_quality_by_size(tmp_path: Path):
    small = replace(VLAD, name="day/small", index_bytes=100.0)
    page = write_comparison(tmp_path, Comparison((VLAD, small))).read_text()
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "Rings are the same before re-ranking" in page
    assert "svg+xml" not in write_comparison(tmp_path, Comparison((VLAD,))).read_text(), "one point is no curve"


def test_means_are_those_of_methods_with_all_ground_truths():
    night = replace(VLAD, name="night/vlad", ground_truth="night", figures=PLAIN, index_bytes=1000.0)
    bow = replace(VLAD, name="day/bow")
    (mean,) = Comparison((VLAD, night, bow)).means
    assert (mean.name, mean.figures, mean.index_bytes) == ("vlad", Figures.mean([VERIFIED, PLAIN]), 1528.2)
    assert Comparison((Row("a/broken", error="no such file"),)).means == ()
