"""Discrete diagonal-plus-rank-one systems: dense form, stretches and single steps agree."""

import pytest
import torch

from corelib.primitives import bilinear
from corelib.state_space.dplr import (
    dense_form,
    discrete_form,
    double_tilde,
    dplr_step,
    final_state,
    free_outputs,
    from_tilde,
    krylov,
    output_row,
    step_form,
    to_pairs,
    to_real,
    to_tilde,
)
from corelib.state_space.shared import Dplr

EXACT = dict(atol=1e-10, rtol=1e-10)


def random_system(channels=3, pairs=4, seed=0):
    """Not HiPPO: complex p and B, unequal decays."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(channels, pairs, generator=generator, dtype=torch.complex128)

    poles = torch.complex(-draw().real.abs() - 0.1, 4 * draw().real)
    step = 0.02 + 0.5 * torch.rand(channels, generator=generator, dtype=torch.float64)
    return Dplr(poles, draw(), draw()), draw(), step


def full(system, C):
    """Every pole and its conjugate, as complex matrices: the system as the paper writes it."""
    poles, p, B, C = (torch.cat([x, x.conj()], -1) for x in (*system, C))
    return torch.diag_embed(poles) - p[..., :, None] * p[..., None, :].conj(), B, C


def test_dense_form_is_the_full_complex_system():
    system, C, step = random_system()
    A, B, C_full = full(system, C)
    A_bar, B_bar = bilinear(A, B[..., None], step)
    dense, entering = discrete_form(system, step)
    wanted, got = B_bar[..., 0], entering
    for _ in range(5):
        one = (C_full * wanted).sum(-1)
        assert one.imag.abs().max() < 1e-10
        torch.testing.assert_close((output_row(C) * got).sum(-1), one.real, **EXACT)
        wanted, got = (A_bar @ wanted[..., None])[..., 0], (dense @ got[..., None])[..., 0]


def test_never_grows():
    """The symmetric part is negative, so that the bilinear rule contracts, whatever p is."""
    for seed in range(20):
        system, _, step = random_system(seed=seed)
        A, _ = dense_form(system)
        assert torch.linalg.eigvalsh(A + A.mT).max() < 0
        assert torch.linalg.matrix_norm(discrete_form(system, step)[0], 2).max() < 1


def test_real_and_pairs_are_inverse():
    _, C, _ = random_system()
    assert torch.equal(to_pairs(to_real(C)), C)
    x = C.flip(-1)
    torch.testing.assert_close((output_row(C) * to_real(x)).sum(-1), 2 * (C * x).sum(-1).real)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_krylov(count):
    system, _, step = random_system()
    A, b = discrete_form(system, step)
    wanted = [b]
    for _ in range(count - 1):
        wanted.append((A @ wanted[-1][..., None])[..., 0])
    torch.testing.assert_close(krylov(A, b, count), torch.stack(wanted, -1), **EXACT)


@pytest.mark.parametrize("L", [0, 1, 3, 16, 37])
def test_stretches_equal_steps(L):
    system, C, step = random_system()
    generator = torch.Generator().manual_seed(L)
    u = torch.randn(2, 3, L, generator=generator, dtype=torch.float64)
    start = torch.randn(2, 3, 4, generator=generator, dtype=torch.complex128)
    A_bar, B_bar = discrete_form(system, step)
    form = step_form(system, C, step)
    x = y_x = start
    free = []
    for t in range(L):
        x, _ = dplr_step(form, x, u[..., t])
        y_x, y = dplr_step(form, y_x, torch.zeros_like(u[..., t]))
        free.append(y)
    torch.testing.assert_close(final_state(A_bar, B_bar, u, to_real(start)), to_real(x), **EXACT)
    got = free_outputs(A_bar, output_row(C), to_real(start), L)
    assert got.shape == (2, 3, L)
    if L:
        torch.testing.assert_close(got, torch.stack(free, -1), **EXACT)
    nothing = final_state(A_bar, B_bar, u)
    shifted = final_state(A_bar, B_bar, 0 * u, to_real(start))
    torch.testing.assert_close(nothing + shifted, to_real(x), **EXACT)


def test_a_step_equals_the_dense_step():
    system, C, step = random_system()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.complex128)
    u = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    A_bar, B_bar = discrete_form(system, step)
    got, y = dplr_step(step_form(system, C, step), x, u)
    wanted = torch.einsum("cnm,bcm->bcn", A_bar, to_real(x)) + B_bar * u[..., None]
    torch.testing.assert_close(to_real(got), wanted, **EXACT)
    torch.testing.assert_close(y, (output_row(C) * wanted).sum(-1), **EXACT)


@pytest.mark.parametrize("L", [1, 7, 64])
def test_tilde(L):
    system, C, step = random_system()
    A_bar, _ = discrete_form(system, step)
    tilde = to_tilde(system, C, step, L)
    power = torch.linalg.matrix_power(A_bar, L)
    row = output_row(C)
    torch.testing.assert_close(output_row(tilde), row - torch.einsum("cn,cnm->cm", row, power))
    torch.testing.assert_close(from_tilde(system, tilde, step, L), C, **EXACT)
    doubled = double_tilde(system, tilde, step, L)
    torch.testing.assert_close(doubled, to_tilde(system, C, step, 2 * L), **EXACT)
