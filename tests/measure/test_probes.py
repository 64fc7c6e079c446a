"""Probes against layers whose answers are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from corelib.measure import probes
from corelib.primitives import fft_conv
from corelib.state_space.ptd import transfer_function
from corelib.state_space.shared import hippo_legs
from corelib.testing import causality_probe

EXACT = dict(atol=1e-10, rtol=1e-10)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_decay(M, a):
    """``y_t = sum_(s <= t) a^(t - s) M x_s``: every probe has a formula."""

    def fn(x):
        h, out = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            h = a * h + x_t @ M.T
            out.append(h)
        return torch.stack(out, 1)

    return fn


def gated(x):
    """``y_t = x_t (x_t + x_(t-1))``: the same rule everywhere, silent in silence, not linear."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return x * (x + before)


# --- influence ------------------------------------------------------------------------------------


def test_influence_is_the_frobenius_norm_of_each_block():
    M, a, L = rand(3, 3), 0.7, 6
    found = probes.influence(matrix_decay(M, a), rand(2, L, 3, seed=1))
    lag = torch.arange(L)[:, None] - torch.arange(L)
    wanted = torch.where(lag >= 0, a ** lag.double(), 0.0) * M.norm()
    torch.testing.assert_close(found, wanted, **EXACT)
    assert probes.future_share(found) == 0


def test_influence_averages_squares_over_the_batch():
    x = rand(2, 5, 1)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    found = probes.influence(gated, x)
    wanted = (2 * x + before)[..., 0].square().mean(0).sqrt()
    torch.testing.assert_close(found.diag(), wanted, **EXACT)


def test_influence_sees_the_future_where_the_causality_probe_does():
    def leaks(x):
        return x + 1e-3 * x.flip(1)

    x = rand(1, 6, 2)
    found = probes.influence(leaks, x)
    assert torch.equal(found > 0, causality_probe(leaks, x) > 0)
    assert probes.future_share(found) == pytest.approx(1e-3, rel=1e-2)
    assert probes.future_share(torch.zeros(3, 3)) == 0


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 1), (0.75, 1), (0.76, 2), (0.94, 3)])
def test_receptive_field_of_a_decay(share, wanted):
    """Squares of 1, 1/2, 1/4 …: shares 3/4, 15/16, … of 4/3."""
    influences = 0.5 ** torch.arange(12.0, dtype=torch.float64).flip(0)[None]
    assert probes.effective_receptive_field(influences, share) == wanted
    assert probes.effective_receptive_field(influences, 1.0) == 12


# --- impulses -------------------------------------------------------------------------------------


def test_the_response_of_a_linear_layer_is_its_kernel():
    M, a, x = rand(3, 3), 0.7, rand(1, 8, 3, seed=1)
    found = probes.impulse_response(matrix_decay(M, a), x, at=2, size=0.3)
    wanted = a ** torch.arange(6.0, dtype=torch.float64)[:, None, None] * M
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.99])
def test_halflife_of_a_decay_is_exact(decay):
    response = 3 * decay ** torch.arange(400.0, dtype=torch.float64)
    assert probes.memory_halflife(response) == pytest.approx(-math.log(2) / math.log(decay))


def test_halflife_counts_the_envelope_and_says_when_it_never_comes():
    rings = torch.tensor([1.0, 0.1, 0.9, 0.2, 0.4, 0.0])
    assert 2 < probes.memory_halflife(rings) < 4  # falls below 1/2 for good after lag 2
    assert probes.memory_halflife(torch.ones(9)) == math.inf
    assert probes.memory_halflife(torch.zeros(9)) == math.inf
    assert probes.memory_halflife(torch.tensor([1.0, 1.0, 0.0])) == 2.0


def test_frequency_response_is_the_transfer_function():
    """HiPPO by the bilinear rule: ``2 / (1 + 1/z) G(s)``, ``s = 2 / step (z - 1) / (z + 1)``."""
    from corelib.primitives import bilinear

    step, (A, B), C = 0.5, hippo_legs(6), rand(6)
    A_bar, B_bar = bilinear(A, B[:, None], step)
    x, taps = B_bar[:, 0], []
    for _ in range(400):
        taps.append(C @ x)
        x = A_bar @ x
    omega = torch.tensor([0.1, 0.7, 2.0, 3.0], dtype=torch.float64)
    found = probes.frequency_response(torch.stack(taps), omega)
    z = torch.exp(1j * omega)
    wanted = transfer_function(A, B, C, 2 / step * (z - 1) / (z + 1)) * 2 / (1 + 1 / z)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    both = probes.frequency_response(torch.stack(taps)[:, None, None].repeat(1, 2, 3), omega)
    torch.testing.assert_close(both[:, 1, 2], found)


def test_variation_and_shift_are_two_things():
    x = rand(1, 12, 2)
    kernel = rand(2, 12)

    def conv(x):
        return fft_conv(x.mT.contiguous(), kernel[:, : x.shape[1]]).mT

    def positional(x):
        return x * torch.arange(1, x.shape[1] + 1)[:, None]

    assert probes.variation(conv, x, 3) < 1e-12 and probes.shift_gap(conv, x, 3) < 1e-12
    assert probes.variation(gated, x, 3) > 0.1  # not linear …
    assert probes.shift_gap(gated, x, 3) == 0  # … yet a delayed input gives a delayed output
    assert probes.variation(positional, x, 3) == pytest.approx(3)  # four times the first
    assert probes.shift_gap(positional, x, 3) > 0.1


# --- states ---------------------------------------------------------------------------------------


def test_bytes_of_nested_states():
    state = (torch.zeros(3), [torch.zeros(2, dtype=torch.complex128), None], {"n": 7})
    assert probes.state_bytes(state) == 12 + 32


class Turning(torch.nn.Module):
    """A complex state and a register of one input."""

    def step(self, x_t, state):
        h, last = state
        h = 0.9j * h + last.sum() * (1 + 2j) + x_t.sum()
        return x_t, (h, x_t)


def test_the_jacobian_of_a_complex_state():
    state = (torch.zeros(1, 1, dtype=torch.complex128), torch.zeros(1, 2, dtype=torch.float64))
    found = probes.state_jacobian(Turning(), rand(1, 2), state)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    wanted[0, 1], wanted[1, 0] = -0.9, 0.9  # real and imaginary part turn into each other
    wanted[0, 2:], wanted[1, 2:] = 1, 2
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_growing_state_has_no_jacobian():
    class Cache:
        def step(self, x_t, state):
            return x_t, torch.cat([state, x_t])

    assert probes.state_jacobian(Cache(), rand(1, 2), rand(3, 2)) is None


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: probes.influence(gated, x[0]), r"x: expected \(B, L, C\)"),
        (lambda x: probes.influence(lambda x: x[:, 0], x), r"fn: expected a result \(B, L, C\)"),
        (lambda x: probes.impulse_response(gated, x), "x: expected one background"),
        (lambda x: probes.impulse_response(gated, x[:1], at=9), "at: expected a position, 0 to 4"),
        (lambda x: probes.variation(gated, x[:1], 5), "shift: expected 1 to 4, got 5"),
        (lambda x: probes.shift_gap(gated, x, 0), "shift: expected 1 to 4, got 0"),
        (lambda x: probes.effective_receptive_field(x[0], 0), "share: expected more than 0"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run(rand(2, 5, 3))
