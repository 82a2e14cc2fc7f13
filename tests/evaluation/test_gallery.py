from pathlib import Path

from cbir.evaluation.gallery import choose_cases
from cbir.evaluation.ground_truth import GroundTruth, GroundTruthQuery
from cbir.evaluation.metrics import evaluate

RANKINGS = {"good": "abjx", "fair": "xabj", "bad": "xyz", "none": "abc", "fine": "cabx"}
POSITIVES = {"good": "ab", "fair": "ab", "bad": "ab", "none": "", "fine": "c"}
TRUTH = GroundTruth(
    "hand", Path(), tuple(GroundTruthQuery(n, None, frozenset(POSITIVES[n]), frozenset("j")) for n in RANKINGS)
)


def names(cases) -> list[str]:
    return [case.quality.query.image for case in cases]


def choose(count: int):
    rankings = list(RANKINGS.values())
    return choose_cases(evaluate(rankings, TRUTH), rankings, TRUTH, count)


def test_the_worst_and_the_best_are_chosen_and_no_query_twice():
    worst, best = choose(2)
    assert (names(worst), names(best)) == (["bad", "fair"], ["good", "fine"])
    worst, best = choose(3)
    assert (names(worst), names(best)) == (["bad", "fair", "good"], ["fine"])


def test_results_are_judged_junk_apart():
    _, best = choose(2)
    assert best[0].results == (("a", "positive"), ("b", "positive"), ("j", "junk"), ("x", "wrong"))
