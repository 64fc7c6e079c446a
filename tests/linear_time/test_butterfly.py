"""FlashButterfly: a convolution in three passes, and one with learned transforms."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.linear_time import butterfly
from corelib.linear_time.butterfly import LearnedButterflyConv, butterfly_conv, example
from corelib.primitives import direct_conv_reference, fft_conv
from corelib.testing import causality_probe

pytestmark = pytest.mark.method("long_conv")

EXACT = dict(atol=1e-10, rtol=1e-10)


def rand(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=30)
@given(L=st.integers(1, 40), K=st.integers(1, 60), rows=st.integers(1, 50))
def test_three_passes_equal_the_sum(L, K, rows):
    u, kernel = rand(2, 3, L), rand(3, K)
    wanted = direct_conv_reference(u, kernel)
    torch.testing.assert_close(butterfly_conv(u, kernel, rows), wanted, **EXACT)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64, 128])
def test_every_divisor_of_the_circle_equals_the_fft(rows):
    u, kernel = rand(2, 3, 64), rand(3, 65)
    torch.testing.assert_close(butterfly_conv(u, kernel, rows), fft_conv(u, kernel), **EXACT)


def test_the_passes_are_the_papers_factors():
    """``B^-1 blockdiag(circulants of m points) B`` as dense matrices is the circulant of N."""
    rows, m = 3, 4
    N = rows * m
    k1, n2 = torch.arange(rows)[:, None], torch.arange(m)
    F, W = (
        torch.exp(-2j * torch.pi * a.double() / n) for a, n in ((k1 * k1.T, rows), (k1 * n2, N))
    )
    B = torch.diag(W.flatten()) @ torch.kron(F, torch.eye(m, dtype=F.dtype))
    kernel = rand(N)
    lag = (n2[:, None] - n2) % m
    blocks = [row[lag] for row in (B @ kernel.to(F.dtype)).view(rows, m)]
    product = torch.linalg.inv(B) @ torch.block_diag(*blocks) @ B
    t = torch.arange(N)
    torch.testing.assert_close(product, kernel[(t[:, None] - t) % N].to(F.dtype), **EXACT)


@pytest.mark.parametrize(("L", "K", "rows"), [(1, 1, 1), (7, 7, 4), (12, 5, 3), (5, 9, 6)])
def test_gradients_equal_those_of_the_sum(L, K, rows):
    leaves = [rand(2, 3, L).requires_grad_(), rand(3, K).requires_grad_()]
    d_y = rand(2, 3, L, seed=1)
    wanted = torch.autograd.grad(direct_conv_reference(*leaves), leaves, d_y)
    got = torch.autograd.grad(butterfly_conv(*leaves, rows), leaves, d_y)
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    u, kernel = rand(2, 3, 20, dtype=dtype), rand(3, 20, dtype=dtype)
    got, wanted = butterfly_conv(u, kernel, 4), direct_conv_reference(u.double(), kernel.double())
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("N", "rows"), [(1, 1), (24, 1), (24, 4), (24, 3), (24, 24), (35, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_learned_one_starts_as_a_convolution(N, rows, dtype):
    L = (N + 1) // 2
    u, kernel = rand(2, 3, L, dtype=dtype), rand(3, L, dtype=dtype)
    layer = LearnedButterflyConv(N, rows, dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    wanted = fft_conv(u, kernel)
    torch.testing.assert_close(layer(u, kernel), wanted, atol=tolerance, rtol=tolerance)


def test_the_learned_one_takes_longer_kernels_and_shorter_inputs():
    layer = LearnedButterflyConv(24, 4, torch.float64)
    for L, K in ((1, 1), (5, 30), (12, 13), (20, 5)):
        u, kernel = rand(2, 3, L), rand(3, K)
        torch.testing.assert_close(layer(u, kernel), direct_conv_reference(u, kernel), **EXACT)


def test_every_coefficient_is_learned_and_checked_by_differences():
    layer = LearnedButterflyConv(6, 2, torch.float64)
    u, kernel = rand(1, 2, 3).requires_grad_(), rand(2, 3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["outer", "inner", "inner_back", "outer_back"]
    assert layer.inner.shape == (2, 3, 3, 2)

    def run(u, kernel, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (u, kernel))

    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (u, kernel, *leaves))
    moved = torch.autograd.grad(run(u, kernel, *leaves).cos().sum(), leaves)
    assert all(d.any() for d in moved)


def test_once_moved_it_is_no_longer_causal():
    """The freedom costs causality: at the start nothing leaks, after a step something does."""
    layer = LearnedButterflyConv(16, 4, torch.float64)
    kernel, x = rand(2, 8), rand(1, 8, 2)

    def leak():
        influence = causality_probe(lambda x: layer(x.mT, kernel).mT, x)
        return (influence.triu(1).max() / influence.max()).item()

    assert leak() < 1e-12
    with torch.no_grad():
        layer.inner += 0.05 * rand(*layer.inner.shape)
    assert leak() > 1e-3


def test_doctest_and_nothing_to_do():
    assert doctest.testmod(butterfly).failed == 0
    assert butterfly_conv(**example()).shape == (1, 2, 11)
    assert butterfly_conv(torch.zeros(2, 3, 0), torch.ones(3, 4), 2).shape == (2, 3, 0)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: butterfly_conv(rand(2, 3, 4), rand(3, 4), 0), "rows: expected a whole number"),
        (lambda: butterfly_conv(rand(2, 3, 4), rand(2, 4), 2), "kernel: expected the channels"),
        (lambda: LearnedButterflyConv(10, 3), "rows: expected a divisor of N = 10, got 3"),
        (
            lambda: LearnedButterflyConv(6, 3, torch.float64)(rand(2, 3, 4), rand(3, 4)),
            r"u: expected L \+ K - 1 of at most N = 6, got 7",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
