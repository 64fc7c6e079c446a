"""From continuous time to steps: ``x' = A x + B u`` as ``x[t] = A_bar x[t-1] + B_bar u[t]``.

Two rules, each for a dense matrix and for a diagonal one (given by its poles, possibly complex):

* `bilinear` (Tustin): ``A_bar = (I - step/2 A)^-1 (I + step/2 A)``,
  ``B_bar = (I - step/2 A)^-1 step B``. Keeps a stable system stable for every step.
* `zero_order_hold`: the input stays constant for a step; ``A_bar = exp(step A)``,
  ``B_bar = A^-1 (exp(step A) - I) B``, also where ``A`` has no inverse.

The diagonal forms return ``(decay, gain)``, both like the poles: ``A_bar`` is ``diag(decay)`` and
``B_bar`` is ``gain[..., None] * B`` for a matrix ``B``, ``gain * B`` for a vector.

``step`` is in units of time: a number, or a tensor with the leading axes of ``A`` or the poles.

Oracle: ``scipy.signal.cont2discrete`` (methods ``"bilinear"`` and ``"zoh"``).
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

Matrix = Inexact[Tensor, "*batch N N"]  # real or complex
Inputs = Inexact[Tensor, "*batch N M"]
Step = Real | Float[Tensor, "*batch"]
Poles = Inexact[Tensor, "*batch N"]


def bilinear(A: Matrix, B: Inputs, step: Step) -> tuple[Matrix, Inputs]:
    """``(A_bar, B_bar)`` by the bilinear rule. ``B`` is a matrix; one input is a column."""
    _check_dense(A, B)
    step = _aligned(step, A, 2)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    half = step / 2 * A
    right = torch.cat([(eye + half).expand_as(A), step * B], -1)
    solved = torch.linalg.solve(eye - half, right)
    return solved[..., : A.shape[-1]], solved[..., A.shape[-1] :]


def zero_order_hold(A: Matrix, B: Inputs, step: Step) -> tuple[Matrix, Inputs]:
    """``(A_bar, B_bar)`` by the zero-order hold, out of one matrix exponential."""
    _check_dense(A, B)
    N, M = B.shape[-2:]
    upper = _aligned(step, A, 2) * torch.cat([A, B], -1)
    lower = upper.new_zeros(*upper.shape[:-2], M, N + M)
    grown = torch.matrix_exp(torch.cat([upper, lower], -2))  # exp [[A, B], [0, 0]]
    return grown[..., :N, :N], grown[..., :N, N:]


def bilinear_diagonal(poles: Poles, step: Step) -> tuple[Poles, Poles]:
    """``(decay, gain)`` of the bilinear rule, pole by pole."""
    step = _aligned(step, poles, 1)
    solved = 1 / (1 - step / 2 * poles)
    return solved * (1 + step / 2 * poles), solved * step


def zero_order_hold_diagonal(poles: Poles, step: Step) -> tuple[Poles, Poles]:
    """``(decay, gain)`` of the zero-order hold, pole by pole; a pole at 0 integrates."""
    step = _aligned(step, poles, 1)
    power = step * poles
    still = poles == 0
    gain = torch.expm1(power) / torch.where(still, torch.ones_like(poles), poles)
    return torch.exp(power), torch.where(still, step.to(gain.dtype), gain)


def _aligned(step: Step, system: Tensor, axes: int) -> Tensor:
    """``step`` as a tensor with ``axes`` further axes of size 1."""
    if not isinstance(step, Tensor):
        if isinstance(step, bool) or not isinstance(step, Real):
            raise TypeError(f"step: expected a number or a tensor, got {type(step).__name__}")
        step = torch.as_tensor(step, dtype=system.real.dtype, device=system.device)
    elif step.dim() and step.shape != system.shape[:-axes]:
        raise ValueError(
            f"step: expected one number, or the shape {tuple(system.shape[:-axes])}, "
            f"got {tuple(step.shape)}"
        )
    return step[(..., *[None] * axes)]


def _check_dense(A: Tensor, B: Tensor) -> None:
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A: expected square matrices, got shape {tuple(A.shape)}")
    if B.dim() != A.dim() or B.shape[:-1] != A.shape[:-1]:
        raise ValueError(
            f"B: expected the rows of A, {tuple(A.shape[:-1])}, and a column for each input, "
            f"got shape {tuple(B.shape)}"
        )
    if A.dtype != B.dtype:
        raise TypeError(f"B: expected the dtype of A, {A.dtype}, got {B.dtype}")
