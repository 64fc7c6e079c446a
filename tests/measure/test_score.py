"""Scores with their intervals."""

import pytest

from corelib.measure.score import Score, wilson


def test_wilson_against_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for right, n in ((0, 10), (3, 10), (10, 10), (137, 500)):
        known = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert wilson(right, n, z=1.959964) == pytest.approx(tuple(known), abs=1e-6)


def test_a_score_says_what_it_is_worth():
    score = Score(6, 10, 0.6)
    assert (score.accuracy, score.above_chance) == (0.6, False)
    assert Score(10, 10, 0.6).above_chance and score.interval == wilson(6, 10)
    assert str(Score(60, 100, 0.6)) == "60.0% [50.2%, 69.1%], chance 60.0%"


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="right, n: .*got 3 and 2"):
        wilson(3, 2)
