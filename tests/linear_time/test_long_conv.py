"""Long convolutions: squash by brute force, smooth by scipy, the layer by hand, and the trap."""

from __future__ import annotations

import doctest

import pytest
import torch
from scipy import ndimage, signal

from corelib.linear_time import long_conv
from corelib.linear_time.long_conv import (
    LongConv,
    double_exponential,
    example,
    roughness,
    small_random,
    smooth,
    smooth_reference,
    squash,
    squash_reference,
)
from corelib.linear_time.shared import TwoSided
from corelib.models.optim import FusedAdamW
from corelib.testing import causality_probe, conformance

EXACT = dict(atol=1e-11, rtol=1e-10)
double = torch.float64


def taps(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


def ones(channels, L):
    """A start whose every tap is well above any threshold of these tests."""
    return 1 + torch.rand(channels, L)


def random_layer(channels=3, l_max=16, **options):
    torch.manual_seed(0)
    options = dict(start=lambda c, n: torch.randn(c, n), lam=0.3) | options
    layer = LongConv(channels, l_max, **options).double()
    return layer, torch.randn(2, 13, channels, dtype=double)


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0, 10.0])
def test_squash_equals_the_formula_with_its_gradient(lam):
    k, ours = taps(3, 40), []
    for form in (squash, squash_reference):
        leaf = k.clone().requires_grad_()
        out = form(leaf, lam)
        (grad,) = torch.autograd.grad(out.cos().sum(), leaf)
        ours.append((out.detach(), grad))
    for got, wanted in zip(*ours):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.7])
def test_squash_is_the_proximal_map_of_the_one_norm(lam):
    """No point of a fine grid does better on ``(z - k)^2 / 2 + lam |z|``."""
    k, grid = taps(30), torch.linspace(-4, 4, 8001, dtype=double)

    def cost(z):
        return (z - k[:, None]) ** 2 / 2 + lam * z.abs()

    best = grid[cost(grid).argmin(1)]
    torch.testing.assert_close(squash(k, lam), best, atol=6e-4, rtol=0)
    assert (cost(squash(k, lam)[:, None])[:, 0] <= cost(grid).amin(1) + 1e-15).all()


def test_no_threshold_changes_nothing():
    assert torch.equal(squash(taps(9), 0.0), taps(9))
    layer, x = random_layer(lam=0.0)
    spectrum = torch.fft.rfft(x, n=32, dim=1) * torch.fft.rfft(layer.weight, n=32).T
    plain = torch.fft.irfft(spectrum, n=32, dim=1)[:, :13] + layer.skip * x
    torch.testing.assert_close(layer(x)[0], layer.mix(plain), **EXACT)


@pytest.mark.parametrize("width", [1, 3, 7, 31])
@pytest.mark.parametrize("L", [1, 2, 13, 40])
def test_smooth_is_scipys_uniform_filter(L, width):
    k = taps(2, 3, L)
    wanted = ndimage.uniform_filter1d(k.numpy(), width, axis=-1, mode="constant")
    for form in (smooth, smooth_reference):
        torch.testing.assert_close(form(k, width), torch.from_numpy(wanted), **EXACT)


def test_smooth_has_its_gradient_and_takes_nothing():
    leaf = taps(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: smooth(k, 3), leaf)
    for form in (smooth, smooth_reference):
        assert form(torch.zeros(2, 0), 3).shape == (2, 0)


def test_roughness_by_hand():
    kernels = torch.tensor([[1.0, 1, 1], [1, -1, 1], [3, 0, 4], [0, 0, 0]])
    torch.testing.assert_close(roughness(kernels), torch.tensor([0, 8 / 3, 1.0, 0]))
    noise = taps(200, 300)
    assert 1.9 < roughness(noise).mean() < 2.1
    assert roughness(smooth(noise, 7)).mean() < 0.4


def test_starts():
    torch.manual_seed(0)
    k = small_random(50, 400)
    assert 0.0019 < k.std() < 0.0021 and abs(k[:, :100].std() / k[:, 300:].std() - 1) < 0.1
    k = double_exponential(8, 4000)
    for i in range(8):  # the envelope of channel i, measured in its middle
        j, near = 1000, k[i, 900:1100]
        expected = 0.02 * torch.exp(-torch.tensor(j / 4000 * 4 ** (i / 8)))
        assert abs(near.square().mean().sqrt() / expected - 1) < 0.2
    assert double_exponential(1, 4).shape == (1, 4)


@pytest.mark.parametrize("L", [1, 13, 16, 30])
@pytest.mark.parametrize("width", [1, 5])
def test_layer_by_hand(L, width):
    layer, _ = random_layer(width=width)
    x = torch.randn(2, L, 3, dtype=double)
    kernel = squash_reference(smooth_reference(layer.weight, width), 0.3).detach().numpy()
    wanted = torch.zeros(2, L, 3, dtype=double)
    for b in range(2):
        for c in range(3):
            wanted[b, :, c] = torch.from_numpy(
                signal.fftconvolve(x[b, :, c].numpy(), kernel[c])[:L]
            )
    wanted = torch.nn.functional.gelu(wanted + layer.skip * x) @ layer.out.weight.T
    value, gate = (wanted + layer.out.bias).chunk(2, -1)
    torch.testing.assert_close(layer(x)[0], value * torch.sigmoid(gate), **EXACT)


@pytest.mark.parametrize("options", [{}, dict(width=5), dict(l_max=6, width=3), dict(l_max=1)])
def test_the_layer_is_a_sequence_mixer(options):
    layer, x = random_layer(start=ones, **options)
    conformance(layer, x, leak=1e-12)


def test_both_directions():
    torch.manual_seed(0)
    layer = TwoSided(LongConv, 2, 7, lam=0.0).double()
    x, wanted = torch.randn(2, 7, 2, dtype=double), torch.zeros(2, 7, 2, dtype=double)
    for t in range(7):
        for j in range(7):
            side, lag = (layer.past, t - j) if j <= t else (layer.future, j - t - 1)
            wanted[:, t] += side.weight[:, lag].detach() * x[:, j]
    torch.testing.assert_close(layer(x), layer.past.mix(wanted + layer.past.skip * x), **EXACT)
    assert (causality_probe(layer, x) > 0).all()


def test_kernel_dropout_is_of_taps_and_for_training_only():
    layer, _ = random_layer(channels=20, l_max=200, lam=0.0, kernel_dropout=0.25)
    dropped = layer.kernel(200)
    assert 0.2 < (dropped == 0).double().mean() < 0.3
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], layer.weight[kept] / 0.75, **EXACT)
    layer.eval()
    assert torch.equal(layer.kernel(200), layer.weight)


def test_the_trap_no_gradient_ever_comes_back():
    """Below the threshold nothing moves; above it, everything does."""
    for lam, alive in ((0.1, False), (0.001, True)):
        layer, x = random_layer(start=small_random, lam=0.0)
        layer.lam = lam
        before = layer.weight.detach().clone()
        for _ in range(3):
            (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), layer.weight)
            with torch.no_grad():
                layer.weight -= 1e-3 * grad
        assert bool(layer.kernel(16).any()) == alive
        assert torch.equal(layer.weight, before) != alive


@pytest.mark.parametrize("width", [1, 3])
def test_a_tap_that_starts_dead_moves_with_its_neighbours_only(width):
    torch.manual_seed(0)
    layer, x = LongConv(3, 64, lam=0.002, width=width), torch.randn(2, 70, 3)
    before, optimiser = layer.weight.detach().clone(), FusedAdamW(layer.parameters(), 1e-2)
    dead = squash(smooth(before, width), 0.002) == 0
    for _ in range(4):
        optimiser.step((layer(x)[0] - x.roll(20, 1)).square().mean())
    moved = layer.weight.detach() != before
    assert dead.sum() > 60 and moved[~dead].all()
    assert bool(moved[dead].any()) == (width > 1)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("start", [small_random, double_exponential])
def test_a_layer_that_could_never_learn_is_refused(start):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="lam: expected less than the largest tap .* got 0.1"):
        LongConv(4, 64, lam=0.1, start=start)
    LongConv(4, 64, lam=0.002, start=start)


def test_example_runs():
    assert not doctest.testmod(long_conv).failed
    torch.testing.assert_close(squash(**example()), squash_reference(**example()))


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    for arguments, message in (
        (dict(l_max=0), "taps: expected"),
        (dict(lam=-1.0), "lam: expected at least 0"),
        (dict(width=4), "width: expected an odd number"),
        (dict(width=0), "width: expected a whole number"),
        (dict(kernel_dropout=1.0), "kernel_dropout: expected"),
        (dict(start=lambda c, n: torch.ones(n, c)), r"start: expected a kernel of shape \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LongConv(**(dict(channels=2, l_max=8) | arguments))
    with pytest.raises(ValueError, match="lam: expected at least 0"):
        squash(taps(3), -0.1)
