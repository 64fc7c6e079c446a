"""Long convolutions by FFT against sums as they stand, scipy and conv1d, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.primitives import (
    direct_conv_reference,
    fft_conv,
    gated_fft_conv,
    two_sided_fft_conv,
)
from corelib.primitives.fft_conv import fast_length

EXACT = dict(atol=1e-11, rtol=1e-11)


def rand(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=25)
@given(L=st.integers(1, 40), K=st.integers(1, 60), batch=st.integers(1, 3))
def test_equals_the_sum(L, K, batch):
    u, kernel = rand(batch, 2, L), rand(2, K)
    torch.testing.assert_close(fft_conv(u, kernel), direct_conv_reference(u, kernel), **EXACT)


def test_reference_and_fast_form_equal_scipy_and_conv1d():
    signal = pytest.importorskip("scipy.signal")
    u, kernel = rand(2, 3, 50), rand(3, 17)
    wanted = signal.fftconvolve(u.numpy(), kernel[None].numpy(), axes=-1)[..., :50]
    conv1d = F.conv1d(F.pad(u, (16, 0)), kernel.flip(-1)[:, None], groups=3)
    for fn in (fft_conv, direct_conv_reference):
        torch.testing.assert_close(fn(u, kernel), torch.from_numpy(wanted), **EXACT)
        torch.testing.assert_close(fn(u, kernel), conv1d, **EXACT)


@settings(deadline=None, max_examples=15)
@given(L=st.integers(1, 30), K=st.integers(1, 40), ahead=st.integers(1, 40))
def test_two_sides(L, K, ahead):
    """The second kernel begins at the very next input."""
    u, past, future = rand(2, 3, L), rand(3, K), rand(3, ahead, seed=1)
    reversed_part = direct_conv_reference(F.pad(u, (0, 1))[..., 1:].flip(-1), future).flip(-1)
    wanted = direct_conv_reference(u, past) + reversed_part
    torch.testing.assert_close(two_sided_fft_conv(u, past, future), wanted, **EXACT)


@pytest.mark.parametrize(("L", "K"), [(1, 1), (7, 7), (12, 5), (5, 9)])
def test_gradients_equal_those_of_the_sum(L, K):
    u, kernel, ahead = (x.requires_grad_() for x in (rand(2, 3, L), rand(3, K), rand(3, K, seed=1)))
    d_y = rand(2, 3, L, seed=2)
    got = torch.autograd.grad(fft_conv(u, kernel), (u, kernel), d_y)
    wanted = torch.autograd.grad(direct_conv_reference(u, kernel), (u, kernel), d_y)
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, **EXACT)
    assert torch.autograd.gradcheck(two_sided_fft_conv, (u, kernel, ahead))


@pytest.mark.parametrize(("L", "K"), [(1, 1), (7, 7), (12, 5), (5, 9)])
def test_gates_stand_before_and_behind(L, K):
    leaves = [rand(2, 3, L), rand(3, K), rand(2, 3, L, seed=1), rand(2, 3, L, seed=2)]
    u, kernel, in_gate, out_gate = (x.requires_grad_() for x in leaves)
    wanted = out_gate * direct_conv_reference(in_gate * u, kernel)
    got = gated_fft_conv(*leaves)
    torch.testing.assert_close(got, wanted, **EXACT)
    results = [torch.autograd.grad(y.cos().sum(), leaves) for y in (got, wanted)]
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, **EXACT)
    torch.testing.assert_close(gated_fft_conv(u, kernel), fft_conv(u, kernel))


@pytest.mark.no_shape_checks
def test_a_gate_of_another_shape_is_named():
    u, kernel = rand(2, 3, 5), rand(3, 5)
    with pytest.raises(ValueError, match=r"in_gate: expected the shape of u, \(2, 3, 5\), got"):
        gated_fft_conv(u, kernel, u[:1])
    with pytest.raises(TypeError, match="out_gate: expected the dtype of u"):
        gated_fft_conv(u, kernel, None, u.float())


def test_only_one_gradient_is_asked_for():
    u, kernel = rand(2, 3, 6), rand(3, 6)
    for leaf in (u, kernel):
        leaf.requires_grad_()
        (got,) = torch.autograd.grad(fft_conv(u, kernel).square().sum(), leaf)
        (wanted,) = torch.autograd.grad(direct_conv_reference(u, kernel).square().sum(), leaf)
        torch.testing.assert_close(got, wanted, **EXACT)
        leaf.requires_grad_(False)


def test_channels_may_have_several_axes_or_none():
    u = rand(2, 3, 4, 9)
    for kernel in (rand(5), rand(4, 5), rand(3, 4, 5), rand(2, 3, 4, 5)):
        got = fft_conv(u, kernel)
        torch.testing.assert_close(got, direct_conv_reference(u, kernel), **EXACT)


def test_the_skip_connection_is_a_tap():
    u, kernel, skip = rand(2, 3, 8), rand(3, 8), rand(3)
    folded = torch.cat([kernel[:, :1] + skip[:, None], kernel[:, 1:]], -1)
    torch.testing.assert_close(
        fft_conv(u, folded), fft_conv(u, kernel) + skip[:, None] * u, **EXACT
    )


def test_nothing_comes_round_the_circle():
    """An input at the end must not reach the beginning, however long the kernel."""
    u = torch.zeros(1, 8, dtype=torch.float64)
    u[0, -1] = 1.0
    got = fft_conv(u, torch.ones(1, 100, dtype=torch.float64))
    torch.testing.assert_close(got, u, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    u, kernel = rand(2, 3, 20, dtype=dtype), rand(3, 20, dtype=dtype)
    got = fft_conv(u, kernel)
    assert got.dtype == dtype
    wanted = direct_conv_reference(u.double(), kernel.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4)])
def test_nothing_to_do(shape):
    u = torch.zeros(shape)
    assert fft_conv(u, torch.ones(3, 4)).shape == shape
    assert two_sided_fft_conv(u, torch.ones(3, 4), torch.ones(3, 4)).shape == shape


def test_fast_lengths_are_enough_and_near():
    for n in range(1, 600):
        found = fast_length(n)
        odd = found // (found & -found)
        assert n <= found < max(2 * n, 2) and odd in (1, 3, 5)
        assert not any(n <= m < found for m in (2**a * b for a in range(11) for b in (1, 3, 5)))


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"kernel: expected the channels of u, \(2, 3\), .* \(2,\)"),
        (torch.ones(1, 4), ValueError, "kernel: expected the channels"),
        (torch.ones(1, 2, 3, 4), ValueError, "kernel: expected a length and at most the axes of u"),
        (torch.ones(3, 0), ValueError, "kernel: expected at least one tap"),
        (torch.ones(3, 4).double(), TypeError, "kernel: expected the dtype of u, torch.float32"),
        (torch.ones(3, 4).long(), TypeError, "kernel: expected a floating-point dtype"),
        ([1.0], TypeError, "kernel: expected a tensor, got list"),
    ],
)
def test_bad_input_is_named(kernel, error, message):
    with pytest.raises(error, match=message):
        fft_conv(torch.ones(2, 3, 5), kernel)
