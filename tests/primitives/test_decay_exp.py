"""Decays from their logarithms: the ordinary exponential, and zero where it hardly differs."""

import doctest

import pytest
import torch

from corelib.primitives import decay_exp
from corelib.primitives.decay_exp import decay_exp_, smallest_exponent

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def test_doctest():
    failures, tests = doctest.testmod(decay_exp)
    assert tests and not failures


@DTYPES
def test_equals_exp_above_the_cut_and_is_zero_below(dtype):
    least = smallest_exponent(dtype)
    x = torch.linspace(-200, 3, 4001, dtype=dtype)
    y, kept = decay_exp_(x.clone()), x > least + 0.01
    torch.testing.assert_close(y[kept], torch.exp(x[kept]), atol=0.0, rtol=1e-6)
    assert not y[~kept].any() and kept.any() and not kept.all()
    assert y[kept].min() ** 1.5 > torch.finfo(dtype).tiny  # room for a product, still normal


@DTYPES
def test_ends_and_holes(dtype):
    x = torch.tensor([float("-inf"), -1e30, 0.0, float("nan")], dtype=dtype)
    y = decay_exp_(x)
    assert y is x or y.data_ptr() == x.data_ptr()
    assert y[:3].tolist() == [0.0, 0.0, 1.0] and bool(y[3].isnan())


def test_derivatives_forwards_backwards_and_twice():
    x = torch.tensor([-300.0, -50.0, -3.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decay_exp.decay_exp, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(decay_exp.decay_exp, x)
    y = decay_exp.decay_exp(x)
    torch.testing.assert_close(y, decay_exp_(x.detach().clone()), atol=0.0, rtol=0.0)
    slope = torch.func.grad(lambda x: decay_exp.decay_exp(x).sum())(x.detach())
    torch.testing.assert_close(slope, y.detach(), atol=0.0, rtol=0.0)
    holes = torch.tensor([float("-inf")], requires_grad=True)
    assert torch.autograd.grad(decay_exp.decay_exp(holes).sum(), holes)[0].item() == 0.0
