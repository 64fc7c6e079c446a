"""Robustifying State-space Models for Long Sequences via Approximate Diagonalization (arXiv
2310.01698): perturb, then diagonalise.

Idea: HiPPO's matrix cannot be diagonalised in floating point, but a matrix very near to it can, and
the diagonal system of that one answers at every frequency as HiPPO does.

    A + E = V diag(poles) V^-1                                        (a small E of norm ``eps``)
    B' = V^-1 B        C' = C V                                       (the same system, diagonal)
    max over s on the axis of |G'(s) - G(s)| <= (2 ln N + 4) eps + O(sqrt(log N) eps^2)

where ``G(s) = C (s - A)^-1 B`` is the transfer function, ``C`` being the first state. S4D keeps
HiPPO's normal part instead (`s4d_legs`): its transfer function tends to HiPPO's at each frequency,
yet not uniformly. At its highest pole there is a spike of height 2/pi at every ``N``, and an input
of just that frequency comes through.

The price is ``cond(V)``, by which rounding errors are multiplied: about ``1 / eps``. `gaussian`
perturbs at random; `optimised` descends ``cond(V) + gamma |E|`` from there, and finds matrices
better conditioned by far at the same distance.

| here          | paper        | what                                         | shape              |
|:--------------|:-------------|:---------------------------------------------|:-------------------|
| A, B          | A, B         | the system to diagonalise                    | (N, N), (N,)       |
| eps           | epsilon      | spectral norm of E, absolute                 |                    |
| basis         | C V diag(B') | how a row ``C`` reads the diagonal states    | (N, P)             |

A real ``E`` keeps conjugate pairs; a few poles of LegS come out real, and stand alone with half
their ``B``. Eigenvectors are scaled so that ``B' = 1``. All of it in float64; the poles then are
trained as S4D's are (`corelib.state_space.s4d.S4D` with ``start=ptd_legs(N)``), the rows ``C`` in
HiPPO's own coordinates, which is where they are well scaled. Ours: ``gamma`` (the paper's is not
known to us) and Adam on the logarithm of the objective. An ``E`` in proportion to ``|A|`` would
push eigenvalues to the right of the axis; keep ``eps`` at most about 0.3.
Oracles: ``numpy.linalg.eig``, the dense resolvent.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .s4d import Diagonal
from .shared import hippo_legs

Matrix = Float[Tensor, "N N"]


def gaussian(A: Matrix, eps: float, *, seed: int = 0) -> Matrix:
    """A real Gaussian matrix of spectral norm ``eps``, of ``A``'s shape."""
    _check(A, eps)
    generator = torch.Generator().manual_seed(seed)
    E = torch.randn(A.shape, generator=generator, dtype=torch.float64).to(A.device)
    return E * (eps / torch.linalg.matrix_norm(E, 2))


def optimised(
    A: Matrix,
    eps: float,
    *,
    gamma: float | None = None,
    steps: int = 60,
    lr: float = 0.01,
    seed: int = 0,
) -> Matrix:
    """An ``E`` of norm ``eps`` at most with better conditioned eigenvectors of ``A + E``.

    Gradient descent on ``cond(V) + gamma |E|`` from `gaussian`; ``gamma=None`` takes the condition
    number there, over ``eps``, so that both terms weigh the same at first. ``lr`` is in units of
    ``eps``. The best conditioned ``E`` no longer than ``eps`` that was met is returned.
    """
    best = gaussian(A, eps, seed=seed)
    lowest = condition(A + best)
    gamma = lowest / eps if gamma is None else gamma
    E = best.clone().requires_grad_()
    optimiser = torch.optim.Adam([E], lr=lr * eps)
    for _ in range(steps):
        values = torch.linalg.svdvals(torch.linalg.eig(A + E)[1])
        spread, norm = values[0] / values[-1], torch.linalg.matrix_norm(E, 2)
        if norm.item() <= eps and spread.item() < lowest:
            best, lowest = E.detach().clone(), spread.item()
        optimiser.zero_grad()
        (spread + gamma * norm).log().backward()
        optimiser.step()
    return best


def condition(A: Matrix) -> float:
    """Condition number of ``A``'s eigenvectors, each of length 1."""
    return torch.linalg.cond(torch.linalg.eig(A)[1]).item()


def diagonalise(A: Matrix, B: Float[Tensor, " N"]) -> Diagonal:
    """``A``, ``B`` as a `Diagonal` system with ``B' = 1`` (1/2 for real poles).

    Raises ValueError where the system does not reach one of the poles (its ``B'`` would be 0).
    """
    poles, V = torch.linalg.eig(A)
    enter = torch.linalg.solve(V, B.to(V.dtype))
    if not bool((enter.abs() > 0).all()):
        raise ValueError("B: expected every pole of A to be reached, got a zero in V^-1 B")
    keep = poles.imag >= 0
    alone = poles.imag[keep] == 0
    weight = torch.where(alone, 0.5, 1.0).to(V.dtype)
    return Diagonal(poles[keep], weight, (V * enter)[:, keep])


def ptd_legs(N: int, eps: float = 0.1, *, seed: int = 0) -> Diagonal:
    """HiPPO-LegS, perturbed by a Gaussian ``E`` and diagonalised: a start for `S4D` layers."""
    A, B = hippo_legs(N)
    return diagonalise(A + gaussian(A, eps, seed=seed), B)


def ptd_legs_optimised(N: int, eps: float = 0.1, *, steps: int = 60, seed: int = 0) -> Diagonal:
    """`ptd_legs` with an `optimised` ``E``: closer to HiPPO for the digits it costs."""
    A, B = hippo_legs(N)
    return diagonalise(A + optimised(A, eps, steps=steps, seed=seed), B)


# --- transfer functions ---------------------------------------------------------------------------


def transfer_function(
    A: Matrix, B: Float[Tensor, " N"], C: Float[Tensor, " N"], s: Complex[Tensor, " K"]
) -> Complex[Tensor, " K"]:
    """``C (s - A)^-1 B``, one dense solve for each ``s``."""
    wide = A.to(torch.complex128)
    eye = torch.eye(A.shape[-1], dtype=wide.dtype, device=A.device)
    x = torch.linalg.solve(s[:, None, None] * eye - wide, B.to(wide.dtype)[:, None])
    return (x[..., 0] * C).sum(-1)


def diagonal_transfer_function(
    start: Diagonal, C: Complex[Tensor, " P"], s: Complex[Tensor, " K"]
) -> Complex[Tensor, " K"]:
    """The same of a diagonal system: both of every pair of poles."""
    over = C * start.B
    near, far = s[:, None] - start.poles, s[:, None] - start.poles.conj()
    return (over / near + over.conj() / far).sum(-1)


def first_state_row(start: Diagonal, N: int) -> Complex[Tensor, " P"]:
    """The row ``C`` that reads HiPPO's first state, in the coordinates of ``start``.

    Of `s4d_legs` these are the coordinates of HiPPO's normal part, of `ptd_legs` the basis.
    """
    if start.basis is not None:
        return start.basis[0]
    # HiPPO's B is sqrt(2) times the vector p of its rank-one part, whose first entry is sqrt(1/2)
    A, B = hippo_legs(N)
    skew = A + torch.outer(B, B) / 2 + torch.eye(N, dtype=torch.float64) / 2
    V = torch.linalg.eigh(-1j * skew)[1][:, N // 2 :]
    row = V.mH @ B.to(V.dtype)
    return V[0] * row / row.abs()  # the phases that `dplr_legs` chooses


def deviation_bound(N: int, eps: float) -> float:
    """The paper's bound (first order) on the largest change of the transfer function."""
    return (2 * math.log(N) + 4) * eps


def fourier_attack(
    u: Float[Tensor, "*batch L"], frequency: float, amplitude: float, *, phase: float = 0.0
) -> Float[Tensor, "*batch L"]:
    """``u`` plus a sinusoid of ``frequency`` radians a step: noise of a single Fourier mode."""
    t = torch.arange(u.shape[-1], dtype=torch.float64, device=u.device)
    return u + amplitude * torch.sin(frequency * t + phase).to(u.dtype)


def example() -> dict:
    """HiPPO-LegS of size 6, to perturb by 0.1.

    >>> system = diagonalise(**example())
    >>> system.poles.shape, system.basis.shape
    (torch.Size([3]), torch.Size([6, 3]))
    """
    A, B = hippo_legs(6)
    return dict(A=A + gaussian(A, 0.1), B=B)


def _check(A: Tensor, eps: float) -> None:
    if A.dim() != 2 or A.shape[0] != A.shape[1] or A.dtype != torch.float64:
        raise ValueError(
            f"A: expected a square matrix in float64, got {tuple(A.shape)} in {A.dtype}"
        )
    if not eps > 0:
        raise ValueError(f"eps: expected more than 0, got {eps}")
