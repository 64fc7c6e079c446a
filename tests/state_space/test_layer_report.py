"""The report: it sees what it is to see, and says so when a layer breaks the contract."""

from __future__ import annotations

import pytest
import torch

from corelib.measure.probes import state_jacobian
from corelib.state_space.layer_report import coupled_states, eigenvalue_ring, examine
from corelib.state_space.mamba360 import make_layer

FEW = dict(length=12, lengths=(8, 12, 16, 24, 32))


class Decay(torch.nn.Module):
    """``h_t = a h_(t-1) + x_t`` with a number a channel; ``leak`` of the last input everywhere."""

    def __init__(self, a=0.5, leak=0.0):
        super().__init__()
        self.a, self.leak = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64)), leak

    def init_state(self, batch):
        return self.a.new_zeros(batch, 2)

    def step(self, x_t, state):
        state = self.a * state + x_t
        return state, state

    def forward(self, x, state=None):
        state, out = self.init_state(len(x)) if state is None else state, []
        for x_t in x.unbind(1):
            y, state = self.step(x_t, state)
            out.append(y)
        return torch.stack(out, 1) + self.leak * x[:, -1:], state


def test_everything_about_a_decay():
    report = examine(Decay(0.5), 2, **FEW)
    assert report.conforms == "" and report.future == 0 and report.lti
    assert report.coupled == 1 and report.ring == pytest.approx((0.5, 0.5))
    assert report.halflife == pytest.approx(1) and report.field == 2
    assert set(report.state.values()) == {16} and not report.state_grows
    assert report.exponent == pytest.approx(1, abs=0.05)


def test_a_leak_is_reported():
    report = examine(Decay(0.5, leak=0.1), 2, **FEW)
    assert "continuation" in report.conforms or "differs" in report.conforms
    assert report.future > 0.01


@pytest.mark.parametrize(
    ("matrix", "coupled"),
    [
        (torch.diag(torch.tensor([0.5, 0.2, 0.1])), 1),
        (torch.tensor([[0.5, 0, 0], [1, 0.2, 0], [1, 1, 0.1]]), 1),  # triangular: nothing acts back
        (torch.tensor([[0.5, -0.3, 0], [0.3, 0.5, 0], [0, 0, 0.1]]), 2),  # a complex pair
        (torch.tensor([[0.0, 1, 0], [0, 0, 1], [0.5, 0, 0]]), 3),  # around a circle
    ],
)
def test_coupled_states(matrix, coupled):
    assert coupled_states(matrix.double()) == coupled


def test_the_ring_leaves_shift_registers_out():
    register = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    assert eigenvalue_ring(register) is None
    with_pole = torch.block_diag(register, torch.tensor([[0.25]], dtype=torch.float64))
    assert eigenvalue_ring(with_pole) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("name", ["S4D", "S4", "LRU", "S5"])
def test_the_ring_is_that_of_the_layers_own_poles(name):
    layer, x = make_layer(name, 3, 4), torch.randn(1, 6, 3, dtype=torch.float64)
    low, high = eigenvalue_ring(state_jacobian(layer, x[:, 0], layer(x)[1]))
    if name == "LRU":
        decay = layer.decay().abs()
    elif name == "S4":
        from corelib.state_space.dplr import discrete_form

        decay = torch.linalg.eigvals(discrete_form(layer.system(), layer.log_step.exp())[0]).abs()
    else:
        decay = layer.discrete()[1 if name == "S4D" else 0].abs()
    assert (low, high) == pytest.approx((decay.min().item(), decay.max().item()))
