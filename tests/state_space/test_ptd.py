"""Perturb, then diagonalise: near HiPPO at every frequency, where S4D is not."""

import doctest
import math

import pytest
import torch

from corelib.state_space import ptd
from corelib.state_space.ptd import (
    condition,
    deviation_bound,
    diagonal_transfer_function,
    diagonalise,
    example,
    first_state_row,
    fourier_attack,
    gaussian,
    optimised,
    ptd_legs,
    ptd_legs_optimised,
    transfer_function,
)
from corelib.state_space.s4d import S4D, s4d_legs
from corelib.state_space.shared import hippo_legs

EXACT = dict(atol=1e-10, rtol=1e-10)


def first(N):
    return torch.eye(N, dtype=torch.float64)[0]


def axis(N):
    """Frequencies up to well past PTD's poles, and finely around S4D's highest one."""
    spike = s4d_legs(N).poles.imag.max()
    low = torch.linspace(0, 2.0 * N, 150, dtype=torch.float64)
    return 1j * torch.cat([low, spike + torch.linspace(-3, 3, 61, dtype=torch.float64)])


def deviation(N, start):
    s = axis(N)
    wanted = transfer_function(*hippo_legs(N), first(N), s)
    return (diagonal_transfer_function(start, first_state_row(start, N), s) - wanted).abs()


def test_doctest():
    failures, tests = doctest.testmod(ptd)
    assert tests and not failures


@pytest.mark.parametrize("N", [1, 2, 5, 6])
def test_same_system_as_the_perturbed_one(N):
    """Against the dense resolvent of A + E, odd sizes and single poles too."""
    A, B = hippo_legs(N)
    A = A + gaussian(A, 0.1)
    s = 1j * torch.linspace(-3, 9, 20, dtype=torch.float64)
    start = diagonalise(A, B)
    for row in (first(N), torch.linspace(-1, 1, N, dtype=torch.float64)):
        got = diagonal_transfer_function(start, row.to(start.basis.dtype) @ start.basis, s)
        torch.testing.assert_close(got, transfer_function(A, B, row, s), **EXACT)


def test_poles_are_numpys():
    numpy = pytest.importorskip("numpy")
    e = example()
    wanted = numpy.linalg.eigvals(e["A"].numpy())
    got = diagonalise(**e).poles
    both = torch.cat([got, got[got.imag > 0].conj()]).numpy()
    assert numpy.allclose(numpy.sort_complex(both), numpy.sort_complex(wanted))


@pytest.mark.parametrize("N", [16, 32])
def test_s4d_leaves_a_spike_at_every_size(N):
    far = deviation(N, s4d_legs(N))
    assert 2 / math.pi < far.max() < 2 / math.pi + 0.003
    spike = s4d_legs(N).poles.imag.max()
    assert (axis(N)[far.argmax()].imag - spike).abs() < 0.2


def test_s4d_is_near_where_the_spike_is_not():
    """Weak convergence: at any one frequency the deviation dies out with N."""
    s = 1j * torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)

    def worst(N):
        start = s4d_legs(N)
        wanted = transfer_function(*hippo_legs(N), first(N), s)
        return (
            (diagonal_transfer_function(start, first_state_row(start, N), s) - wanted).abs().max()
        )

    assert worst(64) < worst(16) / 4 < worst(8) / 8


@pytest.mark.parametrize("N", [16, 32])
def test_ptd_is_near_everywhere_in_proportion_to_eps(N):
    small, large = (deviation(N, ptd_legs(N, eps)).max() for eps in (0.001, 0.01))
    assert 8 < large / small < 12
    for eps, worst in ((0.001, small), (0.01, large)):
        assert worst < deviation_bound(N, eps) / 4


def test_the_price_is_the_condition_number():
    A, _ = hippo_legs(32)
    conditions = [condition(A + gaussian(A, eps)) for eps in (1e-3, 1e-1)]
    assert 20 < conditions[0] / conditions[1] < 500
    assert conditions[0] < condition(A) / 1000


def test_optimised_is_better_conditioned_and_no_further():
    A, _ = hippo_legs(16)
    E = optimised(A, 0.1, steps=40)
    assert torch.linalg.matrix_norm(E, 2) <= 0.1 + 1e-12
    assert condition(A + E) < condition(A + gaussian(A, 0.1)) / 3
    assert deviation(16, ptd_legs_optimised(16, 0.1, steps=40)).max() < deviation_bound(16, 0.1)


def test_stable_for_absolute_eps_and_not_for_relative():
    """The trap: a perturbation of a hundredth of |A| pushes poles over the axis."""
    A, B = hippo_legs(64)
    assert (ptd_legs(64, 0.3).poles.real < -0.5).all()
    relative = 0.01 * torch.linalg.matrix_norm(A, 2).item()
    assert (diagonalise(A + gaussian(A, relative), B).poles.real > 0).any()


def test_attack_passes_s4d_and_not_ptd():
    """In discrete time: the state that reads a sinusoid at the spike, after the transient."""
    N, step = 16, 0.005
    outputs = {}
    for name, start in (("s4d", s4d_legs(N)), ("ptd", ptd_legs(N, 0.01))):
        torch.manual_seed(0)
        layer = S4D(1, start=start, step_min=step, step_max=step).double()
        C = first_state_row(start, N)[None]
        with torch.no_grad():
            layer.skip.zero_()
            layer.C.copy_(first(N) if start.basis is not None else torch.view_as_real(C))
            frequency = step * s4d_legs(N).poles.imag.max().item()
            u = fourier_attack(torch.zeros(1, 1600, dtype=torch.float64), frequency, 1.0)
            outputs[name] = layer(u[..., None])[0][0, -200:, 0].abs().max()
    assert outputs["s4d"] > 0.6 and outputs["ptd"] < 0.05


def test_fourier_attack():
    u = torch.zeros(2, 9)
    got = fourier_attack(u, 0.5, 2.0, phase=0.1)
    wanted = 2 * torch.sin(0.5 * torch.arange(9.0) + 0.1)
    torch.testing.assert_close(got, wanted.expand(2, 9))
    assert not u.any()


def test_a_layer_learns_its_rows_in_hippos_coordinates():
    start = ptd_legs(8, 0.1)
    layer = S4D(2, start=start)
    assert layer.C.shape == (2, 8) and not layer.basis.requires_grad
    wanted = layer.C.to(torch.complex64) @ start.basis.to(torch.complex64)
    torch.testing.assert_close(layer.system()[2], wanted)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: gaussian(torch.zeros(2, 3, dtype=torch.float64), 0.1), "A: expected a square"),
        (lambda: gaussian(torch.zeros(2, 2), 0.1), "A: expected .* float64"),
        (lambda: ptd_legs(4, 0.0), "eps: expected more than 0"),
        (lambda: diagonalise(-torch.eye(2).double(), torch.tensor([1.0, 0.0]).double()), "B: exp"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
