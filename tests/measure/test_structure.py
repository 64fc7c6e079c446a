"""Structure of mixing matrices: every kind is recognised, and its neighbour is not."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from corelib.measure.structure import (
    materialize,
    numerical_rank,
    state_size,
    structure_report,
    toeplitz_distance,
)

L = 24


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_materialize_gives_back_the_matrix():
    P = random(2, 3, L, L)
    found = materialize(lambda v: P @ v, L, batch=(2, 3))
    torch.testing.assert_close(found, P, rtol=0, atol=0)


def test_materialize_takes_complex_results_and_length_one():
    P = torch.complex(random(1, 1, 1, 1), random(1, 1, 1, 1, seed=1))
    torch.testing.assert_close(materialize(lambda v: P @ v.to(P.dtype), 1), P)


@pytest.mark.parametrize(
    "mix",
    [lambda v: v.softmax(-2) @ v.mT @ v, lambda v: v + 1, lambda v: v * v, lambda v: v / 0],
    ids=["softmax of the values", "a constant", "a square", "not a number"],
)
def test_what_is_not_linear_is_refused(mix):
    with pytest.raises(ValueError, match="linear"):
        materialize(mix, 5)


@pytest.mark.no_shape_checks
def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"mix: expected a result \(1, 1, 4, 4\)"):
        materialize(lambda v: v[..., :2, :], 4)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        materialize(lambda v: v, 0)
    with pytest.raises(ValueError, match=r"square matrix \(L, L\), got shape \(3, 4\)"):
        structure_report(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="finite"):
        structure_report(torch.full((2, 2), torch.nan))


def test_rank_and_band():
    low = structure_report(random(L, 3) @ random(3, L, seed=1))
    assert (low.rank, low.below, low.above, low.density) == (3, L - 1, L - 1, 1.0)
    band = random(L, L).triu(-5).tril(2)
    report = structure_report(band)
    assert (report.below, report.above) == (5, 2)
    assert report.density == pytest.approx((band != 0).double().mean().item())
    assert report.state_forward == 5 and report.state_backward == 2  # what reaches across


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_recurrence_has_its_state_size_and_no_other(n):
    """``P_ij = c_i A^(i-j) b_j``, with a term of its own on the diagonal."""
    c, b, decay = random(L, n), random(L, n, seed=1), torch.linspace(0.5, 0.95, n).double()
    P = torch.zeros(L, L, dtype=torch.float64)
    for i in range(L):
        for j in range(i + 1):
            P[i, j] = (c[i] * decay ** (i - j) * b[j]).sum() + (i == j)
    report = structure_report(P)
    assert report.causal and report.state_forward == n and report.state_backward == 0
    assert report.rank == L
    assert state_size(P + random(L, L, seed=2).tril()) > n


def test_toeplitz_agrees_with_scipy_and_measures_the_distance():
    first_column, first_row = random(L), random(L, seed=1)
    P = torch.tensor(scipy.linalg.toeplitz(first_column.numpy(), first_row.numpy()))
    assert toeplitz_distance(P) < 1e-14
    bent = P.clone()
    bent[3, 7] += 1.0  # the mean of that diagonal (20 long) takes up a twentieth
    off = (19 / 20) ** 2 + 19 / 20**2
    assert toeplitz_distance(bent) == pytest.approx((off**0.5) / bent.norm().item())


def test_vandermonde():
    dft = torch.tensor(scipy.linalg.dft(L))
    report = structure_report(dft)
    assert report.vandermonde < 1e-12 and report.rank == L and report.negative
    assert report.toeplitz > 0.5
    assert structure_report(dft / L**0.5).vandermonde > 0.1


def test_averages():
    P = random(L, L).softmax(-1)
    assert structure_report(P).normalised and not structure_report(P).negative
    assert not structure_report(P + 0.01).normalised
    assert structure_report(-P).negative


def test_tiny_and_empty_matrices():
    one = structure_report(torch.ones(1, 1))
    assert (one.rank, one.below, one.above, one.state_forward, one.toeplitz) == (1, 0, 0, 0, 0.0)
    zero = structure_report(torch.zeros(3, 3))
    assert (zero.rank, zero.density, zero.state_forward) == (0, 0.0, 0)


def test_numerical_rank_counts_against_the_given_scale():
    values = torch.diag(torch.tensor([1.0, 1e-3, 1e-12], dtype=torch.float64))
    assert numerical_rank(values) == 2
    assert numerical_rank(values, tolerance=1e-2) == 1
    assert numerical_rank(values, largest=1e6, tolerance=1e-8) == 1
