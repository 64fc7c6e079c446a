"""Two directions: what is combined, and what mirroring the input does."""

from __future__ import annotations

import pytest
import torch

from corelib.state_space.bidirectional import (
    Add,
    Bidirectional,
    Concatenate,
    Gate,
    Multiply,
    Quasiseparable,
    shift,
    unshift,
)
from corelib.state_space.mamba import MambaBlock
from corelib.testing import assert_same, causality_probe

C = 6


def block(seed=0):
    torch.manual_seed(seed)
    return MambaBlock(C, state=2).double()


def tokens(L=7):
    g = torch.Generator().manual_seed(L)
    return torch.randn(2, L, C, generator=g, dtype=torch.float64)


def ways():
    torch.manual_seed(3)
    modules = Add(), Multiply(), Concatenate(C), Gate(C), Quasiseparable(C, heads=2)
    return {type(module).__name__: module.double() for module in modules}


def test_shifts():
    x = torch.arange(1.0, 7).view(1, 3, 2)
    assert shift(x).tolist() == [[[0, 0], [1, 2], [3, 4]]]
    assert unshift(x).tolist() == [[[3, 4], [5, 6], [0, 0]]]
    assert shift(x[:, :1]).tolist() == unshift(x[:, :1]).tolist() == [[[0, 0]]]
    assert shift(x[:, :0]).shape == (1, 0, 2)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("L", [1, 7])
def test_both_directions_are_the_mixers(shared, L):
    x, past = tokens(L), block()
    future = past if shared else block(1)
    both = Bidirectional(past, None if shared else future)
    wanted = past(x)[0], future(x.flip(1))[0].flip(1)
    assert_same(both.directions(x), wanted)
    assert_same(both(x), wanted[0] + wanted[1])


def test_ways_to_combine():
    x, past, future = (torch.randn(1, 4, C, dtype=torch.float64) for _ in range(3))
    w = ways()
    assert_same(w["Add"](x, past, future), past + future)
    assert_same(w["Multiply"](x, past, future), past * future)
    left, right = w["Concatenate"].out.weight.split(C, 1)
    assert_same(w["Concatenate"](x, past, future), past @ left.T + future @ right.T)
    g = torch.sigmoid(w["Gate"].choose(x))
    assert_same(w["Gate"](x, past, future), g * past + (1 - g) * future)
    own = w["Quasiseparable"].own(x)
    own = torch.cat([own[..., :1].expand(-1, -1, 3), own[..., 1:].expand(-1, -1, 3)], -1)
    wanted = own * x
    wanted[:, 1:] += past[:, :-1]
    wanted[:, :-1] += future[:, 1:]
    assert_same(w["Quasiseparable"](x, past, future), wanted)


@pytest.mark.parametrize("name", ["Add", "Multiply", "Quasiseparable"])
def test_shared_weights_commute_with_mirroring(name):
    both, x = Bidirectional(block(), combine=ways()[name]), tokens()
    assert_same(both(x.flip(1)).flip(1), both(x))


@pytest.mark.parametrize("name", ["Add", "Multiply", "Quasiseparable"])
def test_mirroring_and_swapping_mirrors(name):
    past, future, combine = block(), block(1), ways()[name]
    x = tokens()
    swapped = Bidirectional(future, past, combine)(x.flip(1)).flip(1)
    assert_same(swapped, Bidirectional(past, future, combine)(x))
    assert not torch.allclose(Bidirectional(past, future, combine)(x.flip(1)).flip(1), swapped)


@pytest.mark.parametrize("name", ways())
def test_outputs_see_both_sides_and_everything_learns(name):
    both = Bidirectional(block(), block(1), ways()[name])
    influence = causality_probe(both, tokens(5))
    assert (influence > 0).all()
    both(tokens()).square().sum().backward()
    for label, parameter in both.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label


def test_a_position_meets_itself_once_only_in_the_last():
    """With mixers that copy: Add gives twice the input, the other its neighbours and itself."""

    class Copy(torch.nn.Module):
        def forward(self, x, state=None):
            return x, None

    x = tokens(4)
    assert_same(Bidirectional(Copy())(x), 2 * x)
    combine = Quasiseparable(C).double()
    torch.nn.init.zeros_(combine.own.weight)
    assert_same(Bidirectional(Copy(), combine=combine)(x), shift(x) + unshift(x) + x)


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x: expected 3 axes"):
        Bidirectional(block())(tokens()[0])
    with pytest.raises(ValueError, match="heads: expected a number that divides 6, got 4"):
        Quasiseparable(6, heads=4)
