"""Cauchy sums against the complex formula, values and gradients."""

import pytest
import torch

from corelib.state_space import cauchy
from corelib.state_space.cauchy import cauchy_sums, cauchy_sums_reference

EXACT = dict(atol=1e-10, rtol=1e-10)


def inputs(M=3, C=5, P=4, L=11, dtype=torch.complex128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(M, C, P, generator=generator, dtype=torch.complex128)
    decay = -0.1 - torch.rand(C, P, generator=generator, dtype=torch.float64)
    turn = 3 * torch.randn(C, P, generator=generator, dtype=torch.float64)
    angles = torch.pi * torch.arange(L // 2 + 1, dtype=torch.float64) / L
    real = dtype.to_real()
    sine, cosine = angles.sin().to(real), angles.cos().to(real)
    return weights.to(dtype), torch.complex(decay, turn).to(dtype), sine, cosine


@pytest.mark.parametrize("sizes", [{}, dict(M=1, C=1, P=1, L=1), dict(M=4, C=2, P=7, L=64)])
def test_values_and_gradients(sizes):
    weights, poles, sine, cosine = inputs(**sizes)
    leaves = [weights.requires_grad_(), poles.requires_grad_()]
    got, wanted = (f(*leaves, sine, cosine) for f in (cauchy_sums, cauchy_sums_reference))
    torch.testing.assert_close(got, wanted, **EXACT)
    seed = torch.randn_like(wanted)
    for x, y in zip(
        torch.autograd.grad(got, leaves, seed), torch.autograd.grad(wanted, leaves, seed)
    ):
        torch.testing.assert_close(x, y, **EXACT)


def test_is_the_sum_over_both_of_each_pair():
    """Against numpy, pole by pole, where the cosine is not 0: w / (z - pole) / cosine."""
    weights, poles, sine, cosine = inputs(M=1, C=1, P=3, L=9)
    z = 1j * sine / cosine
    both = torch.cat([poles[0], poles[0].conj()])
    over = torch.cat([weights[0, 0], weights[0, 0].conj()])
    wanted = (over[:, None] / (z - both[:, None])).sum(0) / cosine
    torch.testing.assert_close(cauchy_sums(weights, poles, sine, cosine)[0, 0], wanted, **EXACT)


def test_finite_at_the_highest_frequency():
    """Its cosine is 0: every pole answers alike."""
    weights, poles, _, _ = inputs()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    got = cauchy_sums(weights, poles, one, zero)[..., 0]
    torch.testing.assert_close(got, 2 * weights.real.sum(-1) / 1j, **EXACT)


@pytest.mark.parametrize("cached", [1, 50, 10**9])
def test_any_stretch_of_channels(cached, monkeypatch):
    monkeypatch.setattr(cauchy, "CACHED", cached)
    test_values_and_gradients({})


def test_float32_near_the_axis():
    """Poles of HiPPO's shape, sharp against the frequencies: as good as their rounding."""
    from corelib.state_space.shared import dplr_legs

    poles = 0.01 * dplr_legs(64).poles[None].to(torch.complex64)
    weights, _, sine, cosine = inputs(M=2, C=1, P=32, L=501, dtype=torch.complex64)
    wide = (
        x.to(torch.promote_types(x.dtype, torch.float64)) for x in (weights, poles, sine, cosine)
    )
    wanted = cauchy_sums_reference(*wide)
    got = cauchy_sums(weights, poles, sine, cosine).to(torch.complex128)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_no_channels_and_no_frequencies():
    weights, poles, sine, cosine = inputs()
    assert cauchy_sums(weights[:, :0], poles[:0], sine, cosine).shape == (3, 0, 6)
    assert cauchy_sums(weights, poles, sine[:0], cosine[:0]).shape == (3, 5, 0)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights", lambda x: x[0], "weights: expected 3 axes in complex64 or complex128"),
        ("weights", lambda x: x[:, :2], r"weights: expected channels and poles \(5, 4\)"),
        ("poles", lambda x: x.real, "poles: expected 2 axes in complex64 or complex128"),
        ("poles", lambda x: x.to(torch.complex64), "poles: expected 2 axes"),
        ("sine", lambda x: x.float(), "sine: expected one axis in torch.float64"),
        ("cosine", lambda x: x[:2], "cosine: expected one axis .* as long as the other"),
        ("cosine", lambda x: x.to("meta"), "expected one device"),
    ],
)
def test_bad_input_is_named(name, change, message):
    given = dict(zip(("weights", "poles", "sine", "cosine"), inputs()))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        cauchy_sums(**given)
