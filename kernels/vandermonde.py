"""Vandermonde sums over conjugate pairs of poles, forward and backward.

    out[c, t] = 2 Re sum_n weights[c, n] exp(rates[c, n] t)

The convolution kernel of a diagonal state space model (S4D, arXiv 2206.11893, section 3.3; S4-PTD,
arXiv 2310.01698) as a product with a matrix of ``P L`` powers a channel, none of which is written:

* forward, program ``(channel, block of taps)``: walks over the poles;
* backward, program ``(channel, block of poles)``: walks over the taps, makes the powers again, and
  keeps partial sums in every lane until the end:

    d_weights = 2 sum_t g[t] exp(rate t)*        d_rates = 2 weights* sum_t g[t] t exp(rate t)*

The angle ``imag(rate) t`` reaches thousands of radians, where float32 has hardly a digit left of
the place on the circle. So the turns a step are kept as a 64-bit integer, 2**64 being once around:
``turns * t`` then wraps around by itself, exactly, and its upper bits are the place. Of that, a
quarter turn at most goes into two short series for sine and cosine.

In the inputs' own precision, float32 or float64. No ``tl.dot``: one row of weights a channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["backward_bytes", "forward_bytes", "vandermonde_sums"]


class Tile(NamedTuple):
    """Poles and taps at a time, terms of the series, and warps."""

    block_p: int
    block_t: int
    terms: int
    num_warps: int


FORWARD = {torch.float32: Tile(1, 256, 5, 4), torch.float64: Tile(1, 128, 9, 4)}
BACKWARD = {torch.float32: Tile(8, 64, 5, 4), torch.float64: Tile(4, 64, 9, 4)}


@jit
def _power(growth, turns, t, TERMS: tl.constexpr):
    """``exp(rate t)`` for whole numbers ``t``: real and imaginary part, in ``growth``'s type."""
    place = turns * t.to(tl.int64)  # wraps around, as angles do
    quarter = (place + (1 << 61)) >> 62  # the nearest of the quarter turns -2 .. 1
    rest = place - (quarter << 62)  # an eighth of a turn at most, either way
    angle = rest.to(growth.dtype) * 3.4061215800865545e-19  # 2 pi / 2**64
    square = angle * angle
    sine, cosine = square * 0.0 + 1.0, square * 0.0 + 1.0
    for back in tl.static_range(TERMS):
        # a name for 2 (TERMS - back) would make it a tensor, and the quotients float32
        cosine = 1.0 - square * cosine * (0.5 / ((TERMS - back) * (2 * (TERMS - back) - 1)))
        sine = 1.0 - square * sine * (0.5 / ((TERMS - back) * (2 * (TERMS - back) + 1)))
    sine = sine * angle
    swapped, negative_real, negative_imag = quarter & 1, (quarter + 1) & 2, quarter & 2
    real, imag = tl.where(swapped != 0, sine, cosine), tl.where(swapped != 0, cosine, sine)
    size = tl.exp(growth * t.to(growth.dtype))
    real = tl.where(negative_real != 0, -real, real) * size
    return real, tl.where(negative_imag != 0, -imag, imag) * size


@jit
def _vandermonde_forward(
    weights, growth, turns, out, P, L, BLOCK_T: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T], growth.dtype.element_ty)
    for n in range(0, P):
        pole = channel * P + n
        real, imag = _power(tl.load(growth + pole), tl.load(turns + pole), t, TERMS)
        total += tl.load(weights + 2 * pole) * real - tl.load(weights + 2 * pole + 1) * imag
    tl.store(out + channel * L + t, 2.0 * total, mask=t < L)


@jit
def _vandermonde_backward(
    d_out, weights, growth, turns, d_weights, d_rates, P, L,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    lanes = tl.arange(0, BLOCK_T)
    exists = which < P
    pole = channel * P + which
    rate = tl.load(growth + pole, mask=exists, other=0.0)[:, None]
    turn = tl.load(turns + pole, mask=exists, other=0)[:, None]
    sum_real = tl.zeros([BLOCK_P, BLOCK_T], growth.dtype.element_ty)
    sum_imag = tl.zeros([BLOCK_P, BLOCK_T], growth.dtype.element_ty)
    times_real = tl.zeros([BLOCK_P, BLOCK_T], growth.dtype.element_ty)
    times_imag = tl.zeros([BLOCK_P, BLOCK_T], growth.dtype.element_ty)
    for first in range(0, L, BLOCK_T):
        t = first + lanes
        g = tl.load(d_out + channel * L + t, mask=t < L, other=0.0)[None, :]
        # past the end a growing power may overflow, and inf * 0 is no number
        real, imag = _power(rate, turn, tl.minimum(t, L - 1)[None, :], TERMS)
        weighed = g * t[None, :].to(g.dtype)
        sum_real += g * real
        sum_imag -= g * imag
        times_real += weighed * real
        times_imag -= weighed * imag
    w = 2.0 * tl.load(weights + 2 * pole, mask=exists, other=0.0)
    w_imag = 2.0 * tl.load(weights + 2 * pole + 1, mask=exists, other=0.0)
    real, imag = tl.sum(times_real, 1), tl.sum(times_imag, 1)
    tl.store(d_weights + 2 * pole, 2.0 * tl.sum(sum_real, 1), mask=exists)
    tl.store(d_weights + 2 * pole + 1, 2.0 * tl.sum(sum_imag, 1), mask=exists)
    tl.store(d_rates + 2 * pole, w * real + w_imag * imag, mask=exists)
    tl.store(d_rates + 2 * pole + 1, w * imag - w_imag * real, mask=exists)


def vandermonde_sums(weights: Tensor, rates: Tensor, L: int) -> Tensor:
    """``2 Re sum_n weights[c, n] exp(rates[c, n] t)`` for ``t = 0 .. L - 1``, as ``(C, L)``.

    Args:
        weights: ``(C, P)``, complex64 or complex128.
        rates: ``(C, P)``, of the same dtype; their real parts at most 0 for a bounded result.
        L: taps.

    Differentiable once. Raises ValueError or TypeError for shapes, dtypes or devices that do not
    fit, ImportError where Triton is missing.
    """
    check_device("vandermonde_sums", _vandermonde_forward, weights, rates)
    if weights.dim() != 2 or weights.shape != rates.shape:
        raise ValueError(
            f"weights: expected (C, P) with the (C, P) of rates, {tuple(rates.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    for name, x in (("weights", weights), ("rates", rates)):
        if x.dtype not in (torch.complex64, torch.complex128) or x.dtype != weights.dtype:
            raise TypeError(f"{name}: expected complex64 or complex128 for both, got {x.dtype}")
    if isinstance(L, bool) or not isinstance(L, int) or L < 0:
        raise ValueError(f"L: expected an int, at least 0, got {L!r}")
    return _VandermondeSums.apply(weights, rates, L)


class _VandermondeSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, rates, L):
        C, P = weights.shape
        growth = rates.real.contiguous()
        given = (torch.view_as_real(weights.resolve_conj().contiguous()), growth, _turns(rates))
        ctx.save_for_backward(*given)
        out = torch.empty((C, L), dtype=growth.dtype, device=growth.device)
        tile = FORWARD[growth.dtype]
        if out.numel():
            _launch(
                _vandermonde_forward, (C, -(-L // tile.block_t)), tile,
                *given, out, P, L, BLOCK_T=tile.block_t, TERMS=tile.terms,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        weights, growth, turns = ctx.saved_tensors
        (C, P), L = growth.shape, d_out.shape[1]
        d_weights, d_rates = torch.empty_like(weights), torch.empty_like(weights)
        tile = BACKWARD[growth.dtype]
        if growth.numel():
            _launch(
                _vandermonde_backward, (C, -(-P // tile.block_p)), tile,
                d_out.contiguous(), weights, growth, turns, d_weights, d_rates, P, L,
                BLOCK_P=tile.block_p, BLOCK_T=tile.block_t, TERMS=tile.terms,
            )  # fmt: skip
        return torch.view_as_complex(d_weights), torch.view_as_complex(d_rates), None


def _turns(rates: Tensor) -> Tensor:
    """Turns a step, as integers of which 2**64 are once around; from -1/2 to 1/2 turn."""
    turns = rates.imag.double() / (2 * math.pi)
    turns = turns - turns.round()
    # 2**63 itself would overflow; half a turn less 2**-54 is as good
    return (turns * 2.0**64).clamp(-(2.0**63), 2.0**63 - 1024).to(torch.int64).contiguous()


def _launch(kernel, grid: tuple[int, int], tile: Tile, *arguments, **constants) -> None:
    options = {} if is_interpreted(kernel) else {"num_warps": tile.num_warps}
    kernel[grid](*arguments, **constants, **options)


def forward_bytes(C: int, P: int, L: int, *, itemsize: int = 4) -> int:
    """Bytes that the forward pass moves: every tap once, and for each block of taps all the
    channel's weights and rates, of which the turns are 8 bytes each."""
    tile = FORWARD[torch.float32 if itemsize == 4 else torch.float64]
    return C * (itemsize * L + -(-L // tile.block_t) * P * (3 * itemsize + 8))


def backward_bytes(C: int, P: int, L: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: each block of poles reads the channel's gradients once;
    weights and rates are read once and their gradients written once."""
    tile = BACKWARD[torch.float32 if itemsize == 4 else torch.float64]
    return C * (itemsize * L * -(-P // tile.block_p) + P * (7 * itemsize + 8))


def _specialisation(kernel: str, dtype: torch.dtype) -> Specialisation:
    kind = {torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    forward = kernel == "_vandermonde_forward"
    names = ["weights", "growth", *(["out"] if forward else ["d_out", "d_weights", "d_rates"])]
    tile = (FORWARD if forward else BACKWARD)[dtype]
    constants = {"BLOCK_T": tile.block_t, "TERMS": tile.terms}
    return Specialisation(
        kernel=kernel,
        label=kind,
        direction="forward" if forward else "backward",
        signature=dict.fromkeys(names, f"*{kind}") | {"turns": "*i64", "P": "i32", "L": "i32"},
        constexprs=constants if forward else constants | {"BLOCK_P": tile.block_p},
        num_warps=tile.num_warps,
    )


SPECIALISATIONS = [
    _specialisation(kernel, dtype)
    for kernel in ("_vandermonde_forward", "_vandermonde_backward")
    for dtype in FORWARD
]
