"""Vandermonde sums against the complex formula, values and gradients."""

import pytest
import torch

from corelib.state_space.vandermonde import (
    vandermonde_moments,
    vandermonde_sums,
    vandermonde_sums_reference,
)

EXACT = dict(atol=1e-11, rtol=1e-11)


def inputs(C=3, P=4, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(C, P, generator=generator, dtype=torch.complex128)
    decay = -0.1 * torch.rand(C, P, generator=generator, dtype=torch.float64)
    turn = 2 * torch.randn(C, P, generator=generator, dtype=torch.float64)
    return weights.to(dtype), torch.complex(decay, turn).to(dtype)


@pytest.mark.parametrize("L", [1, 2, 7, 63, 64, 100])
def test_values_and_gradients(L):
    leaves = [x.requires_grad_() for x in inputs()]
    got, wanted = (f(*leaves, L) for f in (vandermonde_sums, vandermonde_sums_reference))
    torch.testing.assert_close(got, wanted, **EXACT)
    seed = torch.randn(3, L, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for x, y in zip(
        torch.autograd.grad(got, leaves, seed), torch.autograd.grad(wanted, leaves, seed)
    ):
        torch.testing.assert_close(x, y, **EXACT)


def test_is_numpys_vandermonde_matrix():
    """Independent: ``numpy.vander`` of both poles of every pair."""
    numpy = pytest.importorskip("numpy")
    weights, rates = inputs(C=1)
    both = torch.cat([rates[0], rates[0].conj()]).numpy()
    over = torch.cat([weights[0], weights[0].conj()]).numpy()
    wanted = over @ numpy.vander(numpy.exp(both), 20, increasing=True)
    got = vandermonde_sums(weights, rates, 20)[0]
    torch.testing.assert_close(got, torch.from_numpy(wanted.real), **EXACT)


def test_float32_keeps_its_digits_at_large_angles():
    """Thousands of radians in: as good as float32, where the formula in complex64 is not."""
    weights, rates = inputs(dtype=torch.complex64)
    wide = [x.to(torch.complex128) for x in (weights, rates)]
    wanted = vandermonde_sums_reference(*wide, 4000).float()
    scale = wanted.abs().max()
    assert (vandermonde_sums(weights, rates, 4000) - wanted).abs().max() < 2e-6 * scale
    assert (vandermonde_sums_reference(weights, rates, 4000) - wanted).abs().max() > 2e-6 * scale


@pytest.mark.parametrize("L", [1, 5, 33])
def test_moments_are_the_transpose(L):
    _, rates = inputs()
    values = torch.randn(2, 3, L, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rates.requires_grad_(), values.requires_grad_()
    got = vandermonde_moments(values, rates)
    powers = torch.exp(rates[..., None] * torch.arange(L))
    wanted = torch.einsum("bcl,cpl->bcp", values.to(rates.dtype), powers)
    torch.testing.assert_close(got, wanted, **EXACT)
    seed = torch.randn_like(wanted)
    for x, y in zip(
        torch.autograd.grad(got, (values, rates), seed),
        torch.autograd.grad(wanted, (values, rates), seed),
    ):
        torch.testing.assert_close(x, y, **EXACT)


def test_nothing_to_do():
    weights, rates = inputs()
    assert vandermonde_sums(weights, rates, 0).shape == (3, 0)
    assert vandermonde_sums(weights[:0], rates[:0], 5).shape == (0, 5)
    assert not vandermonde_sums(weights[:, :0], rates[:, :0], 5).any()
    nothing = vandermonde_moments(torch.zeros(2, 3, 0, dtype=torch.float64), rates)
    assert nothing.shape == (2, 3, 4) and not nothing.any()


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, r, L: (w[0], r, L), ValueError, r"weights: expected \(C, P\)"),
        (lambda w, r, L: (w, r.real, L), ValueError, "rates: expected .*complex64"),
        (lambda w, r, L: (w, r[:, :2], L), ValueError, "rates: expected the shape"),
        (lambda w, r, L: (w, r.to(torch.complex64), L), ValueError, "rates: expected .* dtype"),
        (lambda w, r, L: (w, r.to("meta"), L), ValueError, "rates: expected the device"),
        (lambda w, r, L: (w, r, 2.0), TypeError, "L: expected an int, got float"),
        (lambda w, r, L: (w, r, -1), ValueError, "L: expected at least 0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        vandermonde_sums(*change(*inputs(), 5))


@pytest.mark.no_shape_checks
def test_moments_name_bad_values():
    with pytest.raises(ValueError, match=r"values: expected \(B, 3, L\) in torch.float64"):
        vandermonde_moments(torch.zeros(2, 3, 5), inputs()[1])
