"""Discretisation rules against scipy, and the diagonal forms against the dense ones."""

import pytest
import torch

from corelib.primitives import (
    bilinear,
    bilinear_diagonal,
    zero_order_hold,
    zero_order_hold_diagonal,
)

EXACT = dict(atol=1e-11, rtol=1e-11)
RULES = {
    "bilinear": (bilinear, bilinear_diagonal),
    "zoh": (zero_order_hold, zero_order_hold_diagonal),
}


def system(*batch, N=5, M=2):
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(*batch, N, N, generator=generator, dtype=torch.float64)
    return A - 3 * torch.eye(N), torch.randn(*batch, N, M, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("step", [1e-3, 0.1, 2.0])
def test_equals_scipy(method, step):
    signal = pytest.importorskip("scipy.signal")
    A, B = system()
    C, D = torch.zeros(1, 5), torch.zeros(1, 2)
    wanted = signal.cont2discrete((A.numpy(), B.numpy(), C.numpy(), D.numpy()), step, method)
    for got, want in zip(RULES[method][0](A, B, step), wanted):
        torch.testing.assert_close(got, torch.from_numpy(want), **EXACT)


@pytest.mark.parametrize("method", RULES)
def test_a_step_for_each_system(method):
    dense, _ = RULES[method]
    A, B = system(3)
    steps = torch.tensor([0.01, 0.3, 1.0], dtype=torch.float64)
    together = dense(A, B, steps)
    for i, step in enumerate(steps):
        for got, want in zip(together, dense(A[i], B[i], step.item())):
            torch.testing.assert_close(got[i], want, **EXACT)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("step", [0.2, torch.tensor([0.2, 0.7], dtype=torch.float64)])
def test_diagonal_equals_dense(method, step):
    dense, diagonal = RULES[method]
    generator = torch.Generator().manual_seed(0)
    poles = torch.randn(2, 4, generator=generator, dtype=torch.complex128)
    B = torch.randn(2, 4, 3, generator=generator, dtype=torch.complex128)
    for kind in (poles, poles.real):
        decay, gain = diagonal(kind, step)
        inputs = B if kind.is_complex() else B.real
        A_bar, B_bar = dense(torch.diag_embed(kind), inputs, step)
        torch.testing.assert_close(torch.diag_embed(decay), A_bar, **EXACT)
        torch.testing.assert_close(gain[..., None] * inputs, B_bar, **EXACT)


def test_a_pole_at_zero_integrates():
    poles = torch.tensor([0.0, -1e-12, -1.0], dtype=torch.float64, requires_grad=True)
    decay, gain = zero_order_hold_diagonal(poles, 0.5)
    torch.testing.assert_close(gain[:2], torch.full((2,), 0.5, dtype=torch.float64), **EXACT)
    assert decay[0] == 1
    (grad,) = torch.autograd.grad(gain.sum() + decay.sum(), poles)
    assert grad.isfinite().all()


def test_bilinear_keeps_what_is_stable_stable():
    generator = torch.Generator().manual_seed(1)
    poles = torch.complex(
        -torch.rand(200, generator=generator, dtype=torch.float64),
        50 * torch.randn(200, generator=generator, dtype=torch.float64),
    )
    for step in (1e-3, 1.0, 100.0):
        assert (bilinear_diagonal(poles, step)[0].abs() < 1).all()


def test_gradients():
    A, B = system(2, N=3, M=1)
    step = torch.tensor([0.3, 0.6], dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (A, B, step)]
    for dense, diagonal in RULES.values():
        assert torch.autograd.gradcheck(dense, tensors)
        assert torch.autograd.gradcheck(diagonal, (A.diagonal(0, 1, 2), step))


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(A=torch.ones(3, 4)), ValueError, "A: expected square matrices"),
        (dict(B=torch.ones(3)), ValueError, "B: expected the rows of A"),
        (dict(B=torch.ones(3, 1).double()), TypeError, "B: expected the dtype of A"),
        (dict(step="1"), TypeError, "step: expected a number or a tensor, got str"),
        (dict(step=torch.ones(2)), ValueError, r"step: expected one number, or the shape \(\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = dict(A=torch.eye(3), B=torch.ones(3, 1), step=0.1) | change
    for rule in (bilinear, zero_order_hold):
        with pytest.raises(error, match=message):
            rule(**given)
