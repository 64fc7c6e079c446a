"""The readers of the race of reading twice: equal starts, records, learning."""

from __future__ import annotations

import pytest
import torch

from corelib.measure.races import read_twice as race
from corelib.testing import assert_same

pytestmark = pytest.mark.method("jrt")


def test_every_kind_is_recorded():
    runs = race.recorded()
    assert [run["kind"] for run in runs] == list(race.KINDS)
    for run in runs:
        assert run["features"] == race.FEATURES and len(run["curve"]) == race.STEPS // 30
        assert set(run["accuracy"]) == {f"{a} {b}" for a, b in race.TESTED}
        assert run["state"] == race.Reader(race.FEATURES).state_numbers()


def test_reading_twice_is_reading_the_repeated_prompt():
    torch.manual_seed(0)
    model = race.Reader(3)
    ids = torch.tensor([[1, 10, 11, 2, 11, 3], [1, 20, 30, 2, 20, 3]])
    assert_same(model(ids, "twice"), model(ids.repeat(1, 2), "once"))
    assert (model(ids, "prefix") - model(ids, "once")).abs().max() > 1e-3


def test_a_run_learns(monkeypatch):
    monkeypatch.setattr(race, "TRAINED", ((2, 2),))
    monkeypatch.setattr(race, "TESTED", ((2, 2),))
    run = race.learn("prefix", 3, steps=60)
    assert run["curve"][1] < run["curve"][0] - 0.3
    assert 0 <= run["accuracy"]["2 2"] <= 1


def test_prefills_have_the_same_prompt():
    for name, (run, inputs) in race.prefills(40).items():
        length = 80 if "twice" in name else 40
        assert run(*inputs).shape == (1, race.H, length, race.V)
