"""The race's runs: the shipped ones are whole, and a short one goes through."""

from __future__ import annotations

import copy
import itertools

import pytest

from corelib.measure.races import hapo as runs

pytestmark = pytest.mark.method("hapo")


def test_every_method_ran_from_every_seed():
    shipped = runs.recorded()
    assert {(r["method"], r["seed"]) for r in shipped} == set(
        itertools.product(runs.METHODS, runs.SEEDS)
    )
    assert len(shipped) == len(runs.METHODS) * len(runs.SEEDS)
    for run in shipped:
        curves = [run[key] for key in ("reward", "entropy", "length", "fork", "follow")]
        assert all(len(curve) == runs.STEPS for curve in curves)
        assert all(1 <= n <= runs.TASK.longest for n in run["length"])
        assert 0 <= run["before"] <= 1 and 0 <= run["after"] <= 1


def test_methods_of_one_seed_start_from_the_same_policy():
    first = {(r["seed"], r["before"], r["reward"][0], r["fork"][0]) for r in runs.recorded()}
    assert len(first) == len(runs.SEEDS)


def test_a_run_learns_in_a_copy():
    start = runs.start_policy(steps=1)
    before = copy.deepcopy(start.state_dict())
    run = runs.learn(start, "HAPO", seed=0, steps=2, answers=1)
    assert all((before[name] == now).all() for name, now in start.state_dict().items())
    assert len(run["reward"]) == 2 and run["method"] == "HAPO"
    assert set(run) == set(runs.recorded()[0])


def test_interval_by_hand():
    mean, low, high = runs.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.30 / 3**0.5, 2 + 4.30 / 3**0.5))


def test_scores_of_a_run():
    run = dict(reward=[0.0, 0.5, 1.0], after=0.9)
    assert runs.while_learning(run) == 0.5 and runs.after(run) == 0.9


def test_the_update_race_runs():
    rows = list(runs.hapo_update(quick=True))
    assert [row.contestant for row in rows] == ["corelib", "DAPO", "GRPO"] * 2
    assert all(row.seconds > 0 for row in rows)
