"""`corelib.testing` accepts layers that keep the contract and names the rule that others break."""

import pytest
import torch
from torch import nn

from corelib.testing import assert_same, causality_probe, conformance


class Decay(nn.Module):
    """An exponential moving average: the smallest mixer with a state."""

    def __init__(self, width):
        super().__init__()
        self.logit = nn.Parameter(torch.linspace(-1, 1, width, dtype=torch.float64))

    def init_state(self, batch):
        return self.logit.new_zeros(batch, len(self.logit))

    def step(self, x_t, state):
        decay = self.logit.sigmoid()
        state = decay * state + (1 - decay) * x_t
        return state, state

    def forward(self, x, state=None):
        state = self.init_state(x.shape[0]) if state is None else state
        out = []
        for position in range(x.shape[1]):
            y, state = self.step(x[:, position], state)
            out.append(y)
        return torch.stack(out, 1), state


class Leaks(Decay):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y + 1e-12 * x.flip(1).cumsum(1).flip(1), state


class ForgetsState(Decay):
    def forward(self, x, state=None):
        return super().forward(x, None)


class StepsDifferently(Decay):
    def step(self, x_t, state):
        y, state = super().step(x_t, state)
        return y + 1e-3 * (state.sum() > 0), state

    def forward(self, x, state=None):
        state = self.init_state(x.shape[0]) if state is None else state
        out = []
        for position in range(x.shape[1]):
            y, state = Decay.step(self, x[:, position], state)
            out.append(y)
        return torch.stack(out, 1), state


class MixesRows(Decay):
    def step(self, x_t, state):
        y, state = super().step(x_t, state)
        return y - 0.1 * x_t.mean(0), state


class ChangesDtype(Decay):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y.float(), state


class IdleParameter(Decay):
    def __init__(self, width):
        super().__init__(width)
        self.idle = nn.Parameter(torch.zeros(1))


@pytest.fixture
def x():
    return torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_true_mixer_passes(x):
    conformance(Decay(3), x)


@pytest.mark.parametrize(
    "broken, rule",
    [
        (Leaks, "later input"),
        (ForgetsState, "continuation"),
        (StepsDifferently, "step by step"),
        (MixesRows, "row 0 alone"),
        (ChangesDtype, "dtype"),
        (IdleParameter, "idle gets no gradient"),
    ],
)
def test_a_broken_mixer_is_named(broken, rule, x):
    with pytest.raises(AssertionError, match=rule):
        conformance(broken(3), x)


def test_a_leak_of_rounding_size_may_be_allowed(x):
    mixer = Leaks(x.shape[-1])
    conformance(mixer, x, leak=1e-10)
    with pytest.raises(AssertionError, match="depends on the later input"):
        conformance(mixer, x, leak=1e-14)


def test_probe_shows_the_triangle(x):
    influence = causality_probe(lambda value: value.cumsum(1), x)
    assert torch.equal(influence > 0, torch.ones(7, 7).tril().bool())


def test_assert_same_fails_on_nan_and_on_small_differences():
    want = torch.ones(3, dtype=torch.float64)
    assert_same(want + 1e-12, want)
    with pytest.raises(AssertionError, match="differs"):
        assert_same(torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64), want)
    with pytest.raises(AssertionError, match=r"at \(2,\)"):
        assert_same(want + torch.tensor([0, 0, 1e-8]), want)
    minus = torch.full((2,), float("-inf"))
    assert_same(minus, minus)
    with pytest.raises(AssertionError):
        assert_same(minus, -minus)


@pytest.mark.no_shape_checks
def test_wrong_rank_is_a_clear_error():
    with pytest.raises(ValueError, match=r"x must have shape \(B >= 2, L >= 4, C\)"):
        conformance(Decay(3), torch.zeros(7, 3))
