"""JRT-RNN's stack: a sequence mixer, with a prefix that only the prefix layers see both ways."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.linear_time import jrt_stack
from corelib.linear_time.jrt_stack import GatedShortConv, JRTStack
from corelib.testing import conformance

pytestmark = pytest.mark.method("jrt")
EXACT = dict(atol=1e-11, rtol=1e-10)


def stack_and_input(pattern):
    torch.manual_seed(0)
    stack = JRTStack(8, heads=2, pattern=pattern, features=3, window=3).double()
    return stack, torch.randn(2, 9, 8, dtype=torch.float64)


def test_it_is_a_sequence_mixer():
    stack, x = stack_and_input("cpw")
    for mixer in (stack.mixers[1].k_enc, stack.mixers[1].v_enc):
        mixer.requires_grad_(False)  # nothing to learn without a prefix
    conformance(stack, x)


def test_the_gated_convolution_by_hand():
    torch.manual_seed(0)
    layer = GatedShortConv(4).double()
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    conformance(layer, x)
    padded = torch.cat([x.new_zeros(2, 2, 4), x], 1)
    near = sum(layer.conv[:, i] * padded[:, i : i + 7] for i in range(3))
    gate = x @ layer.gate.weight.T + layer.gate.bias
    torch.testing.assert_close(layer(x)[0], (near * gate) @ layer.out.weight.T, **EXACT)


@pytest.mark.parametrize("pattern, both_ways", [("cpw", True), ("cwc", False)])
def test_only_prefix_layers_look_ahead_and_only_in_the_prefix(pattern, both_ways):
    stack, x = stack_and_input(pattern)
    x.requires_grad_()
    y, _ = stack(x, prefix=5)
    for i in (0, 3, 4, 6):
        grad = torch.autograd.grad(y[0, i].cos().sum(), x, retain_graph=True)[0][0]
        seen = (grad.abs().amax(-1) > 0).nonzero().max().item()
        assert seen == (max(i, 4) if both_ways else i)


def test_a_prefix_then_steps_equals_one_pass():
    stack, x = stack_and_input("cpwp")
    with torch.no_grad():
        whole, _ = stack(x, prefix=4)
        y, state = stack(x[:, :6], prefix=4)
        outs = [y]
        for t in range(6, 9):
            y, state = stack.step(x[:, t], state)
            outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, **EXACT)


def test_example_runs():
    assert not doctest.testmod(jrt_stack).failed


@pytest.mark.no_shape_checks
def test_bad_options_are_named():
    for pattern in ("", "px"):
        with pytest.raises(ValueError, match="pattern: expected letters of 'pwc'"):
            JRTStack(8, 2, pattern=pattern)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        GatedShortConv(4, width=0)
