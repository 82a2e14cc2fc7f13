import re
from pathlib import Path

import numpy as np
import pytest

from cbir.evaluation.search_page import DRAWN_MATCHES, PANEL_GAP, PANEL_HEIGHT, Matches, SearchRow, write_search_page

HOSTILE = "a<b>&\"'.jpg"


def lines_of(page: str) -> list[tuple[float, ...]]:
    found = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', page)
    return [tuple(map(float, line)) for line in found]


def write(path: Path, *rows: SearchRow, **options) -> str:
    write_search_page(path / "search.html", b"query", rows, **options)
    return (path / "search.html").read_text()


def test_results_are_ranked_with_their_scores_and_escaped_keys(tmp_path: Path):
    rows = [SearchRow("first.jpg", 0.91234, b"1", {"global": 0.5, "local": 0.25}), SearchRow(HOSTILE, 0.5)]
    page = write(tmp_path, *rows, title="Find <me>", details={"time": "3 ms"})
    assert page.index("first.jpg") < page.index("a&lt;b&gt;&amp;&#34;&#39;.jpg")
    assert "a<b>" not in page
    assert "Find &lt;me&gt;" in page
    for text in ("0.9123", "0.5000", "0.2500", "local", "3 ms", "no picture"):
        assert text in page
    assert "Verified matches" not in page


def test_matches_join_the_same_points_of_both_images(tmp_path: Path):
    # Corner to corner: top left to top left, bottom right to bottom right, of a 400 x 200 and a 100 x 300 picture.
    points = np.array([[0, 0, 0, 0], [400, 200, 100, 300]], np.float32)
    page = write(tmp_path, SearchRow("k", 1.0, b"1", matches=Matches(points, (200, 400), (300, 100))))
    query_width, result_width = 2 * PANEL_HEIGHT, PANEL_HEIGHT / 3
    left = query_width + PANEL_GAP
    first, second = lines_of(page)
    assert first == (0, 0, left, 0)
    assert second == pytest.approx((query_width, PANEL_HEIGHT, left + result_width, PANEL_HEIGHT))
    assert f'viewBox="0 0 {left + result_width} {PANEL_HEIGHT}"' in page
    assert "2 verified matches" in page


def test_very_many_matches_are_thinned_and_counted(tmp_path: Path):
    matches = Matches(np.ones((1000, 4), np.float32), (10, 10), (10, 10))
    page = write(tmp_path, SearchRow("k", 1.0, None, matches=matches))
    assert len(lines_of(page)) == DRAWN_MATCHES
    assert "1\u202f000 matches, 150 of them drawn" in page


def test_the_query_picture_is_held_once_for_all_panels(tmp_path: Path):
    matches = Matches(np.ones((5, 4), np.float32), (10, 10), (10, 10))
    page = write(tmp_path, *(SearchRow(f"k{i}", 1.0, b"1", matches=matches) for i in range(6)))
    assert page.count("data:image/jpeg;base64,cXVlcnk=") == 2
    assert page.count('<use href="#query"/>') == 6


def test_a_result_without_matches_shows_both_pictures_and_no_line(tmp_path: Path):
    nothing = Matches(np.empty((0, 4), np.float32), (10, 10), (10, 10))
    page = write(tmp_path, SearchRow("k", 1.0, b"1", matches=nothing))
    assert "0 verified matches" in page
    assert lines_of(page) == []


def test_no_results_are_said(tmp_path: Path):
    assert "Nothing was found." in write(tmp_path)


def test_the_box_lies_over_the_query(tmp_path: Path):
    page = write(tmp_path, box=(0.25, 0.5, 0.125, 0.375))
    assert 'style="left: 25.0%; top: 50.0%; width: 12.5%; height: 37.5%"' in page


def test_matches_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(M, 4\), found shape \(3, 2\)"):
        Matches(np.zeros((3, 2), np.float32), (10, 10), (10, 10))
