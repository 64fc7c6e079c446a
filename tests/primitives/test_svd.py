"""Truncated SVD: Eckart and Young to the last digit, and what is cheaper than a whole SVD."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives.svd import (
    effective_rank,
    energy_rank,
    from_gram,
    gram_svd,
    spectral_norm,
    svd_factors,
    tail_energy,
    truncated_svd,
)

EXACT = dict(atol=1e-11, rtol=1e-10)


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (4, 1), (2, 3, 6, 6)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_what_is_lost_is_the_tail(shape, rank):
    x = matrix(*shape)
    left, right = svd_factors(x, rank)
    r = min(rank, *shape[-2:])
    assert left.shape == (*shape[:-1], r) and right.shape == (*shape[:-2], r, shape[-1])
    lost = (x - left @ right).square().sum((-2, -1))
    torch.testing.assert_close(lost, tail_energy(torch.linalg.svdvals(x), rank), **EXACT)


def test_no_factors_of_the_rank_are_nearer():
    x = matrix(6, 9)
    best = (x - torch.mm(*svd_factors(x, 2))).norm()
    for seed in range(50):
        left = matrix(6, 2, seed=seed) + svd_factors(x, 2)[0]
        right = torch.linalg.lstsq(left, x).solution  # the best right factor for this left one
        assert (x - left @ right).norm() >= best - 1e-12


def test_truncated_svd_is_the_beginning_of_the_whole():
    x = matrix(8, 5)
    u, sigma, vh = truncated_svd(x, 3)
    wanted = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(sigma, wanted.S[:3])
    torch.testing.assert_close(u @ vh, wanted.U[:, :3] @ wanted.Vh[:3], **EXACT)
    whole = truncated_svd(x, 99)
    torch.testing.assert_close((whole.u * whole.sigma) @ whole.vh, x, **EXACT)


def test_gradients_reach_the_matrix():
    x = matrix(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: torch.mm(*svd_factors(m, 2)), x)


def test_half_precision_comes_back_in_its_dtype():
    left, right = svd_factors(matrix(6, 4).bfloat16(), 4)
    assert left.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close((left @ right).double(), matrix(6, 4), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("shape", [(30, 4), (3, 5), (2, 9, 4)])
def test_gram_svd_equals_svd(shape):
    x = matrix(*shape)
    sigma, vh = gram_svd(x)
    wanted = torch.zeros(sigma.shape, dtype=torch.float64)
    wanted[..., : min(shape[-2:])] = torch.linalg.svdvals(x)
    torch.testing.assert_close(sigma, wanted, atol=1e-6, rtol=1e-7)
    left, right = svd_factors(x, 2)
    torch.testing.assert_close(x @ vh[..., :2, :].mT @ vh[..., :2, :], left @ right, **EXACT)


def test_gram_grows_by_rows():
    x = matrix(20, 4)
    gram = sum(part.mT @ part for part in x.split(6))
    torch.testing.assert_close(from_gram(gram)[0], torch.linalg.svdvals(x), atol=1e-9, rtol=1e-9)


def test_power_iteration_climbs_to_the_norm():
    x = matrix(3, 12, 8)
    norm = torch.linalg.matrix_norm(x, 2)
    found = torch.stack([spectral_norm(x, steps) for steps in (1, 3, 10, 300)])
    assert (found.diff(dim=0) >= -1e-12).all() and (found <= norm + 1e-12).all()
    torch.testing.assert_close(found[-1], norm, atol=1e-8, rtol=1e-8)
    first = torch.linalg.svd(x).Vh[:, 0]
    torch.testing.assert_close(spectral_norm(x, 1, start=first), norm, **EXACT)
    assert spectral_norm(torch.zeros(3, 2)) == 0


def test_power_iteration_by_hand():
    x = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    v = torch.tensor([16.0, 1.0], dtype=torch.float64)  # after two steps from (1, 1)
    wanted = (x @ v).norm() / v.norm()
    torch.testing.assert_close(spectral_norm(x, 2), wanted, **EXACT)


def test_energy_rank_is_the_smallest():
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.0])  # energy 9, 4, 1 of 14
    for share, rank in [(0.1, 1), (9 / 14 - 1e-6, 1), (9 / 14 + 1e-3, 2), (0.95, 3), (1.0, 3)]:
        assert energy_rank(sigma, share) == rank
    assert energy_rank(torch.stack([sigma, torch.ones(4)]), 0.5).tolist() == [1, 2]


def test_effective_rank():
    assert effective_rank(torch.ones(5)).item() == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    halves = torch.tensor([[0.5, 0.25, 0.25]])
    assert effective_rank(halves).item() == pytest.approx(2**1.5)


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    x = torch.randn(3, 4)
    for rank, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="rank: expected"):
            truncated_svd(x, rank)
    with pytest.raises(ValueError, match="x: expected matrices"):
        svd_factors(x[0], 1)
    with pytest.raises(TypeError, match="x: expected a floating-point"):
        truncated_svd(x.long(), 1)
    with pytest.raises(ValueError, match="steps: expected"):
        spectral_norm(x, 0)
    with pytest.raises(ValueError, match="rank: expected"):
        tail_energy(x[0], -1)
    with pytest.raises(ValueError, match="share: expected"):
        energy_rank(x[0], 0.0)
