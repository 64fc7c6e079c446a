"""The races of two-sided layers and of state spaces as heads: sizes, records, learning."""

from __future__ import annotations

import pytest
import torch

from corelib.measure.races import bidirectional as sides
from corelib.measure.races import interaction_rank as forms
from corelib.state_space.interaction_rank import (
    heads_from_ssm,
    lag_attention,
    lag_operators,
    least_error,
)
from corelib.testing import assert_same

KINDS = list(sides.layers(32, 16, 8))


def test_layers_are_about_as_large_as_each_other():
    sizes = []
    for make in sides.layers(sides.WIDTH, 16, 8).values():
        torch.manual_seed(0)
        sizes.append(sum(p.numel() for p in sides.Encoder(make).parameters()))
    assert max(sizes) < 1.12 * min(sizes)


def test_the_usual_sum_has_one_skip_for_all_positions():
    layer = sides.layers(8, 4, 2)["Hydra, added"]()
    x = torch.randn(2, 5, 8)
    own = layer._operands(layer.in_proj(x))[-1]
    assert torch.equal(own, layer.D[:, None].expand(2, -1, 5))


def test_every_kind_is_recorded_with_every_seed():
    recorded = {(run["kind"], run["seed"]) for run in sides.recorded()}
    assert recorded == {(kind, seed) for kind in KINDS for seed in sides.SEEDS}
    assert list(sides.scores()) == KINDS
    assert all(len(run["curve"]) == sides.STEPS // 10 for run in sides.recorded())


def test_letters_and_windows():
    text = sides.letters("test")
    assert bytes((text[:7] + 32).tolist()) == b"MACBETH"
    ids, hidden = sides.windows(text, 50, torch.Generator().manual_seed(0))
    assert ids.shape == hidden.shape == (50, sides.LENGTH)
    assert 0.17 < hidden.float().mean() < 0.23 and 0 <= ids.min() and ids.max() < sides.MASK


@pytest.mark.parametrize("kind", ["Hydra", "attention, convolution first"])
def test_a_run_learns(kind):
    run = sides.learn(kind, 0, steps=20)
    assert run["curve"][1] < run["curve"][0] - 0.3 and run["bits"] < 5


def test_forms_of_one_state_space_agree():
    given = {name: part.double() for name, part in forms.system().items()}
    x = torch.randn(2, 9, forms.D, dtype=torch.float64)
    y = forms.recurrence(x, **given)
    assert_same(forms.all_pairs(x, lag_operators(**given, n=9)), y)
    assert_same(lag_attention(x, *heads_from_ssm(**given, n=9)), y)


def test_training_reaches_the_bound_and_no_more():
    lags = lag_operators(**{n: p.double() for n, p in forms.system().items()}, n=8)[:, :3, :2]
    left = least_error(lags)
    for heads in (1, 2):
        reached, bound = forms.train_heads(lags, heads)[-1], (left[heads] / left[0]).item()
        assert bound * (1 - 1e-9) <= reached < 1.01 * bound
