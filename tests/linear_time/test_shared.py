"""The layer around a long kernel, with the plainest kernel there is."""

from __future__ import annotations

import pytest
import torch

from corelib.linear_time.shared import ConvState, LongConvolution, TwoSided, with_skip
from corelib.testing import conformance

double = torch.float64


class Echo(LongConvolution):
    """Each input again, ``taps - 1`` steps later; nothing follows."""

    def __init__(self, channels, taps):
        super().__init__(channels, taps)
        self.out = torch.nn.Identity()
        self.weight = torch.nn.Parameter(torch.eye(taps)[-1].expand(channels, -1).clone())

    def kernel(self, L):
        return self.weight[:, :L]

    def mix(self, y):
        return self.out(y)


def inputs(L=9, channels=2):
    return torch.randn(2, L, channels, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("taps", [1, 4, 20])
def test_an_echo(taps):
    layer, x = Echo(2, taps).double(), inputs()
    late = torch.cat([torch.zeros(2, taps - 1, 2, dtype=double), x], 1)[:, :9]
    torch.testing.assert_close(layer(x)[0], late + layer.skip * x)
    conformance(layer, x, leak=1e-12)


def test_both_directions_count_from_the_next_input():
    layer, x = TwoSided(Echo, 2, 3).double(), inputs()
    past = torch.cat([torch.zeros(2, 2, 2, dtype=double), x[:, :-2]], 1)
    future = torch.cat([x[:, 3:], torch.zeros(2, 3, 2, dtype=double)], 1)
    torch.testing.assert_close(layer(x), past + layer.past.skip * x + future)


def test_gradients_go_back_through_the_state():
    layer, x = Echo(2, 5).double(), inputs().requires_grad_()
    _, state = layer(x[:, :6])
    y, _ = layer(x[:, 6:], state)
    (grad,) = torch.autograd.grad(y.sum(), x)
    wanted = torch.zeros(2, 5, 2, dtype=double)
    wanted[:, 2:] = 1
    torch.testing.assert_close(grad[:, :5], wanted)


def test_the_state_keeps_the_kernel_of_a_stretch_of_steps():
    layer, x = Echo(2, 3), inputs().float()
    _, state = layer.step(x[:, 0], layer.init_state(2))
    assert isinstance(state, ConvState) and state.reach.shape == (2, 3)
    _, after = layer.step(x[:, 1], state)
    assert after.reach is state.reach
    assert layer(x, after)[1].reach is None, "a stretch may have been learned from"


def test_with_skip_by_hand():
    kernel = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = with_skip(kernel, torch.tensor([10.0, 20.0]))
    assert got.tolist() == [[11, 2], [23, 4]]


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    for arguments, name in (((0, 3), "channels"), ((2, 0), "taps"), ((2, 1.5), "taps")):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
            LongConvolution(*arguments)
    layer = Echo(2, 3)
    with pytest.raises(ValueError, match=r"x: expected \(B, 2\)"):
        layer.step(torch.zeros(1, 3), layer.init_state(1))
    with pytest.raises(TypeError, match="x: expected the layer's dtype"):
        layer(torch.zeros(1, 3, 2, dtype=double))
    with pytest.raises(ValueError, match=r"x: expected \(B, L, 2\)"):
        TwoSided(Echo, 2, 3)(torch.zeros(1, 3, 4))
