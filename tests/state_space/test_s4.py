"""S4: convolution, recurrence and the paper's formula are one thing."""

import doctest

import pytest
import torch

from corelib.primitives import bilinear, fft_conv
from corelib.state_space import s4
from corelib.state_space.dplr import dense_form, discrete_form, output_row, to_real
from corelib.state_space.s4 import (
    S4,
    S4Block,
    TwoSidedS4,
    example,
    s4_kernel,
    s4_kernel_reference,
    s4_reference,
    to_tilde,
)
from corelib.state_space.shared import Dplr, dplr_legs, hippo_legs
from corelib.testing import conformance

EXACT = dict(atol=1e-10, rtol=1e-10)
LEAK = 1e-12  # the FFT's rounding reaches every position


def random_system(channels=2, N=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    system = Dplr(*(x.expand(channels, -1).clone() for x in dplr_legs(N)))
    C = torch.randn(channels, N // 2, generator=generator, dtype=torch.complex128)
    step = 10 ** (-2 * torch.rand(channels, generator=generator, dtype=torch.float64))
    return system, C, step


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_doctest():
    failures, tests = doctest.testmod(s4)
    assert tests and not failures


@pytest.mark.parametrize("L", [1, 2, 5, 63, 64])
def test_kernel_equals_powers(L):
    """The must-hold: K[t] = C A_bar^t B_bar to rounding, at even and odd lengths."""
    system, C, step = random_system()
    got = s4_kernel(system, to_tilde(system, C, step, L), step, L)
    torch.testing.assert_close(got, s4_kernel_reference(system, C, step, L), atol=2e-14, rtol=1e-12)


@pytest.mark.parametrize("L", [9, 10])
def test_kernel_equals_the_papers_formula(L):
    """Algorithm 1 in complex128, with every pole and its conjugate, at z = exp(-2 pi i k / L)."""
    system, C, step = random_system(channels=1)
    tilde = to_tilde(system, C, step, L)
    poles, p, B, C_ = (torch.cat([x, x.conj()], -1)[0] for x in (*system, tilde))
    z = torch.exp(-2j * torch.pi * torch.arange(L, dtype=torch.float64) / L)[:, None]
    r = 2 / (2 / step * (1 - z) - poles * (1 + z))
    rank_one = (C_ * p * r).sum(-1) * (p.conj() * B * r).sum(-1) * (1 + z[:, 0]) / 2
    loop = 1 + (1 + z[:, 0]) / 2 * (p.abs().square() * r).sum(-1)
    spectrum = (C_ * B * r).sum(-1) - rank_one / loop
    taps = torch.fft.ifft(spectrum)
    assert taps.imag.abs().max() < 1e-12
    torch.testing.assert_close(s4_kernel(system, tilde, step, L)[0], taps.real, **EXACT)


def test_kernel_equals_scipy():
    """Independent throughout: HiPPO in its own basis, discretised and run by scipy."""
    signal = pytest.importorskip("scipy.signal")
    N, L, step = 8, 40, 0.1
    A, B = hippo_legs(N)
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(1, N, generator=generator, dtype=torch.float64)
    dense = A.numpy(), B[:, None].numpy(), row.numpy(), torch.zeros(1, 1).numpy()
    A_bar, B_bar, *_ = signal.cont2discrete(dense, step, "bilinear")
    # scipy's states are one step behind: its y[t] = C x[t] + D u[t] with x[t + 1] = A_bar x[t] + …
    behind = A_bar, B_bar, row.numpy() @ A_bar, row.numpy() @ B_bar
    numerator, denominator = signal.ss2tf(*behind)
    impulse = torch.eye(1, L, dtype=torch.float64)[0].numpy()
    wanted = torch.from_numpy(signal.lfilter(numerator[0], denominator, impulse))
    system = dplr_legs(N)
    change = basis_change(N)
    C = (row.to(change.dtype) @ change)[:, : N // 2]
    system = Dplr(*(x[None] for x in system))
    steps = torch.tensor([step], dtype=torch.float64)
    got = s4_kernel(system, to_tilde(system, C, steps, L), steps, L)[0]
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


def basis_change(N):
    """The V of ``A = V (diag(poles) - p p*) V*``: by powers of A on B, which fix the basis."""
    A, B = hippo_legs(N)
    system = dplr_legs(N)
    poles, p, b = (torch.cat([x, x.conj()]) for x in system)
    small = torch.diag(poles) - torch.outer(p, p.conj())
    left, right = [B.to(torch.complex128)], [b]
    for _ in range(N - 1):
        left.append(A.to(torch.complex128) @ left[-1] / N)
        right.append(small @ right[-1] / N)
    return torch.linalg.solve(torch.stack(right).T, torch.stack(left).T, left=False)


@pytest.mark.parametrize("L", [1, 6, 33])
def test_convolution_equals_recurrence(L):
    system, C, step = random_system()
    u = rand(3, 2, L)
    kernel = s4_kernel(system, to_tilde(system, C, step, L), step, L)
    torch.testing.assert_close(fft_conv(u, kernel), s4_reference(u, system, C, step)[0], **EXACT)


def test_gradients_equal_those_of_the_powers():
    """Every parameter, through C_tilde as well."""
    system, C, step = random_system(N=4)
    leaves = [x.clone().requires_grad_() for x in (*system, C, step)]

    def kernels(poles, p, B, C, step):
        there = Dplr(poles, p, B)
        fast = s4_kernel(there, to_tilde(there, C, step, 12), step, 12)
        return fast, s4_kernel_reference(there, C, step, 12)

    seed = rand(2, 12)
    fast, slow = (torch.autograd.grad(k, leaves, seed, retain_graph=True) for k in kernels(*leaves))
    for x, y in zip(fast, slow):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_conformance(length):
    """Shorter, as long as and longer than what the layer was made for."""
    torch.manual_seed(0)
    conformance(S4(3, 8, length).double(), rand(2, 16, 3), tolerance=1e-7, leak=LEAK)


def test_conformance_of_the_block():
    torch.manual_seed(0)
    conformance(S4Block(4, 8, 12).double(), rand(2, 9, 4), tolerance=1e-7, leak=LEAK)


def test_layer_equals_the_reference():
    torch.manual_seed(0)
    layer, x = S4(3, 8, 20).double(), rand(2, 13, 3)
    y, state = layer(x)
    form = layer.step_form()
    wanted, last = s4_reference(x.mT, layer.system(), form.C, layer.log_step.exp())
    torch.testing.assert_close(y, wanted.mT + layer.skip * x, **EXACT)
    torch.testing.assert_close(state.x, last, **EXACT)
    y, state = layer(x, state)
    wanted, last = s4_reference(x.mT, layer.system(), form.C, layer.log_step.exp(), last)
    torch.testing.assert_close(y, wanted.mT + layer.skip * x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(state.x, last, **EXACT)


def test_first_system_is_hippo_and_c_is_what_was_drawn():
    torch.manual_seed(0)
    layer = S4(200, 8, 64, step_min=1e-2, step_max=1e-1).double()
    for got, want in zip(layer.system(), dplr_legs(8)):
        torch.testing.assert_close(got, want.expand(200, -1), atol=1e-6, rtol=1e-6)
    steps = layer.log_step.exp()
    assert 1e-2 <= steps.min() < 1.2e-2 and 0.08 < steps.max() <= 1e-1
    drawn = layer.step_form().C  # standard complex normal
    assert 0.9 < drawn.abs().square().mean() < 1.1 and drawn.mean().abs() < 0.1


def test_no_parameter_can_make_it_unstable():
    torch.manual_seed(0)
    layer = S4(4, 8, 16).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(3 * torch.randn_like(parameter))
    A, _ = dense_form(layer.system())
    assert torch.linalg.eigvals(A).real.max() < 0
    assert (
        torch.linalg.matrix_norm(discrete_form(layer.system(), layer.log_step.exp())[0], 2).max()
        < 1
    )


def test_float32_keeps_the_kernel():
    torch.manual_seed(0)
    layer = S4(8, 64, 256)
    small = layer.kernel(256)
    wide = layer.double().kernel(256)
    torch.testing.assert_close(small.double(), wide, atol=1e-5, rtol=1e-4)


def test_two_sides():
    torch.manual_seed(0)
    layer, x = TwoSidedS4(3, 8, 16).double(), rand(2, 11, 3)
    past, future = layer.past.kernel(11), layer.future.kernel(11)
    wanted = layer.past.skip * x
    for t in range(11):
        for s in range(11):
            tap = past[:, t - s] if s <= t else future[:, s - t - 1]
            wanted[:, t] = wanted[:, t] + tap * x[:, s]
    torch.testing.assert_close(layer(x), wanted, **EXACT)
    grads = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert len(grads) == 13 and all(g.abs().sum() > 0 for g in grads)


def test_state_is_made_only_when_asked_for(monkeypatch):
    torch.manual_seed(0)
    made = []
    monkeypatch.setattr(s4, "final_state", lambda *a: made.append(1) or torch.zeros(1, 2, 4))
    _, state = S4(2, 4, 8)(torch.zeros(1, 5, 2))
    assert not made
    state.x, state.x  # noqa: B018
    assert made == [1]


def test_example_by_hand():
    """x[0] of the first channel, from the dense matrices: an impulse answers with C B_bar."""
    e = example()
    y, _ = s4_reference(**e)
    A_bar, B_bar = discrete_form(e["system"], e["step"])
    A, B = dense_form(e["system"])
    step = 0.1
    eye = torch.eye(4, dtype=torch.float64)
    B_hand = torch.linalg.solve(eye - step / 2 * A[0], step * B[0])
    torch.testing.assert_close(B_bar[0], B_hand, **EXACT)
    torch.testing.assert_close(y[0, 0, 0], output_row(e["C"])[0] @ B_hand, **EXACT)
    torch.testing.assert_close(bilinear(A, B[..., None], e["step"])[0], A_bar, **EXACT)
    assert to_real(e["C"]).shape == (2, 4)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: S4(0), ValueError, "channels: expected at least 1, got 0"),
        (lambda: S4(2, 4, 0), ValueError, "length: expected at least 1, got 0"),
        (lambda: S4(2, 5), ValueError, "N: expected an even size"),
        (
            lambda: S4(2, 4, 8, step_min=0.2),
            ValueError,
            "step_min, step_max: expected 0 < step_min",
        ),
        (lambda: S4(2, 4, 8)(torch.zeros(1, 5, 3)), ValueError, r"x: expected \(B, L, 2\)"),
        (lambda: S4(2, 4, 8)(torch.zeros(1, 5, 2).double()), TypeError, "x: expected the layer's"),
        (
            lambda: S4(2, 4, 8).step(torch.zeros(1, 5, 2), None),
            ValueError,
            r"x: expected \(B, 2\), got shape \(1, 5, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
