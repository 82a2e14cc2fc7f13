"""Query-adaptive late fusion: weights from the shapes of score curves, on tables that can be followed by hand."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cbir.errors import ConfigError
from cbir.rerank.adaptive import Adaptive, ScoreCurve, background
from cbir.rerank.late import Late
from cbir.rerank.lists import RankedList
from cbir.types import Hits


def hits(rows: list[dict[int, float]] | dict[int, float], depth: int = 0) -> Hits:
    rows = rows if isinstance(rows, list) else [rows]
    width = depth or max(len(row) for row in rows)
    ids = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int64)
    return Hits.ranked(ids, np.array([[*row.values(), *[0] * (width - len(row))] for row in rows], np.float32), width)


def fused(spec: Adaptive | Late, **channels: Hits) -> dict[int, float]:
    found = spec.build().fuse(channels, 99)
    kept = found.image_ids[0] >= 0
    return dict(zip(found.image_ids[0, kept].tolist(), found.scores[0, kept].tolist(), strict=True))


def curve(scores: Any, **options: Any) -> ScoreCurve:
    scores = np.sort(np.asarray(scores, np.float64))[::-1]
    found = ScoreCurve.of(RankedList(np.arange(len(scores)), scores, exhausted=False), len(scores), **options)
    assert found is not None
    return found


LINE = {image: 1 - image / 10 for image in range(11)}
"""Falls slowly: area 1/2."""


def test_equal_features_get_equal_weights():
    """So the fused score of two equal channels is that of one, whatever their units."""
    alone = fused(Late(), a=hits(LINE))
    for factor, shift in ((1, 0), (1e-4, 0), (300, -7)):
        other = hits({image: factor * score + shift for image, score in LINE.items()})
        for rule in ("sum", "product"):
            table = fused(Adaptive(rule=rule), a=hits(LINE), b=other)
            assert table == pytest.approx(alone, abs=2e-3)


def test_an_l_shaped_curve_gets_the_larger_weight():
    steep, slow = curve([1, *[0.02] * 9, 0]), curve(list(LINE.values()))
    assert slow.area == pytest.approx(0.5)
    assert steep.area == pytest.approx((1 + 9 * 0.02) / 11)
    weights = {0: 1 / steep.area, 10: 1 / slow.area}
    total = sum(weights.values())
    sure = hits({0: 1.0, **dict.fromkeys(range(1, 10), 0.02), 10: 0.0})
    unsure = hits({10 - image: score for image, score in LINE.items()})
    table = fused(Adaptive(), sure=sure, unsure=unsure)
    assert next(iter(table)) == 0
    assert table[0] == pytest.approx(weights[0] / total)
    assert table[10] == pytest.approx(weights[10] / total)
    assert fused(Late(), sure=sure, unsure=unsure)[0] == pytest.approx(fused(Late(), sure=sure, unsure=unsure)[10])


def test_the_channel_that_knows_the_query_decides_it():
    """100 images, one of them found by `local` far above its noise, the other last; and the other way round."""
    rng = np.random.default_rng(0)
    noise = [dict(enumerate(rng.exponential(0.001, 100))), dict(enumerate(rng.normal(0.5, 0.1, 100)))]
    for knows, image in ((0, 31), (1, 62)):
        channels = [{**noise[0], 31: 0.0}, {**noise[1], 62: 0.2}]
        channels[knows][image] = (0.2, 3.0)[knows]
        channels[1 - knows][image] = min(channels[1 - knows].values())
        assert next(iter(fused(Adaptive(), local=hits(channels[0]), deep=hits(channels[1])))) == image


def test_the_sum_counts_in_units_of_the_mean_excess():
    """sum w_i s_i with w_i = 1 / area is, up to a factor, the sum of (score - last) / mean (score - last)."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 0.1, 60).astype(np.float32), rng.exponential(0.001, 60).astype(np.float32)
    expected = sum((s - s.min()) / (s - s.min()).astype(np.float64).mean() for s in (a, b))
    table = fused(Adaptive(), a=hits(dict(enumerate(a))), b=hits(dict(enumerate(b))))
    scores = np.array([table[image] for image in range(60)])
    np.testing.assert_allclose(scores / scores.max(), expected / expected.max(), rtol=1e-5)


def test_the_product_is_that_of_powers():
    a, b = {1: 3.0, 2: 2.0, 3: 1.0}, {1: 0.2, 2: 0.7, 3: 0.0}
    weights = np.array([1 / 0.5, 1 / np.mean([2 / 7, 1.0, 0.0])])
    weights /= weights.sum()
    table = fused(Adaptive(rule="product"), a=hits(a), b=hits(b))
    assert table[1] == pytest.approx(1 ** weights[0] * (2 / 7) ** weights[1], rel=1e-5)
    assert table[2] == pytest.approx(0.5 ** weights[0] * 1 ** weights[1], rel=1e-5)
    assert table[3] == pytest.approx(1e-3, rel=1e-3)


def test_given_backgrounds_replace_the_areas():
    a, b = hits({1: 0.9, 2: 0.5, 3: 0.1}), hits({3: 0.04, 2: 0.02, 1: 0.0})
    table = fused(Adaptive(backgrounds={"a": 0.2, "b": 0.005}), a=a, b=b)
    units = {1: 0.8 / 0.2, 2: 0.4 / 0.2 + 0.02 / 0.005, 3: 0.04 / 0.005}
    assert list(table) == [3, 2, 1]
    assert {image: score / table[3] for image, score in table.items()} == pytest.approx(
        {image: value / units[3] for image, value in units.items()}, rel=1e-5
    )


def test_short_lists_with_backgrounds_rank_like_whole_ones():
    """Where the areas of short lists mislead: images 0 to 29 are right in `local`, wrong in `deep`'s first places."""
    rng = np.random.default_rng(2)
    local, deep = rng.exponential(0.001, 1000), rng.normal(0.5, 0.1, 1000)
    local[:30] += rng.uniform(0.004, 0.012, 30)
    whole = {"local": hits(dict(enumerate(local))), "deep": hits(dict(enumerate(deep)))}
    known = {name: background(part, 1000) for name, part in whole.items()}
    short = {name: Hits(part.image_ids[:, :60], part.scores[:, :60]) for name, part in whole.items()}

    def right(spec: Adaptive, channels: dict[str, Hits]) -> int:
        return sum(image < 30 for image in list(fused(spec, **channels))[:30])

    assert right(Adaptive(backgrounds=known), short) >= right(Adaptive(), whole) - 1
    assert right(Adaptive(), short) < right(Adaptive(backgrounds=known), short) - 3


def test_an_image_that_a_channel_did_not_return_counts_as_its_last():
    table = fused(Adaptive(), a=hits({1: 3.0, 2: 2.0, 3: 1.0}), b=hits({4: 9.0, 5: 8.0, 1: 7.0}))
    whole = fused(Adaptive(), a=hits({1: 3.0, 2: 2.0, 3: 1.0, 4: 1.0, 5: 1.0}),
                  b=hits({4: 9.0, 5: 8.0, 1: 7.0, 2: 7.0, 3: 7.0}))  # fmt: skip
    assert table == pytest.approx(whole)


def test_a_channel_that_had_no_more_images_gives_the_others_nothing():
    """One match in an inverted file is the clearest of all, not a list of equal scores."""
    deep = {image: 0.9 - 0.01 * image for image in range(40)}
    table = fused(Adaptive(), deep=hits(deep), local=hits({39: 0.001}, depth=40))
    assert next(iter(table)) == 39
    same = fused(Adaptive(), deep=hits(deep), local=hits({39: 0.001}))
    assert next(iter(same)) == 0, "a list of one that was cut says nothing"


def test_lists_of_equal_scores_say_nothing():
    table = fused(Adaptive(), a=hits(LINE), b=hits(dict.fromkeys(range(11), 0.5)))
    assert table == pytest.approx(fused(Late(), a=hits(LINE)))
    assert fused(Adaptive(), a=hits({2: 1.0, 1: 1.0}), b=hits({3: 1.0})) == {1: 0, 2: 0, 3: 0}


def test_the_background_is_the_mean_excess_over_the_lowest():
    whole = hits([{1: 0.5, 2: 0.3, 3: 0.1}, {1: 0.9, 2: 0.8, 3: 0.7}])
    assert background(whole, 3) == pytest.approx((0.4 + 0.2 + 0.2 + 0.1) / 6)
    matches = hits([{1: 0.5, 2: 0.3}, {}], depth=4)
    assert background(matches, 4) == pytest.approx(0.8 / 8), "images without a match score 0"


def test_refuses_a_background_without_its_channel_or_that_is_not_positive():
    spec = Adaptive(backgrounds={"locl": 1.0})
    assert list(spec.channels) == ["locl"]
    with pytest.raises(ConfigError, match=r"backgrounds\.locl.*did you mean 'local'"):
        fused(spec, local=hits(LINE))
    with pytest.raises(ValidationError):
        Adaptive(backgrounds={"local": 0})
