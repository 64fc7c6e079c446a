"""FlashFFTConv: products, partial and frequency-sparse convolutions, and what they cost."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.linear_time import flashfftconv
from corelib.linear_time.flashfftconv import (
    example,
    fft_cost_model,
    frequency_sparse_conv,
    kept_frequencies,
    library_cost_model,
    monarch_conv,
    partial_conv,
)
from corelib.measure.hardware import A100, H100
from corelib.primitives import direct_conv_reference, fft_conv, monarch_factors

EXACT = dict(atol=1e-10, rtol=1e-10)


def rand(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def masked_conv(u, kernel, kept):
    """The kernel's spectrum with zeros written into it, by torch.fft."""
    N, L = len(kept), u.shape[-1]
    spectrum = torch.fft.fft(kernel[..., :L], n=N) * kept
    y = torch.fft.ifft(torch.fft.fft(u, n=N) * spectrum)
    assert y.imag.abs().max() < 1e-9  # the pattern keeps negatives
    return y.real[..., :L]


def test_every_order_equals_torch_fft_on_the_example():
    inputs = {name: x.double() for name, x in example().items()}
    u, kernel, before, after = inputs.values()
    wanted = after * direct_conv_reference(before * u, kernel)
    for factors in ((12,), (2, 6), (4, 3), (2, 2, 3), (3, 2, 2, 1), monarch_factors(16)):
        torch.testing.assert_close(monarch_conv(**inputs, factors=factors), wanted, **EXACT)
    assert doctest.testmod(flashfftconv).failed == 0


@settings(deadline=None, max_examples=30)
@given(L=st.integers(1, 30), K=st.integers(1, 40), share=st.floats(0, 1))
def test_partial_keeps_the_first_taps(L, K, share):
    u, kernel = rand(2, 3, L), rand(3, K)
    taps = max(1, round(share * K))
    wanted = direct_conv_reference(u, kernel[:, :taps])
    torch.testing.assert_close(partial_conv(u, kernel, taps), wanted, **EXACT)


def test_partial_with_several_axes_of_channels_or_none():
    u = rand(2, 3, 4, 9)
    for kernel in (rand(5), rand(4, 5), rand(3, 4, 5), rand(2, 3, 4, 5)):
        wanted = direct_conv_reference(u, kernel[..., :3])
        torch.testing.assert_close(partial_conv(u, kernel, 3), wanted, **EXACT)
    assert partial_conv(u[:0], rand(4, 5), 3).shape == (0, 3, 4, 9)


def test_all_taps_are_the_full_convolution():
    u, kernel = rand(2, 3, 33), rand(3, 33)
    torch.testing.assert_close(partial_conv(u, kernel, 33), fft_conv(u, kernel), **EXACT)


@pytest.mark.parametrize("taps", [1, 2, 7, 130])
@pytest.mark.parametrize("L", [2049, 5000])
def test_partial_in_blocks_with_gradients(taps, L):
    """Long inputs are cut into blocks; what hangs over a border arrives."""
    leaves = [rand(2, 2, L), rand(2, 130)]
    wanted = fft_conv(leaves[0], leaves[1][:, :taps])
    torch.testing.assert_close(partial_conv(*leaves, taps), wanted, **EXACT)
    [x.requires_grad_() for x in leaves]
    got, wanted = partial_conv(*leaves, taps), fft_conv(leaves[0], leaves[1][:, :taps])
    torch.testing.assert_close(got, wanted, **EXACT)
    d_y = rand(2, 2, L, seed=1)
    grads = [torch.autograd.grad(y, leaves, d_y) for y in (got, wanted)]
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("taps", [1, 4, 9])
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (3, 1, 9, 7), (2, 18)])
def test_streaming_needs_only_the_last_inputs(taps, pieces):
    u, kernel = rand(2, 3, 20), rand(3, 9)
    state, ys = None, []
    for piece in u.split(pieces, -1):
        y, state = partial_conv(piece, kernel, taps, state, return_state=True)
        assert state.shape == (2, 3, taps - 1)
        ys.append(y)
    wanted = direct_conv_reference(u, kernel[:, :taps])
    torch.testing.assert_close(torch.cat(ys, -1), wanted, **EXACT)
    torch.testing.assert_close(state, u[..., 20 - taps + 1 :] if taps > 1 else u[..., :0])


SPARSE = [
    (factors, keep1, keep2)
    for factors in ((4, 16), (8, 8), (5, 13), (1, 64), (64, 1))
    for keep1 in sorted({1, (factors[0] + 1) // 2, factors[0]})
    for keep2 in sorted({1, factors[1] // 2 or 1, factors[1] - 1 or 1, factors[1]})
]


@pytest.mark.parametrize(("factors", "keep1", "keep2"), SPARSE)
def test_skipping_blocks_is_zeroing_the_spectrum(factors, keep1, keep2):
    u, kernel = rand(2, 3, 31), rand(3, 33)
    wanted = masked_conv(u, kernel, kept_frequencies(factors, keep1, keep2))
    got = frequency_sparse_conv(u, kernel, keep1, keep2, factors)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_keeping_everything_is_the_convolution():
    for L, K in ((1, 1), (7, 3), (5, 9), (32, 32)):
        u, kernel = rand(2, 3, L), rand(3, K)
        power = (L + min(K, L) - 2).bit_length()
        sides = 1 << (power + 1) // 2, 1 << power // 2
        got = frequency_sparse_conv(u, kernel, *sides)
        torch.testing.assert_close(got, direct_conv_reference(u, kernel), **EXACT)


def test_whole_columns_are_a_low_pass():
    """As the released example: the frequencies from ``N1 keep2`` on are dropped."""
    u, kernel = rand(2, 3, 32), rand(3, 32)
    spectrum = torch.fft.rfft(kernel, n=64)
    spectrum[:, 24:] = 0
    wanted = torch.fft.irfft(torch.fft.rfft(u, n=64) * spectrum, n=64)[..., :32]
    torch.testing.assert_close(frequency_sparse_conv(u, kernel, 8, 3, (8, 8)), wanted, **EXACT)
    kept = kept_frequencies((8, 8), 8, 3)
    assert kept[:24].all() and not kept[24:41].any() and kept[41:].all()


def test_sparse_gradients():
    u, kernel = rand(1, 2, 5).requires_grad_(), rand(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, k: frequency_sparse_conv(u, k, 2, 3, (3, 4)), (u, kernel)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    u, kernel = rand(2, 3, 31, dtype=dtype), rand(3, 31, dtype=dtype)
    wanted = masked_conv(u.double(), kernel.double(), kept_frequencies((8, 8), 4, 5))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    for got, want in (
        (frequency_sparse_conv(u, kernel, 4, 5, (8, 8)), wanted),
        (partial_conv(u, kernel, 5), direct_conv_reference(u.double(), kernel[:, :5].double())),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_cost_counts_operations_of_each_product():
    """Order 2 of 32 x 32 packed points: ``16 M (N1 + N2)`` in products, all on matrix units."""
    cost = fft_cost_model(2048, 2, A100, rows=3)
    assert cost.matrix_flops == 3 * 16 * 1024 * (32 + 32)
    assert cost.other_flops == 3 * 1024 * (12 + 14)
    assert cost.main_bytes == 3 * 2 * 2048  # inputs and outputs without their zeros
    assert cost.flops == cost.matrix_flops + cost.other_flops
    slow = cost.other_flops / 19.5e12 + cost.main_bytes / 2039e9 + cost.chip_bytes / 19.5e12
    assert math.isclose(cost.seconds, cost.matrix_flops / 312e12 + slow)


def test_cost_short_sides_leave_the_matrix_units_and_long_circles_leave_the_chip():
    assert fft_cost_model(128, 2, A100).matrix_flops == 0
    inside, outside = (fft_cost_model(N, 2, A100).main_bytes / N for N in (2**16, 2**17))
    assert inside == 2 and outside == 2 + 8  # one of two products goes out and back
    times = {N: [fft_cost_model(N, p, H100).seconds for p in (2, 3, 4)] for N in (1024, 2**22)}
    assert times[1024].index(min(times[1024])) == 0
    assert times[2**22].index(min(times[2**22])) > 0


def test_cost_of_library_calls_grows_faster_than_what_it_must_move():
    cost = library_cost_model(2048, A100, rows=2)
    assert cost.matrix_flops == 0 and cost.flops == 2 * (5 * 2048 * 11 + 3 * 2048)
    assert cost.main_bytes > 10 * fft_cost_model(2048, 2, A100, rows=2).main_bytes


U, K = torch.ones(2, 3, 5), torch.ones(3, 5)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: partial_conv(U, K, 6), ValueError, "taps: expected 1 to 5, got 6"),
        (lambda: partial_conv(U, K, 3, U), ValueError, r"state: expected shape \(2, 3, 2\), got"),
        (lambda: partial_conv(U, K, 3, U.double()), TypeError, "state: expected the dtype of u"),
        (lambda: partial_conv(U, K[:2], 3), ValueError, "kernel: expected the channels of u"),
        (lambda: frequency_sparse_conv(U, K, 0, 1), ValueError, "keep1: expected 1 to 4, got 0"),
        (lambda: frequency_sparse_conv(U, K, 1, 5), ValueError, "keep2: expected 1 to 4, got 5"),
        (
            lambda: frequency_sparse_conv(U, K, 1, 1, (2, 4)),
            ValueError,
            r"factors: expected two with a product of at least 9, got \(2, 4\)",
        ),
        (lambda: fft_cost_model(7, 1, A100), ValueError, "N: expected an even whole number"),
        (lambda: fft_cost_model(8, 3, A100), ValueError, "order: expected at most the prime"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
