"""Fitted exponents."""

import math

import numpy as np
import pytest
import scipy.stats

from corelib.measure import Exponent, fit_exponent


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exact_powers_are_found(power):
    lengths = [128, 256, 512, 1024, 2048]
    fit = fit_exponent(lengths, [3e-6 * n**power for n in lengths])
    assert fit.value == pytest.approx(power, abs=1e-12)
    assert fit.stderr == pytest.approx(0, abs=1e-7)
    assert fit.coefficient == pytest.approx(3e-6)
    assert fit.predict(4096) == pytest.approx(3e-6 * 4096**power)


def test_noise_agrees_with_scipy():
    random = np.random.default_rng(0)
    lengths = np.array([100, 200, 300, 500, 800, 1300])
    costs = 2e-7 * lengths**1.8 * np.exp(random.normal(0, 0.1, 6))
    ours, oracle = (
        fit_exponent(lengths, costs),
        scipy.stats.linregress(np.log(lengths), np.log(costs)),
    )
    assert ours.value == pytest.approx(oracle.slope)
    assert ours.stderr == pytest.approx(oracle.stderr)
    assert ours.coefficient == pytest.approx(math.exp(oracle.intercept))
    assert str(Exponent(1.984, 0.031)) == "1.98 ± 0.03"


@pytest.mark.parametrize(
    ("lengths", "costs", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], "5 different lengths, got 4"),
        ([1, 2, 3, 4, 4], [1, 2, 3, 4, 4], "5 different lengths, got 4"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], "got 5 and 4"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 0], "positive and finite"),
        ([0, 2, 3, 4, 5], [1, 2, 3, 4, 5], "positive and finite"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, math.nan], "positive and finite"),
    ],
)
def test_bad_input(lengths, costs, message):
    with pytest.raises(ValueError, match=message):
        fit_exponent(lengths, costs)
