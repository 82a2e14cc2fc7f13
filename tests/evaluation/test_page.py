import pytest

from cbir.evaluation.page import _count, _duration, _percent, _size, data_uri


def plain(text: str) -> str:
    return text.replace("\u202f", " ")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (64.4, "64 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (99_940, "99.9 KB"),
        (99_960, "100 KB"),
        (999_600, "1.0 MB"),
        (5_300_000_000, "5.3 GB"),
        (2e18, "2000 PB"),
    ],
)
def test_sizes(num_bytes: float, text: str):
    assert plain(_size(num_bytes)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 00 s"),
        (61.2, "1 min 01 s"),
        (3725, "1 h 02 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str):
    assert plain(_duration(seconds)) == text


def test_counts_and_shares():
    assert plain(_count(1_234_567)) == "1 234 567"
    assert [plain(_percent(share)) for share in (0, 0.004, 0.25, 1)] == ["0 %", "< 1 %", "25 %", "100 %"]


def test_data_uri():
    assert data_uri(b"\xff\xd8") == "data:image/jpeg;base64,/9g="
    assert data_uri(None) is None
    assert data_uri(b"") is None
