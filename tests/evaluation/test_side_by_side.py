"""Two versions beside each other: overlap, settings that differ, queries that differ most, the table and the page."""

import json
import re
from pathlib import Path

import pytest

from cbir.evaluation.side_by_side import (
    Asked,
    Setting,
    Side,
    SideBySide,
    differing_settings,
    overlap_at,
    write_side_by_side,
)


@pytest.mark.parametrize(
    ("first", "second", "k", "expected"),
    [
        ("abcd", "abcd", 4, 1.0),
        ("abcd", "dcba", 4, 1.0),
        ("abcd", "dcba", 2, 0.0),
        ("abcd", "abxy", 4, 0.5),
        ("ab", "abcd", 10, 0.5),
        ("abc", "", 10, 0.0),
        ("", "", 10, 1.0),
        ("aab", "ab", 3, 1.0),
    ],
)
def test_overlap_is_what_the_first_k_have_in_common(first: str, second: str, k: int, expected: float) -> None:
    assert overlap_at(first, second, k) == expected == overlap_at(second, first, k)


def test_settings_are_compared_key_by_key() -> None:
    first = {"a": {"words": 64, "same": [1, 2]}, "encoders": [{"name": "vlad"}, {"name": "pca", "dim": 8}], "old": True}
    second = {"a": {"words": 32, "same": (1, 2)}, "encoders": [{"name": "vlad"}], "new": None, "empty": {}}
    assert differing_settings(first, second) == (
        Setting("a.words", ("64", "32")),
        Setting("empty", (None, "{}")),
        Setting("encoders.1.dim", ("8", None)),
        Setting("encoders.1.name", ('"pca"', None)),
        Setting("new", (None, "null")),
        Setting("old", ("true", None)),
    )
    assert differing_settings(first, first) == ()


def side(name: str, **changes: object) -> Side:
    known = {"counts": {"indexed": 4}, "num_bytes": 4000, "median_ms": 2.0, "quality": {}, "recorded": {}}
    return Side(name, 1, "2026-01-01T00:00:00Z", **known | changes)  # type: ignore[arg-type]


def asked(name: str, first: str, second: str, *precision: float) -> Asked:
    return Asked(name, 7, None, (tuple(first), tuple(second)), tuple(precision) or None)  # type: ignore[arg-type]


@pytest.fixture
def found() -> SideBySide:
    sides = (
        side("version 1", quality={"mAP": 0.5}, recorded={"mAP": 0.45}),
        side("version 2", counts={"indexed": 8}, num_bytes=2_000_000, median_ms=3.0, quality={"mAP": 0.75}),
    )
    queries = (asked("same", "abcd", "abcd"), asked("far", "abcd", "axyz"), asked("near", "abcd", "abdc"))
    return SideBySide(sides, queries, (Setting("sample.seed", ("0", None)),), images_in_both=4)


def test_the_mean_overlap_is_over_all_queries(found: SideBySide) -> None:
    assert found.overlap[1] == 1.0
    assert found.overlap[10] == pytest.approx((1 + 0.25 + 1) / 3)


def test_the_queries_that_differ_most_come_first_and_equal_answers_never(found: SideBySide) -> None:
    assert [query.name for query in found.most_different()] == ["far", "near"]
    assert [query.name for query in found.most_different(1)] == ["far"]


def test_with_ground_truth_a_query_that_got_worse_counts_more_than_one_that_changed() -> None:
    queries = (asked("other", "abcd", "wxyz", 0.5, 0.5), asked("worse", "abcd", "abce", 0.9, 0.4))
    found = SideBySide((side("1"), side("2")), queries, (), 4, "truth")
    assert [query.name for query in found.most_different()] == ["worse", "other"]


def test_the_table_shows_both_and_the_change(found: SideBySide) -> None:
    table = found.table()
    assert table.header == ("figure", "version 1", "version 2", "change")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["images indexed"] == ("4", "8", "+100.0%")
    assert rows["bytes"] == ("4,000", "2,000,000", "+49900.0%")
    assert rows["ms per query (median)"] == ("2.0", "3.0", "+50.0%")
    assert rows["mAP"] == ("0.500", "0.750", "+0.250")
    assert rows["mAP, as built"] == ("0.450", "–", "")
    assert "images quarantined" not in rows
    assert "finds itself first" not in rows
    assert found.settings_table().rows == (("sample.seed", "0", "–"),)


def test_json_holds_everything(found: SideBySide) -> None:
    data = json.loads(json.dumps(found.to_json()))
    assert data["sides"][1]["quality"] == {"mAP": 0.75}
    assert data["asked"][1]["results"] == [list("abcd"), list("axyz")]
    assert data["asked"][1]["overlap"] == 0.25
    assert data["settings"] == {"sample.seed": ["0", None]}
    assert (data["queries"], data["images_in_both"], data["overlap"]["1"]) == (3, 4, 1.0)


def test_the_page_marks_what_one_side_alone_has_found(found: SideBySide, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_side_by_side(page, found, lambda key: b"JPEG" if key != "x" else None, lambda query: None)
    text = page.read_text()
    assert "<title>version 1 and version 2</title>" in text
    assert text.count('<article class="card case">') == 2
    far = text[text.index('<span class="name">far') :]
    far = far[: far.index("</article>")]
    assert far.count('<span class="thumb only">') == 6, "b, c and d on one side, x, y and z on the other"
    assert far.count("no picture") == 1
    assert "sample.seed" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_the_page_marks_right_answers(tmp_path: Path) -> None:
    judged = Asked("query", None, None, (("a", "b"), ("b", "c")), (0.5, 0.9), right=("b", "c"))
    found = SideBySide((side("1"), side("2")), (judged,), (), 4, "truth")
    write_side_by_side(tmp_path / "page.html", found, lambda key: None, lambda query: None)
    text = (tmp_path / "page.html").read_text()
    kinds = re.findall(r'<span class="thumb ([a-z ]*)">', text)
    assert kinds == ["", "only", "positive", "positive", "positive only"]
    assert "AP 0.500 → 0.900" in text


def test_the_page_of_equal_answers_says_so(tmp_path: Path) -> None:
    found = SideBySide((side("a <b>"), side("2")), (asked("same", "ab", "ab"),), (), 4)
    write_side_by_side(tmp_path / "page.html", found, lambda key: None, lambda query: None)
    text = (tmp_path / "page.html").read_text()
    assert "All answers are the same." in text
    assert "a &lt;b&gt;" in text
