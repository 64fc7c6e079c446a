"""What state-space methods share: HiPPO's matrices, and LegS as diagonal plus rank one.

A continuous system ``x' = A x + B u``, ``y = C x``. `hippo_legs` is the matrix that makes the state
remember: ``x`` holds the coefficients of the whole past in Legendre polynomials of ``exp(-lag)``
(HiPPO, arXiv 2008.07669; `legs_basis` draws them). `legendre_matrices` keep a window instead, the
last ``theta`` of time, in Legendre polynomials of the place in it (the Legendre memory unit of
Voelker and others, NeurIPS 2019, which HiPPO calls LegT; `legendre_basis` draws them).

Diagonalising LegS as it stands fails, for its eigenvectors are nearly parallel; but it is a normal
matrix minus one of rank one (S4, arXiv 2111.00396, theorem 1), and a normal one has a unitary ``V``
(`dplr_legs`):

    A = V (diag(poles) - p p*) V*            new state = V* x

Poles come in conjugate pairs, as everything real does, and only one of each pair is kept:
``P = N / 2`` complex numbers stand for ``N`` real ones, and ``y = 2 Re(C x)``. What such a system
does in discrete time is in `corelib.state_space.dplr`.

| here        | paper         | shape                                            |
|:------------|:--------------|:-------------------------------------------------|
| poles, p, B | Lambda, P, B  | ``(..., P)`` complex, one of each conjugate pair |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

Pairs = Complex[Tensor, "*channels P"]


class Dplr(NamedTuple):
    """``A = diag(poles) - p p*`` and ``B``, each with one of every conjugate pair."""

    poles: Pairs
    p: Pairs
    B: Pairs


# --- HiPPO ----------------------------------------------------------------------------------------


def hippo_legs(N: int) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """HiPPO-LegS ``(A, B)``: a state of ``N`` Legendre coefficients of the past. Float64."""
    _check_size(N, 1)
    root = torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    A = -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    return A, root


def legs_basis(N: int, lags: Float[Tensor, " T"]) -> Float[Tensor, "T N"]:
    """``sqrt(2n + 1) P_n(2 exp(-lag) - 1)``: the past is ``u(t - lag) ~ legs_basis @ x(t)``.

    ``lags`` are in units of time (inputs ago, times the step). The state weighs its errors by
    ``exp(-lag)``: the recent past is sharp, the distant past blurred.
    """
    _check_size(N, 1)
    root = torch.sqrt(2 * torch.arange(N, dtype=lags.dtype, device=lags.device) + 1)
    return _legendre(N, 2 * torch.exp(-lags) - 1) * root


def legendre_matrices(N: int, theta: float) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """The Legendre memory ``(A, B)``: a window of the last ``theta``, in float64.

    ``A[i, j] = (2i + 1) / theta * (-1 if i < j else (-1)^(i - j + 1))``, and
    ``B[i] = (2i + 1) (-1)^i / theta``. Together they approximate the delay by ``theta`` (Padé).
    """
    _check_size(N, 1)
    if not theta > 0:
        raise ValueError(f"theta: expected more than 0, got {theta}")
    n = torch.arange(N, dtype=torch.float64)
    sign, rate = 1 - 2 * (n % 2), (2 * n + 1) / theta
    A = torch.where(n[:, None] < n, -1.0, -torch.outer(sign, sign))
    return rate[:, None] * A, rate * sign


def legendre_basis(N: int, places: Float[Tensor, " T"]) -> Float[Tensor, "T N"]:
    """``P_n(2 place - 1)``: the window is ``u(t - place theta) ~ legendre_basis @ x(t)``.

    ``places`` are shares of the window of `legendre_matrices`: 0 is now, 1 is ``theta`` ago.
    """
    _check_size(N, 1)
    return _legendre(N, 2 * places - 1)


def _legendre(N: int, x: Tensor) -> Tensor:
    """The first ``N`` Legendre polynomials at each ``x``, by Bonnet's recursion: ``(T, N)``."""
    columns = [torch.ones_like(x), x]
    for n in range(1, N - 1):
        columns.append(((2 * n + 1) * x * columns[n] - n * columns[n - 1]) / (n + 1))
    return torch.stack(columns[:N], -1)


def dplr_legs(N: int) -> Dplr:
    """HiPPO-LegS as diagonal plus rank one, in complex128; ``N`` must be even.

    ``A + p p^T`` with ``p = sqrt(n + 1/2)`` is ``-1/2 I`` plus a skew matrix. The phases of the
    eigenvectors are chosen so that ``p`` is real and positive.
    """
    _check_size(N, 2)
    if N % 2:
        raise ValueError(f"N: expected an even size, whose poles pair up, got {N}")
    A, B = hippo_legs(N)
    p = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
    skew = A + torch.outer(p, p) + torch.eye(N, dtype=torch.float64) / 2
    frequencies, V = torch.linalg.eigh(-1j * skew)  # Hermitian: V is unitary to rounding
    frequencies, V = frequencies[N // 2 :], V[:, N // 2 :]
    p, B = V.mH @ p.to(V.dtype), V.mH @ B.to(V.dtype)
    phase = p / p.abs()
    return Dplr(
        torch.complex(torch.full_like(frequencies, -0.5), frequencies), p / phase, B / phase
    )


# --- training -------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module, lr: float, *, system_lr: float = 1e-3, weight_decay: float = 0.01
) -> list[dict]:
    """Groups for an optimiser: A, B and the steps learn at ``system_lr``, without weight decay.

    Which parameters these are, each layer says in its class attribute ``SYSTEM``.
    """
    layers = [module for module in model.modules() if hasattr(module, "SYSTEM")]
    slow = {id(getattr(layer, name)) for layer in layers for name in layer.SYSTEM}
    fast = [x for x in model.parameters() if id(x) not in slow]
    gentle = [x for x in model.parameters() if id(x) in slow]
    return [
        {"params": fast, "lr": lr, "weight_decay": weight_decay},
        {"params": gentle, "lr": min(lr, system_lr), "weight_decay": 0.0},
    ]


def _check_size(N: int, least: int) -> None:
    if isinstance(N, bool) or not isinstance(N, int):
        raise TypeError(f"N: expected an int, got {type(N).__name__}")
    if N < least:
        raise ValueError(f"N: expected at least {least}, got {N}")
