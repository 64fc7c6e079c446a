"""The tied system is stable whatever its parameters; the untied one is not."""

import pytest
import torch

from corelib.state_space.dplr import dense_form, to_pairs, to_real
from corelib.state_space.hurwitz import (
    UntiedS4,
    abscissas,
    spectral_abscissa,
    untie,
    untied_matrix,
)
from corelib.state_space.s4 import S4, S4Block
from corelib.state_space.shared import Dplr
from corelib.testing import conformance

pytestmark = pytest.mark.method("sashimi")
EXACT = dict(atol=1e-10, rtol=1e-10)


def draws(count, P=4, seed=0):
    """Random systems with poles left of the axis, and a q for each."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(count, P, generator=generator, dtype=torch.complex128)

    poles = torch.complex(-normal().real.exp(), 3 * normal().real)
    return Dplr(poles, 3 * normal(), normal()), 3 * normal()


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def disturbed(length=16, size=0.02):
    """An untied layer whose p and q have gone their own ways, a little."""
    torch.manual_seed(0)
    layer = UntiedS4(3, 8, length, step_min=0.05, step_max=0.2).double()
    with torch.no_grad():
        layer.q.add_(size * torch.randn_like(layer.q))
        layer.p.add_(size * torch.randn_like(layer.p))
    return layer


def test_tied_is_hurwitz_untied_is_not():
    """The must-hold, on 2,000 draws."""
    system, q = draws(2000)
    tied = spectral_abscissa(dense_form(system)[0])
    untied = spectral_abscissa(untied_matrix(system, q))
    assert tied.max() < 0
    assert untied.max() > 10 and (untied > 0).double().mean() > 0.3


def test_tied_is_hurwitz_for_complex_matrices_too():
    """The paper's statement, without conjugate pairs: its Hermitian part is the reason."""
    system, q = draws(500, seed=1)
    diagonal = torch.diag_embed(system.poles)
    tied = diagonal - system.p[:, :, None] * system.p.conj()[:, None]
    assert torch.linalg.eigvals(tied).real.max() < 0
    assert torch.linalg.eigvalsh((tied + tied.mH) / 2).max() < 0
    untied = diagonal - system.p[:, :, None] * q.conj()[:, None]
    assert torch.linalg.eigvals(untied).real.max() > 0


def test_untied_matrix_has_every_pole_and_its_conjugate():
    system, q = draws(3)
    p_both, q_both = (torch.cat([x, x.conj()], -1) for x in (system.p, q))
    both = torch.diag_embed(torch.cat([system.poles, system.poles.conj()], -1))
    wanted = both - p_both[:, :, None] * q_both.conj()[:, None]
    x = to_pairs(rand(3, 8))
    got = (untied_matrix(system, q) @ to_real(x)[..., None])[..., 0]
    by_pairs = (wanted @ torch.cat([x, x.conj()], -1)[..., None])[..., 0]
    torch.testing.assert_close(to_pairs(got), by_pairs[:, :4], **EXACT)
    tied, _ = dense_form(system)
    torch.testing.assert_close(untied_matrix(system, system.p), tied, **EXACT)


def test_starts_as_the_tied_layer():
    torch.manual_seed(0)
    tied, x = S4(3, 8, 16).double(), rand(2, 16, 3)
    untied = UntiedS4.from_tied(tied)
    torch.testing.assert_close(untied(x)[0], tied(x)[0], **EXACT)
    state, other = tied.init_state(2), untied.init_state(2)
    for got, want in zip(other.form, state.form):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("length", [5, 16])
def test_conformance(length):
    """As long as it is stable, or not long enough to notice: one thing in every form."""
    conformance(disturbed(length), rand(2, 12, 3), tolerance=1e-6, leak=1e-10)


def test_kernel_equals_powers():
    layer = disturbed()
    A_bar, B_bar = layer.discrete()
    row = 2 * to_real(layer._true_row().conj())
    x, taps = B_bar, []
    for _ in range(20):
        taps.append((row * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    wanted = torch.stack(taps, -1)
    torch.testing.assert_close(layer.kernel(16), wanted[:, :16], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer.kernel(20), wanted, atol=1e-9, rtol=1e-9)


def test_convolution_does_not_notice_and_steps_explode():
    layer = disturbed(length=64, size=1.0)
    assert abscissas(layer).max() > 0.5
    with torch.no_grad():
        assert layer(rand(1, 64, 3))[0].abs().max() < 1e3
        state = layer.init_state(1)
        for _ in range(600):
            y, state = layer.step(torch.ones(1, 3, dtype=torch.float64), state)
    assert not y.abs().max() < 1e6  # infinite or NaN count as well


def test_untie_a_model():
    torch.manual_seed(0)
    block, x = S4Block(3, 8, 12).double(), rand(2, 12, 3)
    before = block(x)[0]
    assert untie(block) is block and type(block.mixer) is UntiedS4
    torch.testing.assert_close(block(x)[0], before, **EXACT)
    assert abscissas(block).shape == (3,) and abscissas(block).max() < 0
    names = [name for name, _ in block.named_parameters()]
    assert "mixer.q" in names and "q" in block.mixer.SYSTEM
    (block(x)[0].square().sum()).backward()
    assert block.mixer.q.grad.abs().sum() > 0


def test_gradient_of_q():
    layer = disturbed()
    x, weight = rand(1, 10, 3), rand(1, 10, 3)

    def loss(q):
        call = torch.func.functional_call(layer, {"q": q}, (x,))
        return (call[0] * weight).sum()

    assert torch.autograd.gradcheck(loss, (layer.q.detach().clone().requires_grad_(),))
