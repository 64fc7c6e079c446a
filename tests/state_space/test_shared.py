"""HiPPO-LegS and its diagonal-plus-rank-one form."""

import pytest
import torch
from torch import nn

from corelib.state_space.dplr import dense_form
from corelib.state_space.s4 import S4
from corelib.state_space.shared import dplr_legs, hippo_legs, legs_basis, parameter_groups

EXACT = dict(atol=1e-11, rtol=1e-11)


def test_hippo_entries():
    A, B = hippo_legs(4)
    assert A[2, 2] == -3 and A[0, 3] == 0
    torch.testing.assert_close(A[3, 1], torch.tensor(-((7 * 3) ** 0.5), dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("N", [1, 2, 16, 64])
def test_normal_plus_rank_one(N):
    """A + p p^T + I/2 is skew, with p = sqrt(n + 1/2)."""
    A, _ = hippo_legs(N)
    p = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(p, p) + torch.eye(N) / 2
    torch.testing.assert_close(skew, -skew.T, **EXACT)


def test_plain_diagonalisation_is_hopeless():
    A, _ = hippo_legs(16)
    condition = torch.linalg.cond(torch.linalg.eig(A)[1])
    assert 1e10 < condition < 1e12


@pytest.mark.parametrize("N", [2, 8, 32])
def test_the_pairs_are_the_same_system(N):
    """Equal impulse responses, output by output basis: C exp(A t) B for every t."""
    A, B = hippo_legs(N)
    system = dplr_legs(N)
    A_real, B_real = dense_form(system)
    generator = torch.Generator().manual_seed(0)
    for t in (0.0, 0.1, 1.0):
        # moments B^T exp(A t) B do not depend on the basis: V is unitary, pairs count twice
        original = B @ torch.matrix_exp(A * t) @ B
        pairs = 2 * B_real @ torch.matrix_exp(A_real * t) @ B_real
        torch.testing.assert_close(pairs, original, **EXACT)
    start = torch.randn(N, generator=generator, dtype=torch.float64)
    assert torch.linalg.norm(torch.matrix_exp(A_real) @ start) < torch.linalg.norm(start)


def test_the_form_is_canonical():
    system = dplr_legs(16)
    assert (system.poles.imag > 0).all() and (system.poles.imag.diff() > 0).all()
    torch.testing.assert_close(system.poles.real, torch.full((8,), -0.5, dtype=torch.float64))
    assert (system.p.real > 0).all() and system.p.imag.abs().max() < 1e-12
    torch.testing.assert_close(system.B, system.p * 2**0.5, **EXACT)  # LegS: B = sqrt(2) p


def test_basis_is_the_impulse_response():
    """exp(A t) B = exp(-t) legs_basis(t): the state is a projection on this basis."""
    A, B = hippo_legs(6)
    lags = torch.linspace(0, 4, 9, dtype=torch.float64)
    impulse = torch.stack([torch.matrix_exp(A * t) @ B for t in lags])
    torch.testing.assert_close(legs_basis(6, lags) * torch.exp(-lags)[:, None], impulse, **EXACT)
    assert legs_basis(1, lags).shape == (9, 1)


def test_basis_is_orthonormal_under_its_weight():
    lags = torch.linspace(0, 40, 200_001, dtype=torch.float64)
    basis = legs_basis(5, lags) * torch.exp(-lags / 2)[:, None]
    gram = torch.trapezoid(basis[:, :, None] * basis[:, None, :], lags, dim=0)
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64), atol=1e-5, rtol=0)


def test_parameter_groups_spare_the_system():
    model = nn.Sequential(nn.Linear(2, 2), S4(2, 4, 8))
    fast, slow = parameter_groups(model, 1e-2, system_lr=1e-3, weight_decay=0.1)
    assert len(fast["params"]) == 4 and len(slow["params"]) == 5
    assert (fast["lr"], fast["weight_decay"]) == (1e-2, 0.1)
    assert (slow["lr"], slow["weight_decay"]) == (1e-3, 0.0)
    assert any(p is model[1].C_tilde for p in fast["params"])
    torch.optim.AdamW([fast, slow])


@pytest.mark.no_shape_checks
def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="N: expected an even size, whose poles pair up, got 5"):
        dplr_legs(5)
    with pytest.raises(ValueError, match="N: expected at least 1, got 0"):
        hippo_legs(0)
    with pytest.raises(TypeError, match="N: expected an int, got float"):
        legs_basis(2.0, torch.zeros(1))
