"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real photographs, weights and hostile files; tests that need it are skipped without it."""
    path = Path(os.environ.get("CBIR_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real test data at {path}; set CBIR_TEST_DATA")
    return path
