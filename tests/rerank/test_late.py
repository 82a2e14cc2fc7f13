"""Late fusion on a table that can be followed by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from cbir.errors import ConfigError
from cbir.rerank.late import Late
from cbir.types import Hits


def hits(*rows: dict[int, float]) -> Hits:
    width = max(len(row) for row in rows)
    ids = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int64)
    return Hits.ranked(ids, np.array([[*row.values(), *[0] * (width - len(row))] for row in rows], np.float32), width)


GLOBAL, LOCAL = hits({1: 0.75, 2: 0.5, 3: 0.25}), hits({3: 40, 4: 30, 2: 20})


def fused(spec: Late, depth: int = 4) -> dict[int, float]:
    found = spec.build().fuse({"global": GLOBAL, "local": LOCAL}, depth)
    return dict(zip(found.image_ids[0].tolist(), found.scores[0].tolist(), strict=True))


def test_minmax_table():
    """global: 1 -> 1, 2 -> 0.5, 3 -> 0, 4 missing -> 0; local: 3 -> 1, 4 -> 0.5, 2 -> 0, 1 missing -> 0."""
    table = fused(Late())
    assert list(table) == [1, 3, 2, 4]
    assert table == pytest.approx({1: 1.0, 3: 1.0, 2: 0.5, 4: 0.5}, abs=1e-6)


def test_weights_table():
    table = fused(Late(weights={"local": 2}))
    assert list(table) == [3, 1, 4, 2]
    assert table == pytest.approx({3: 2.0, 1: 1.0, 4: 1.0, 2: 0.5}, abs=1e-6)


def test_plain_sum_table():
    """Missing images count as the lowest of the list: 0.25 in global, 20 in local."""
    assert fused(Late(norm="none")) == pytest.approx({3: 40.25, 4: 30.25, 1: 20.75, 2: 20.5})


def test_zscore_table():
    high = np.sqrt(1.5)
    assert fused(Late(norm="zscore")) == pytest.approx({1: 0, 3: 0, 2: -high, 4: -high}, abs=1e-5)


@pytest.mark.parametrize("norm", ["minmax", "zscore"])
def test_a_list_of_equal_scores_says_nothing(norm):
    flat, alone = hits({5: 3.0, 6: 3.0}), Late(norm=norm).build().fuse({"global": GLOBAL}, 3)
    found = Late(norm=norm).build().fuse({"global": GLOBAL, "local": flat}, 5)
    scores = dict(zip(found.image_ids[0].tolist(), found.scores[0].tolist(), strict=True))
    assert [scores[image] for image in (1, 2, 3)] == alone.scores[0].tolist()
    assert scores[5] == scores[6] == scores[3], "missing in the other list: as its last"


def test_each_query_is_normalised_by_itself():
    small, large = hits({1: 0.2, 2: 0.1}, {1: 200, 2: 100}), hits({2: 5, 1: 4}, {2: 5, 1: 4})
    found = Late().build().fuse({"global": small, "local": large}, 2)
    assert found.scores.tolist() == [[1, 1], [1, 1]]
    assert found.image_ids.tolist() == [[1, 2], [1, 2]]


def test_a_weight_without_its_channel_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"weights\.locl.*did you mean 'local'"):
        fused(Late(weights={"locl": 2}))


def test_refuses_no_channel_and_different_queries():
    for channels in ({}, {"a": GLOBAL, "b": hits({1: 1.0}, {2: 1.0})}):
        with pytest.raises(ValueError, match="same queries"):
            Late().build().fuse(channels, 3)


@pytest.mark.parametrize("weights", [{"a": 0}, {"a": -1}, {"a": float("inf")}])
def test_refuses_weights_that_are_not_positive(weights):
    with pytest.raises(ValidationError):
        Late(weights=weights)
