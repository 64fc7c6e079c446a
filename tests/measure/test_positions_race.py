"""What the race of positions is run with: contestants that are what they say, small trainings."""

import pytest
import torch

from corelib.linear_time.nprf_rpe import kernel_attention_rpe_dense, nprf, prf
from corelib.linear_time.urpe import POSITIONS
from corelib.measure.races import positions
from corelib.measure.races.positions import (
    LENGTHS,
    TASKS,
    chance,
    inputs,
    learn,
    learn_to_look_back,
    linear_attention,
    recorded,
    softmax_with_bias,
    softmax_with_learnt_bias,
)
from corelib.primitives.toeplitz import toeplitz

pytestmark = [pytest.mark.method("nprf_rpe"), pytest.mark.method("urpe")]


def test_contestants():
    phi_q, phi_k, v, bias = inputs(37, 8)
    wanted = (phi_q @ phi_k.mT * 8**-0.5 + toeplitz(bias)).softmax(-1) @ v
    for fn in (softmax_with_bias, softmax_with_learnt_bias):
        torch.testing.assert_close(fn(phi_q, phi_k, v, bias), wanted)
    wanted = kernel_attention_rpe_dense(phi_q, phi_k, v, 0 * bias, causal=False)
    torch.testing.assert_close(linear_attention(phi_q, phi_k, v), wanted)


@pytest.mark.parametrize("task", TASKS)
def test_a_short_training(task):
    model, result = learn(task, "urpe", 6, steps=3, C=8, heads=2, layers=1)
    assert len(result["losses"]) == 3
    assert len(result["by position"]) == (6 if task == "positions" else 3)
    assert model.tables[0].gain.sub(1).abs().max() > 0
    assert chance(task, 6) in (1 / 6, 1 / 32)


@pytest.mark.parametrize("features", [prf, nprf])
def test_looking_back_trains_one_kind_of_positions(features):
    for relative in (False, True):
        losses = learn_to_look_back(features, relative, steps=2)
        assert len(losses) == 2 and losses[0] < 4
        model = positions.OneHead(features, relative, 5, 4, 3)
        assert model.bias.requires_grad == relative != model.places.requires_grad
        assert (model.places == 0).all() == relative


def test_recorded_runs_are_complete():
    runs = recorded()
    told = {(run["task"], run["position"], run["length"]) for run in runs}
    assert told == {(t, p, n) for t in TASKS for p in POSITIONS for n in LENGTHS}
    assert all(0 <= run["accuracy"] <= 1 and run["losses"] for run in runs)
