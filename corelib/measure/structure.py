"""What a token mixer's matrix is made of.

Attention, convolutions, recurrences and Fourier layers are linear in their values: with the
content held still, ``y = P v`` for some ``P (L, L)``. `materialize` finds ``P`` by pushing the unit
vectors through the mixer, `structure_report` says what kind of matrix it is, and with that what a
fast algorithm for it could use:

* few non-zeros or a narrow band: skip the rest;
* low rank ``r``: ``L r`` numbers instead of ``L^2``;
* Toeplitz, ``P_ij = c_(i-j)``: a convolution, ``L log L`` by FFT;
* Vandermonde, ``P_ij = x_j ** i``: evaluating a polynomial, ``L log L`` for roots of unity;
* state: a recurrence from left to right must carry as many numbers (per value channel) as the
  largest rank of a block ``P[i:, :i]``, past to future. Fixed: linear time, constant memory.

The last is Kronecker's theorem on Hankel blocks (Dewilde and van der Veen, 1998): such a matrix is
called semiseparable of that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

#: Singular values below this share of the matrix's largest one, and entries likewise, are zeros.
TOLERANCE = 1e-9


def materialize(
    mix: Callable[[Tensor], Tensor],
    length: int,
    *,
    batch: tuple[int, ...] = (1, 1),
    dtype: torch.dtype = torch.float64,
) -> Shaped[Tensor, "*batch L L"]:
    """The matrix ``P`` of a mixer that is linear in its values: ``mix(v) == P @ v``.

    Args:
        mix: ``v (*batch, L, V) -> y (*batch, L, V)`` for any width ``V``, content held still. The
            result may be complex.
        length: ``L``; the unit vectors are pushed through at once, as ``L`` channels.
        batch: the leading axes of ``v``, by default one batch row and one head.
        dtype: of the unit vectors.

    Raises:
        ValueError: ``mix`` changes the shape, or is not linear: ``P`` does not reproduce it.
    """
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    units = torch.eye(length, dtype=dtype).expand(*batch, length, length)
    P = mix(units).detach()
    if P.shape != units.shape:
        raise ValueError(f"mix: expected a result {tuple(units.shape)}, got {tuple(P.shape)}")
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(units.shape, generator=generator, dtype=torch.float64).to(dtype)
    wanted = P @ v.to(P.dtype)
    off = (mix(v).detach() - wanted).abs().max().item()
    # "not <=" rather than ">": a NaN is not linear either
    if not off <= 1e3 * torch.finfo(dtype).eps * length * max(1.0, wanted.abs().max().item()):
        raise ValueError(f"mix: expected to be linear in its values, but P @ v is off by {off:.1e}")
    return P


@dataclass(frozen=True)
class Structure:
    """What `structure_report` found in one matrix ``(L, L)``.

    Attributes:
        length: ``L``.
        rank: of the whole matrix.
        below, above: the farthest non-zero diagonal under and over the main one.
        density: the share of entries that are not zero.
        toeplitz: distance to the nearest Toeplitz matrix, over the matrix's own norm; 0 is exact.
        vandermonde: how far rows are from ``P_(i+1) = P_i * x``, ``P_0 = 1``, over the norm.
        state_forward, state_backward: numbers that a recurrence from the left (from the right)
            must carry for each value channel.
        row_sum_error: the largest ``|sum_j P_ij - 1|``; 0 means that rows are averages.
        negative: whether some entry is negative (or complex): more than an average.
    """

    length: int
    rank: int
    below: int
    above: int
    density: float
    toeplitz: float
    vandermonde: float
    state_forward: int
    state_backward: int
    row_sum_error: float
    negative: bool

    @property
    def causal(self) -> bool:
        """Nothing above the diagonal: no output sees a later input."""
        return self.above == 0

    @property
    def normalised(self) -> bool:
        """Every row sums to one."""
        return self.row_sum_error < 1e-6


def structure_report(P: Shaped[Tensor, "L L"], tolerance: float = TOLERANCE) -> Structure:
    """Rank, band, sparsity, Toeplitz and Vandermonde distance, and state size of one matrix.

    ``tolerance`` is what counts as zero, relative to the largest singular value or entry. The state
    sizes take ``2 L`` singular value decompositions: meant for ``L`` of some hundreds.

    Raises:
        ValueError: ``P`` is not square, empty, or not finite.
    """
    if P.dim() != 2 or P.shape[0] != P.shape[1] or not len(P):
        raise ValueError(f"P: expected a square matrix (L, L), got shape {tuple(P.shape)}")
    P = P.detach().to(torch.complex128 if P.is_complex() else torch.float64)
    if not P.abs().isfinite().all():
        raise ValueError("P: expected finite numbers, got some that are not")
    nonzero = P.abs() > tolerance * P.abs().max()
    rows, columns = nonzero.nonzero().T if nonzero.any() else torch.zeros(2, 1, dtype=torch.long)
    return Structure(
        length=len(P),
        rank=numerical_rank(P, tolerance),
        below=max(0, int((rows - columns).max())),
        above=max(0, int((columns - rows).max())),
        density=nonzero.double().mean().item(),
        toeplitz=toeplitz_distance(P),
        vandermonde=_vandermonde_distance(P),
        state_forward=state_size(P, tolerance),
        state_backward=state_size(P.flip(0, 1), tolerance),
        row_sum_error=(P.sum(1) - 1).abs().max().item(),
        negative=P.is_complex() or bool((P.real < -tolerance * P.abs().max()).any()),
    )


def numerical_rank(
    P: Shaped[Tensor, "L S"], tolerance: float = TOLERANCE, largest: float | None = None
) -> int:
    """Singular values above ``tolerance`` times ``largest`` (by default, the largest of them)."""
    values = torch.linalg.svdvals(P)
    top = values.max().item() if largest is None and values.numel() else largest
    return int((values > tolerance * top).sum()) if top else 0


def toeplitz_distance(P: Shaped[Tensor, "L L"]) -> float:
    """``|P - T| / |P|`` (Frobenius) with the nearest Toeplitz ``T``: each diagonal's mean."""
    L = len(P)
    which = torch.arange(L)[:, None] - torch.arange(L)[None, :] + L - 1
    sums = torch.zeros(2 * L - 1, dtype=P.dtype).index_add_(0, which.flatten(), P.flatten())
    lengths = L - (torch.arange(2 * L - 1) - (L - 1)).abs()
    return _relative(P - (sums / lengths)[which], P)


def _vandermonde_distance(P: Tensor) -> float:
    """Rows that are the powers of one vector: each is the last one times it, the first is ones."""
    if len(P) == 1:
        return _relative(P - 1, P)
    return _relative(torch.cat([P[:1] - 1, P[1:] - P[:-1] * P[1:2]]), P)


def _relative(off: Tensor, P: Tensor) -> float:
    norm = torch.linalg.norm(P).item()
    return torch.linalg.norm(off).item() / norm if norm else 0.0


def state_size(P: Shaped[Tensor, "L L"], tolerance: float = TOLERANCE) -> int:
    """The largest rank of the blocks ``P[i:, :i]``: what the future needs to know of the past."""
    largest = torch.linalg.matrix_norm(P, 2).item() if P.numel() else 0.0
    blocks = (P[i:, :i] for i in range(1, len(P)))
    return max((numerical_rank(block, tolerance, largest) for block in blocks), default=0)
