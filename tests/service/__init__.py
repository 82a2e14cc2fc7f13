"""Tests against real servers."""

import pytest

pytest.register_assert_rewrite("tests.service.runs")
