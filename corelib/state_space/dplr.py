"""Diagonal-plus-rank-one systems in discrete time: dense, by powers, and one step at a time.

A system (`corelib.state_space.shared.Dplr`) keeps one of each conjugate pair of poles. With real
and imaginary parts apart it is a real system of size ``N = 2 P`` (`dense_form`), whose symmetric
part is negative, so that no power of its discrete form grows. From that come `final_state` and
`free_outputs`, which carry a state across stretches of inputs, and `to_tilde`, which S4's kernel
needs. `dplr_step` needs no matrix at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from corelib.primitives.discretise import bilinear

from .shared import Dplr, Pairs

Row = Complex[Tensor, "C P"]
Steps = Float[Tensor, "*channels"]

# --- the dense form -------------------------------------------------------------------------------


def to_real(x: Pairs) -> Float[Tensor, "*channels N"]:
    """Real parts, then imaginary parts."""
    return torch.cat([x.real, x.imag], -1)


def to_pairs(x: Float[Tensor, "*channels N"]) -> Pairs:
    """The inverse of `to_real`."""
    return torch.complex(*x.chunk(2, -1))


def output_row(C: Pairs) -> Float[Tensor, "*channels N"]:
    """``row`` with ``row @ to_real(x) == 2 Re(C x)``."""
    return 2 * to_real(C.conj())


def dense_form(
    system: Dplr,
) -> tuple[Float[Tensor, "*channels N N"], Float[Tensor, "*channels N"]]:
    """``(A, B)``, real, of the same system acting on `to_real` states."""
    a, b = torch.diag_embed(system.poles.real), torch.diag_embed(system.poles.imag)
    p = to_real(system.p)
    normal = torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)
    return normal - 2 * p[..., :, None] * p[..., None, :], to_real(system.B)


def discrete_form(
    system: Dplr, step: Steps
) -> tuple[Float[Tensor, "*channels N N"], Float[Tensor, "*channels N"]]:
    """``(A_bar, B_bar)``, dense and real, by the bilinear rule."""
    A, B = dense_form(system)
    A_bar, B_bar = bilinear(A, B[..., None], step)
    return A_bar, B_bar[..., 0]


def krylov(
    A: Float[Tensor, "*channels N N"], b: Float[Tensor, "*channels N"], count: int
) -> Float[Tensor, "*channels N count"]:
    """``[b, A b, ..., A^(count-1) b]``, doubling the number of columns each time."""
    columns, power = b[..., None], A
    while columns.shape[-1] < count:
        columns = torch.cat([columns, power @ columns], -1)
        power = power @ power
    return columns[..., :count]


def final_state(
    A_bar: Float[Tensor, "C N N"],
    B_bar: Float[Tensor, "C N"],
    u: Float[Tensor, "B C L"],
    start: Float[Tensor, "B C N"] | None = None,
) -> Float[Tensor, "B C N"]:
    """The state after inputs ``u``, in stretches of about ``sqrt(L)`` steps each."""
    L = u.shape[-1]
    stretch = max(1, 1 << (math.isqrt(max(L, 1)) - 1).bit_length())
    columns = krylov(A_bar, B_bar, stretch).flip(-1)  # the last input meets B_bar itself
    pieces = torch.nn.functional.pad(u, (-L % stretch, 0))
    pieces = pieces.unflatten(-1, (-(-L // stretch), stretch))
    added = torch.einsum("cnt,bcst->sbcn", columns, pieces)
    leap = torch.linalg.matrix_power(A_bar, stretch)
    x = u.new_zeros(*u.shape[:2], A_bar.shape[-1])
    for piece in added:
        x = _apply(leap, x) + piece
    return x if start is None else x + _apply(torch.linalg.matrix_power(A_bar, L), start)


def free_outputs(
    A_bar: Float[Tensor, "C N N"],
    row: Float[Tensor, "C N"],
    start: Float[Tensor, "B C N"],
    L: int,
) -> Float[Tensor, "B C L"]:
    """What a state does to the ``L`` outputs after it: ``row A_bar^(t + 1) start``."""
    stretch = max(1, 1 << (math.isqrt(max(L, 1)) - 1).bit_length())
    rows = krylov(A_bar.mT, _apply(A_bar.mT, row), stretch)
    leap, x, outputs = torch.linalg.matrix_power(A_bar, stretch), start, []
    for _ in range(-(-L // stretch)):
        outputs.append(torch.einsum("cnt,bcn->bct", rows, x))
        x = _apply(leap, x)
    return torch.cat([start.new_zeros(*start.shape[:2], 0), *outputs], -1)[..., :L]


def _apply(A: Tensor, x: Tensor) -> Tensor:
    """``A (C, N, N)`` times every ``x (..., C, N)``."""
    return torch.einsum("cnm,...cm->...cn", A, x)


# --- powers that S4 folds into C ------------------------------------------------------------------


def to_tilde(system: Dplr, C: Row, step: Float[Tensor, " C"], L: int) -> Row:
    """``C (I - A_bar^L)``: with it the infinite kernel's spectrum is that of its first ``L`` taps.

    Sampling a spectrum at ``L`` points folds the kernel's tail back onto its beginning; the tail is
    the kernel delayed by ``L``, and this takes it away beforehand. Computed in float64.
    """
    row, power = _row_and_power(system, C, step, L)
    return _from_row(row - _apply(power.mT, row), C)


def from_tilde(system: Dplr, C_tilde: Row, step: Float[Tensor, " C"], L: int) -> Row:
    """The inverse of `to_tilde`."""
    row, power = _row_and_power(system, C_tilde, step, L)
    eye = torch.eye(row.shape[-1], dtype=row.dtype, device=row.device)
    return _from_row(torch.linalg.solve((eye - power).mT, row), C_tilde)


def double_tilde(system: Dplr, C_tilde: Row, step: Float[Tensor, " C"], L: int) -> Row:
    """From ``to_tilde`` at ``L`` to that at ``2 L``: times ``I + A_bar^L``."""
    row, power = _row_and_power(system, C_tilde, step, L)
    return _from_row(row + _apply(power.mT, row), C_tilde)


def _row_and_power(
    system: Dplr, C: Row, step: Float[Tensor, " C"], L: int
) -> tuple[Tensor, Tensor]:
    wide = Dplr(*(x.to(torch.complex128) for x in system))
    A_bar, _ = discrete_form(wide, step.double())
    return output_row(C.to(torch.complex128)), torch.linalg.matrix_power(A_bar, L)


def _from_row(row: Tensor, like: Tensor) -> Tensor:
    return to_pairs(row / 2).conj().to(like.dtype)


# --- one step at a time ---------------------------------------------------------------------------


class StepForm(NamedTuple):
    """What one step of the recurrence needs; ``O(P)`` work a channel (S4, appendix C.2).

    ``x' = decay x + enter u - first Re(p* x) - second Re(p* v)`` where ``v`` is the sum of the
    terms before it: the bilinear rule's inverse by Woodbury's identity. ``y = 2 Re(C x')``.
    """

    decay: Pairs
    enter: Pairs
    first: Pairs
    second: Pairs
    p: Pairs
    C: Pairs


def step_form(system: Dplr, C: Pairs, step: Steps) -> StepForm:
    """The coefficients of `dplr_step`."""
    poles, p, B = system
    step = step[..., None]
    solved = 1 / (1 - step / 2 * poles)
    inner = 1 + step * (p.abs().square() * solved).real.sum(-1, keepdim=True)
    first = step * solved * p
    decay = solved * (1 + step / 2 * poles)
    return StepForm(decay, step * solved * B, first, first / inner, p, C)


def dplr_step(
    form: StepForm, x: Complex[Tensor, "B C P"], u: Float[Tensor, "B C"]
) -> tuple[Complex[Tensor, "B C P"], Float[Tensor, "B C"]]:
    """One input in, the next state and the output out."""
    p = form.p.conj()
    v = form.decay * x + form.enter * u[..., None] - form.first * _real_sum(p, x)
    x = v - form.second * _real_sum(p, v)
    return x, 2 * _real_sum(form.C, x)[..., 0]


def _real_sum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).real.sum(-1, keepdim=True)
