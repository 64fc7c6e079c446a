"""Low rank: the best thin factors of a matrix, and how good they can be.

    x = U diag(sigma) V^T       sigma_1 >= sigma_2 >= ... >= 0
    |x - U_r diag(sigma_r) V_r^T|_F^2 = sum_{i > r} sigma_i^2     and no matrix of rank r is nearer

(Eckart & Young, 1936; Mirsky, 1960, for every unitarily invariant norm.) `truncated_svd` gives the
three parts, `svd_factors` two, `tail_energy` what is lost. `gram_svd` finds ``sigma`` and ``V`` of
a tall matrix from ``x^T x`` alone, in one product and an eigenvalue problem as small as the matrix
is narrow; squaring costs it half of the digits. Half precision is computed in float32.
Oracle: ``torch.linalg.svd``; the bounds by brute force.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Matrix = Float[Tensor, "*batch m n"]
Spectrum = Float[Tensor, "*batch k"]


class TruncatedSVD(NamedTuple):
    """``u (..., m, r)``, ``sigma (..., r)`` from the largest on, ``vh (..., r, n)``."""

    u: Tensor
    sigma: Tensor
    vh: Tensor


def truncated_svd(x: Matrix, rank: int) -> TruncatedSVD:
    """The first ``rank`` singular triples; a rank above the matrix's sides is lowered to them.

    Raises ValueError for a rank below 1, TypeError for one that is no whole number.
    """
    rank = _checked_rank(x, rank)
    u, sigma, vh = torch.linalg.svd(_wide(x), full_matrices=False)
    parts = u[..., :rank], sigma[..., :rank], vh[..., :rank, :]
    return TruncatedSVD(*(part.to(x.dtype).contiguous() for part in parts))


def svd_factors(
    x: Matrix, rank: int
) -> tuple[Float[Tensor, "*batch m r"], Float[Tensor, "*batch r n"]]:
    """``left = U diag(sigma)`` and ``right = V^T``, whose product is nearest to ``x``."""
    u, sigma, vh = truncated_svd(_wide(x), rank)
    return (u * sigma[..., None, :]).to(x.dtype), vh.to(x.dtype)


def gram_svd(x: Matrix) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """``sigma (..., n)`` and ``vh (..., n, n)`` of ``x`` from its Gram matrix ``x^T x``.

    Rows may be added to a Gram matrix one by one, which a decomposition does not allow. Singular
    values below ``sqrt(eps)`` of the largest are noise. See `from_gram`.
    """
    _check_matrix(x)
    return from_gram(_wide(x).mT @ _wide(x))


def from_gram(
    gram: Float[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """`gram_svd` from ``x^T x`` itself."""
    values, vectors = torch.linalg.eigh(_wide(gram))
    return values.clamp_min(0).sqrt().flip(-1), vectors.flip(-1).mT


def spectral_norm(
    x: Matrix, steps: int = 3, *, start: Float[Tensor, "*batch n"] | None = None
) -> Float[Tensor, "*batch"]:
    """About ``sigma_1``, from below, by ``steps`` power iterations with ``x^T x``.

    Each step shrinks the error by ``(sigma_2 / sigma_1)^4``. ``start``: where to begin; by default
    all ones, which is unlucky for a matrix whose rows sum to zero.
    """
    _check_matrix(x)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1, got {steps!r}")
    wide = _wide(x)
    v = wide.new_ones(*x.shape[:-2], x.shape[-1]) if start is None else start.to(wide.dtype)
    v = v[..., None] / torch.linalg.vector_norm(v, dim=-1)[..., None, None]
    tiny = torch.finfo(wide.dtype).tiny
    for _ in range(steps):
        v = wide.mT @ (wide @ v)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny)
    return torch.linalg.vector_norm(wide @ v, dim=(-2, -1)).to(x.dtype)


def tail_energy(sigma: Spectrum, rank: int) -> Float[Tensor, "*batch"]:
    """``sum_{i > rank} sigma_i^2``: the squared error of the best approximation of that rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank: expected a whole number of at least 0, got {rank!r}")
    return sigma[..., rank:].square().sum(-1)


def energy_rank(sigma: Spectrum, share: float) -> Int[Tensor, "*batch"]:
    """The smallest rank whose singular values hold ``share`` of the sum of their squares."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share}")
    energy = sigma.square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)  # from the small end: no cancellation
    left = (1 - share) * energy.sum(-1, keepdim=True)
    return (tail > left).sum(-1)


def effective_rank(sigma: Spectrum) -> Float[Tensor, "*batch"]:
    """``exp(entropy(sigma / sum(sigma)))``: how many directions share the weight evenly.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    Between 1 and ``k``; 0 for a matrix of zeros.
    """
    total = sigma.sum(-1, keepdim=True)
    weights = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    entropy = torch.special.entr(weights).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_matrix(x: Tensor) -> None:
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x: expected matrices (..., m, n) of some size, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")


def _checked_rank(x: Tensor, rank: int) -> int:
    _check_matrix(x)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected a whole number, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    return min(rank, *x.shape[-2:])
