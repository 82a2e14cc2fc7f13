"""Damaged files of every kind end in a CbirError or are read; drawn by hypothesis, always the same ones."""

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbir.errors import CbirError
from tests.fuzz.parsers import PARSERS, SEEDS

Edit = Callable[[bytes], bytes]

EXAMPLES = 150


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """A change of a file: some bytes are replaced, taken out, put in or repeated, or its end is cut."""
    at, size = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    kind, data = draw(st.sampled_from(("replace", "remove", "insert", "repeat", "cut"))), draw(st.binary(max_size=size))

    def edit(file: bytes) -> bytes:
        start = int(at * len(file))
        match kind:
            case "replace":
                return file[:start] + data + file[start + len(data) :]
            case "remove":
                return file[:start] + file[start + size :]
            case "insert":
                return file[:start] + data + file[start:]
            case "repeat":
                return file[:start] + file[start : start + size] * 40 + file[start:]
            case _:
                return file[:start]

    return edit


@pytest.mark.parametrize("name", PARSERS)
def test_the_first_seed_is_whole(name: str) -> None:
    PARSERS[name](SEEDS[name][0])


@pytest.mark.parametrize("name", PARSERS)
def test_a_damaged_file_is_read_or_is_an_error_of_ours(name: str) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(seed=st.sampled_from(SEEDS[name]), changes=st.lists(edits(), min_size=1, max_size=5))
    def parse(seed: bytes, changes: list[Edit]) -> None:
        for change in changes:
            seed = change(seed)
        with contextlib.suppress(CbirError):
            PARSERS[name](seed)

    parse()
