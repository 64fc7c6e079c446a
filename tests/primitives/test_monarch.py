"""Transforms and long convolutions by matrix products against torch.fft, gradients too."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.primitives import direct_conv_reference, gated_fft_conv, monarch, monarch_transform
from corelib.primitives.monarch import (
    causal_points,
    monarch_conv,
    monarch_factors,
    monarch_fft,
    monarch_frequencies,
    monarch_ifft,
    monarch_mirror,
    pack_real,
    packed_coefficients,
    unpack_real,
)

EXACT = dict(atol=1e-10, rtol=1e-10)
FACTORS = [
    (1,),
    (7,),
    (16,),
    (4, 4),
    (2, 8),
    (8, 2),
    (5, 3),
    (3, 5),
    (1, 6, 1),
    (2, 3, 4),
    (2,) * 5,
]


def rand(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def complex_rand(*shape):
    return torch.complex(rand(*shape), rand(*shape, seed=1))


def around(u, kernel):
    """A convolution around a circle of L points, term by term."""
    L, y = u.shape[-1], torch.zeros_like(u)
    for lag in range(kernel.shape[-1]):
        y = y + kernel[..., lag, None] * u.roll(lag % L, -1)
    return y


@pytest.mark.parametrize("factors", FACTORS)
def test_transform_is_torch_fft_in_another_order(factors):
    z = complex_rand(2, 3, math.prod(factors))
    spectrum = monarch_fft(z, factors)
    wanted = torch.fft.fft(z)[..., monarch_frequencies(factors)]
    torch.testing.assert_close(spectrum, wanted, **EXACT)
    torch.testing.assert_close(monarch_ifft(spectrum, factors), z, **EXACT)


@pytest.mark.parametrize("factors", FACTORS)
def test_empty_rows_are_skipped(factors):
    """Fewer points in are zeros behind them; fewer points out are the first ones."""
    M = math.prod(factors)
    z = complex_rand(3, M)
    for points in {0, 1, M // 2, M - 1} & set(range(M)):
        spectrum = monarch_fft(z[:, :points], factors)
        wanted = torch.fft.fft(z[:, :points], n=M) if points else torch.zeros_like(z)
        torch.testing.assert_close(spectrum, wanted[:, monarch_frequencies(factors)], **EXACT)
        first = monarch_ifft(monarch_fft(z, factors), factors, points)
        torch.testing.assert_close(first, z[:, :points], **EXACT)


def test_order_of_the_paper():
    """Two factors: ``Y[k1, k2]`` is frequency ``k1 + N1 k2``; a third one nests."""
    places = monarch_frequencies((4, 8)).view(4, 8)
    k1, k2 = torch.arange(4)[:, None], torch.arange(8)
    assert torch.equal(places, k1 + 4 * k2)
    nested = monarch_frequencies((4, 2, 4)).view(4, 2, 4)
    assert torch.equal(nested, k1[..., None] + 4 * (torch.arange(2)[:, None] + 2 * torch.arange(4)))


@pytest.mark.parametrize("factors", FACTORS)
def test_mirror_finds_the_negative_frequency(factors):
    frequencies, mirror = monarch_frequencies(factors), monarch_mirror(factors)
    assert torch.equal(frequencies[mirror], -frequencies % len(frequencies))
    x = rand(2, len(frequencies)).to(torch.complex128)
    spectrum = monarch_fft(x, factors)
    torch.testing.assert_close(spectrum[:, mirror].conj(), spectrum, **EXACT)


@given(points=st.integers(1, 3000), largest=st.sampled_from([2, 16, 32, 64]))
@settings(deadline=None, max_examples=60)
def test_factors_multiply_to_the_points_and_are_small_where_they_can_be(points, largest):
    factors = monarch_factors(points, largest)
    assert math.prod(factors) == points
    rest = points
    for prime in range(2, largest + 1):
        while rest % prime == 0:
            rest //= prime
    assert rest > 1 or max(factors) <= largest


def test_factors_of_the_papers_ladder():
    ladder = {8: (16, 16), 10: (32, 32), 12: (16,) * 3, 13: (16, 16, 32), 14: (16, 32, 32)}
    for power, wanted in (ladder | {15: (32,) * 3}).items():
        assert sorted(monarch_factors(1 << power)) == list(wanted)


@pytest.mark.parametrize("points", [1, 2, 9, 10])
def test_packing_and_back(points):
    x = rand(2, 3, points + 1)[..., 1:]  # an odd place in memory
    z = pack_real(x)
    assert z.shape == (2, 3, (points + 1) // 2)
    torch.testing.assert_close(unpack_real(z, points), x)


def test_a_packed_product_is_a_real_convolution():
    """The docstring's ``Z_y = direct Z_u + mirrored Z_u'``, and its transpose."""
    factors = (3, 4)
    u, k = rand(24), rand(24, seed=1)
    Z_u = monarch_fft(pack_real(u), factors)
    direct, mirrored = packed_coefficients(monarch_fft(pack_real(k), factors), factors)
    reflected = Z_u[monarch_mirror(factors)].conj()
    y = unpack_real(monarch_ifft(direct * Z_u + mirrored * reflected, factors), 24)
    torch.testing.assert_close(y, around(u, k), **EXACT)
    back = direct.conj() * Z_u - mirrored.conj() * reflected
    reversed_k = k.flip(0).roll(1)
    got = unpack_real(monarch_ifft(back, factors), 24)
    torch.testing.assert_close(got, around(u, reversed_k), **EXACT)


@settings(deadline=None, max_examples=30)
@given(L=st.integers(1, 40), K=st.integers(1, 60), order=st.integers(1, 4))
def test_equals_the_sum(L, K, order):
    u, kernel = rand(2, 3, L), rand(3, K)
    factors = (2,) * (order - 1) + (-(-causal_points(L, K) // 2 ** (order - 1)),)
    wanted = direct_conv_reference(u, kernel)
    for given_factors in (factors, monarch_factors(causal_points(L, K)), None):
        torch.testing.assert_close(monarch_conv(u, kernel, factors=given_factors), wanted, **EXACT)


@settings(deadline=None, max_examples=30)
@given(L=st.integers(1, 24), K=st.integers(1, 60))
def test_around_a_circle(L, K):
    u, kernel, gate = rand(2, 3, L), rand(3, K), rand(2, 3, L, seed=1)
    wanted = gate * around(gate * u, kernel)
    exact_fit = [(L // 2,)] if L % 2 == 0 else []
    for factors in [None, (3, 8), *exact_fit]:
        got = monarch_conv(u, kernel, gate, gate, causal=False, factors=factors)
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("L", "K"), [(1, 1), (12, 12), (13, 5), (6, 9)])
@pytest.mark.parametrize("factors", [(4, 4), (2, 7), (13,), (2, 2, 2, 2), None])
def test_gradients_equal_those_of_the_sum(L, K, causal, factors):
    """With both gates, and with respect to each input alone."""
    leaves = [rand(2, 3, L), rand(3, K), rand(2, 3, L, seed=1), rand(2, 3, L, seed=2)]
    d_y = rand(2, 3, L, seed=3)
    plain = direct_conv_reference if causal else around
    [x.requires_grad_() for x in leaves]
    u, kernel, in_gate, out_gate = leaves
    wanted = torch.autograd.grad(out_gate * plain(in_gate * u, kernel), leaves, d_y)
    out = monarch_conv(*leaves, causal=causal, factors=factors)
    for got, want in zip(torch.autograd.grad(out, leaves, d_y), wanted):
        torch.testing.assert_close(got, want, **EXACT)
    for chosen, want in zip(range(4), wanted):
        alone = [x.detach().requires_grad_(i == chosen) for i, x in enumerate(leaves)]
        out = monarch_conv(*alone, causal=causal, factors=factors)
        (got,) = torch.autograd.grad(out, alone[chosen], d_y)
        torch.testing.assert_close(got, want, **EXACT)


def test_gradcheck_without_gates():
    u, kernel = rand(2, 2, 5).requires_grad_(), rand(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, k: monarch_conv(u, k, factors=(2, 2)), (u, kernel))


def test_only_the_inputs_are_kept_for_the_backward_pass():
    leaves = [rand(2, 3, 64), rand(3, 64), rand(2, 3, 64, seed=1), rand(2, 3, 64, seed=2)]
    [x.requires_grad_() for x in leaves]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        monarch_conv(*leaves, factors=(8, 8))
    assert sum(x.nbytes for x in kept) == sum(x.nbytes for x in leaves)


def test_channels_may_have_several_axes_or_none():
    u = rand(2, 3, 4, 9)
    for kernel in (rand(5), rand(4, 5), rand(3, 4, 5), rand(2, 3, 4, 5)):
        kernel.requires_grad_()
        got, wanted = monarch_conv(u, kernel, factors=(2, 4)), direct_conv_reference(u, kernel)
        torch.testing.assert_close(got, wanted, **EXACT)
        grads = [torch.autograd.grad(y.cos().sum(), kernel)[0] for y in (got, wanted)]
        torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("gates", [(True, False), (False, True), (True, True), (False, False)])
def test_each_gate_may_be_left_out(gates):
    u, kernel, gate = rand(2, 3, 9), rand(3, 9), rand(2, 3, 9, seed=1)
    before, after = (gate if given else None for given in gates)
    wanted = direct_conv_reference(u * gate if gates[0] else u, kernel)
    wanted = wanted * gate if gates[1] else wanted
    got = monarch_conv(u, kernel, before, after, factors=(3, 3))
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(gated_fft_conv(u, kernel, before, after), wanted, **EXACT)


def test_tables_made_without_gradients_serve_training():
    """Matrices are kept between calls; a first call in inference mode must not spoil them."""
    with torch.inference_mode():
        monarch_conv(rand(1, 11), rand(11), factors=(11, 1))
    z = complex_rand(1, 11).requires_grad_()
    monarch_fft(z, (11, 1)).abs().sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_other_dtypes(dtype, causal):
    u, kernel, gate = (rand(*shape, dtype=dtype) for shape in ((2, 3, 20), (3, 20), (2, 3, 20)))
    plain = direct_conv_reference if causal else around
    wanted = gate.double() * plain(u.double() * gate.double(), kernel.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 0.3}[dtype]
    for factors in ((4, 5), None):
        got = monarch_conv(u, kernel, gate, gate, causal=causal, factors=factors)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4)])
def test_nothing_to_do(shape):
    assert monarch_conv(torch.zeros(shape), torch.ones(3, 4), factors=(4,)).shape == shape


def test_enough_points_for_a_causal_convolution():
    for L in range(1, 40):
        for K in (1, 2, L, L + 5):
            M, needed = causal_points(L, K), L + min(K, L) - 1
            assert M & (M - 1) == 0 and needed <= 2 * M < max(2 * needed, 3)


def test_doctests():
    assert doctest.testmod(monarch_transform).failed == 0
    assert doctest.testmod(monarch).failed == 0


U, K = torch.ones(2, 3, 5), torch.ones(3, 5)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: monarch_conv(U, K[:2]), ValueError, "kernel: expected the channels of u"),
        (lambda: monarch_conv(U, K, U[:1]), ValueError, r"in_gate: expected the shape of u, \(2"),
        (lambda: monarch_conv(U, K, None, U[0]), ValueError, "out_gate: expected the shape of u"),
        (lambda: monarch_conv(U, K, U.double()), TypeError, "in_gate: expected the dtype of u"),
        (lambda: monarch_conv(U, K, factors=(2, 2)), ValueError, r"at least half of .* = 9, got"),
        (lambda: monarch_conv(U, K, causal=False, factors=(3,)), ValueError, "= 9, got"),
        (lambda: monarch_conv(U, K, factors=(2, 0)), ValueError, "factors: expected whole numbers"),
        (lambda: monarch_conv(U, K, factors=()), ValueError, "factors: expected whole numbers"),
        (lambda: monarch_fft(torch.ones(5) + 0j, (2, 2)), ValueError, "x: expected at most 4"),
        (lambda: monarch_ifft(torch.ones(5) + 0j, (2, 2)), ValueError, "a product of 5, got"),
        (lambda: monarch_ifft(torch.ones(4) + 0j, (2, 2), 5), ValueError, "points: expected 0 to"),
        (lambda: monarch_factors(0), ValueError, "points: expected a whole number"),
        (lambda: monarch_factors(8, 1), ValueError, "largest: expected a whole number"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
