"""METHODS M-01 to M-08: hand tables, the identities of the protocols, and brute-force twins."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbir.errors import DataError
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery
from cbir.evaluation.metrics import (
    ann_recall,
    average_precision,
    evaluate,
    first_hit_rank,
    first_neighbour_recall,
    interpolated_precision,
    mean_precision_at,
    ns_score,
    positive_ranks,
    precision_at,
    recall_at,
)

FORMS = ("rectangle", "trapezoid")
# Which results of a ranking are right, and how many more positives were not found.
ANSWERS = st.tuples(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 3)).filter(
    lambda a: any(a[0]) or a[1]
)


def ranks_of(relevant: list[bool]) -> list[int]:
    return [place for place, right in enumerate(relevant) if right]


def query(positives: str, junk: str = "", image: str = "q") -> GroundTruthQuery:
    return GroundTruthQuery(image, None, frozenset(positives), frozenset(junk))


def truth(*queries: GroundTruthQuery, missing: str = "") -> GroundTruth:
    return GroundTruth("hand", Path(), queries, frozenset(missing))


@pytest.mark.parametrize("form", FORMS)
def test_a_perfect_ranking_has_average_precision_1(form):
    assert average_precision([0, 1, 2], 3, form) == 1
    assert average_precision([0, 1, 2], 50, form, at=3) == 1


@pytest.mark.parametrize(
    ("ranks", "num_positives", "rectangle", "trapezoid"),
    [
        ([1], 1, 1 / 2, 1 / 4),
        ([], 2, 0, 0),
        ([0], 2, 1 / 2, 1 / 2),
        ([0, 2], 2, (1 + 2 / 3) / 2, (1 + (1 / 2 + 2 / 3) / 2) / 2),
        ([3, 4], 4, (1 / 4 + 2 / 5) / 4, ((0 + 1 / 4) / 2 + (1 / 4 + 2 / 5) / 2) / 4),
    ],
)
def test_average_precision_of_hand_tables(ranks, num_positives, rectangle, trapezoid):
    assert average_precision(ranks, num_positives, "rectangle") == pytest.approx(rectangle)
    assert average_precision(ranks, num_positives, "trapezoid") == pytest.approx(trapezoid)


def test_average_precision_at_a_depth_divides_by_what_could_be_found():
    assert average_precision([0, 5], 3, at=2) == pytest.approx(1 / 2)
    assert average_precision([0, 5], 3, at=100) == pytest.approx((1 + 2 / 6) / 3)


@given(ANSWERS)
def test_the_forms_equal_sums_over_every_place_of_the_ranking(answer):
    relevant, not_found = answer
    total = sum(relevant) + not_found
    precision = [sum(relevant[: n + 1]) / (n + 1) for n in range(len(relevant))]
    before = [1.0, *precision]
    rectangle = sum(p for p, right in zip(precision, relevant, strict=True) if right) / total
    trapezoid = sum((before[n] + precision[n]) / 2 for n, right in enumerate(relevant) if right) / total
    assert average_precision(ranks_of(relevant), total, "rectangle") == pytest.approx(rectangle)
    assert average_precision(ranks_of(relevant), total, "trapezoid") == pytest.approx(trapezoid)


def test_the_rectangle_form_is_scikit_learns_where_everything_is_ranked():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for _ in range(20):
        relevant = generator.random(40) < 0.3
        relevant[generator.integers(40)] = True
        expected = sklearn_metrics.average_precision_score(relevant, -np.arange(40.0))
        assert average_precision(ranks_of(relevant.tolist()), int(relevant.sum())) == pytest.approx(expected)


@given(ANSWERS, st.data())
def test_a_distractor_never_raises_average_precision(answer, data):
    relevant, not_found = answer
    place = data.draw(st.integers(0, len(relevant)))
    total = sum(relevant) + not_found
    worse = [*relevant[:place], False, *relevant[place:]]
    for form in FORMS:
        for at in (None, 5):
            before = average_precision(ranks_of(relevant), total, form, at)
            assert average_precision(ranks_of(worse), total, form, at) <= before + 1e-12


@given(st.permutations("abcdefgh"), st.lists(st.tuples(st.integers(0, 12), st.sampled_from("xyz")), max_size=6))
def test_junk_and_repeated_keys_change_nothing_wherever_they_are(ranking, insertions):
    clean = positive_ranks(ranking, frozenset("abc"))
    soiled = list(ranking)
    for place, key in insertions:
        soiled.insert(place, key)
    soiled.append(ranking[0])
    assert positive_ranks(soiled, frozenset("abc"), frozenset("xyz")) == clean


def test_precision_and_recall_of_a_hand_table():
    assert [precision_at([0, 3], k) for k in (1, 2, 4, 10)] == [1, 0.5, 0.5, 0.2]
    assert [recall_at([0, 3], 4, k) for k in (1, 3, 4, 10)] == [0.25, 0.25, 0.5, 0.5]
    assert [first_hit_rank([0, 3], 100), first_hit_rank([6], 100), first_hit_rank([], 100)] == [1, 7, 101]


@pytest.mark.parametrize(
    ("ranks", "num_positives", "k", "expected"),
    [
        ([0, 1, 2], 3, 10, 1.0),  # the last positive is third: precision at 3, not 3/10
        ([0, 4], 2, 10, 2 / 5),
        ([0, 40], 2, 10, 1 / 10),
        ([0, 1, 2], 4, 10, 3 / 10),  # the fourth was never found, so it lies beyond every k
        ([], 1, 5, 0.0),
    ],
)
def test_mean_precision_stops_at_the_last_positive(ranks, num_positives, k, expected):
    assert mean_precision_at(ranks, num_positives, k) == pytest.approx(expected)


def test_ns_score_is_four_for_perfect_groups_of_four():
    assert ns_score([[0, 1, 2, 3], [0, 1, 2, 3]]) == 4
    assert ns_score([[0, 1, 2, 3], [0, 5]]) == 2.5


@given(ANSWERS)
def test_interpolated_precision_is_the_best_at_any_higher_recall(answer):
    relevant, not_found = answer
    total = sum(relevant) + not_found
    levels = np.linspace(0, 1, 11)
    points = [
        (sum(relevant[: n + 1]) / total, sum(relevant[: n + 1]) / (n + 1)) for n, right in enumerate(relevant) if right
    ]
    expected = [max((p for r, p in points if r >= level - 1e-9), default=0.0) for level in levels]
    assert interpolated_precision(ranks_of(relevant), total, levels) == pytest.approx(expected)


def test_a_query_without_positives_has_no_metrics():
    for metric in (average_precision, lambda r, n: recall_at(r, n, 1), lambda r, n: mean_precision_at(r, n, 1)):
        with pytest.raises(ValueError, match="without positives"):
            metric([], 0)


def test_ann_recall_of_hand_tables():
    exact = np.array([[1, 2, 3, 4], [5, 6, -1, -1]])
    found = np.array([[1, 9, 2, 3], [7, 5, 6, -1]])
    assert ann_recall(exact, exact, 4) == 1
    assert ann_recall(found, exact, 1) == 1 / 2
    assert ann_recall(found, exact, 2) == 2 / 4  # 1 of {1, 2} and 5 of {5, 6}
    assert ann_recall(found, exact, 4) == 5 / 6  # padding is no neighbour
    assert first_neighbour_recall(found, exact, 1) == 1 / 2
    assert first_neighbour_recall(found, exact, 2) == 1


def test_ann_recall_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="1 rows were found for 2 queries"):
        ann_recall(np.zeros((1, 3), np.int64), np.zeros((2, 3), np.int64), 3)
    with pytest.raises(ValueError, match="no exact neighbours"):
        ann_recall(np.zeros((1, 3), np.int64), np.full((1, 3), -1), 3)


def test_evaluate_totals_of_a_hand_table():
    queries = (query("ab", "q"), query("c"), query(""), query("d"))
    rankings = ["qaxb", "xyc", "abcd", "abcx"]
    quality = evaluate(rankings, truth(*queries, missing="d"))
    totals = quality.to_json()
    assert totals["map"] == totals["map_rectangle"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3 + 0) / 3)
    assert totals["map_trapezoid"] == pytest.approx(((1 + 7 / 12) / 2 + 1 / 6 + 0) / 3)
    assert totals["map_at_100"] == pytest.approx(totals["map"])
    assert totals["recall_at_1"] == pytest.approx(1 / 3)
    assert totals["recall_at_5"] == totals["recall_at_10"] == pytest.approx(2 / 3)
    assert totals["mp_at_1"] == pytest.approx(1 / 3)
    assert totals["mp_at_5"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert totals["mean_first_hit_rank"] == pytest.approx((1 + 3 + 5) / 3)
    assert totals["median_first_hit_rank"] == 3
    assert (totals["queries"], totals["skipped_queries"], totals["missing_positives"], totals["depth"]) == (3, 1, 1, 4)


def test_evaluate_keeps_the_place_of_each_query():
    quality = evaluate(["ab", "xa", "b"], truth(query("a"), query(""), query("b", image="r")))
    assert [(q.position, q.query.image, q.first_hit_rank) for q in quality.queries] == [(0, "q", 1), (2, "r", 1)]
    assert [row["image"] for row in quality.to_json(per_query=True)["per_query"]] == ["q", "r"]


def test_recall_at_n_counts_no_miss_however_short_the_ranking():
    assert evaluate(["x"], truth(query("a"))).recall_at(10) == 0


def test_three_protocols_judge_one_ranking():
    ranking = ["e", "j", "h", "n"]
    protocols = {"easy": query("e", "jh"), "medium": query("eh", "j"), "hard": query("h", "je")}
    precision = {name: evaluate([ranking], truth(q)).mean_average_precision() for name, q in protocols.items()}
    assert precision == {"easy": 1.0, "medium": 1.0, "hard": 1.0}
    worse = ["n", "e", "j", "h"]
    precision = {name: evaluate([worse], truth(q)).mean_average_precision() for name, q in protocols.items()}
    assert precision == {"easy": 0.5, "medium": pytest.approx((1 / 2 + 2 / 3) / 2), "hard": 0.5}


def test_evaluate_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="1 rankings for 2 queries"):
        evaluate(["a"], truth(query("a"), query("b")))
    with pytest.raises(DataError, match="none of the 1 queries has a positive"):
        evaluate(["a"], truth(query("")))
