"""Second-order Taylor features in one pass over memory, forward and backward.

    features = [1, r x_i, r^2 w x_i x_j]           r = sqrt(scale)

The feature map of Based and JRT-RNN (arXiv 2407.05483): all pairs with ``w = 1 / sqrt(2)``, or, as
``symmetric``, the pairs ``i <= j`` with ``w = 1`` off the diagonal (the dot products are the same).
In PyTorch the pairs are a product, a copy into their place and a change of type, each through
memory; here a program reads some rows, forms their pairs in registers and writes every column once.

Backward, with ``T[i, j] = r^2 w d_features[i, j]`` (0 for a pair that has no column),

    d_x_i = r d_features[i] + sum_j T[i, j] x_j + sum_j T[j, i] x_j

reads the gradient once. Computed in float32, whatever the inputs' type.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["WIDEST", "feature_bytes", "symmetric_taylor_features", "taylor_features"]

WIDEST = 32
PAIRS, WARPS = 4096, 4  # pairs that a program holds at once


@jit
def _pairs(D: tl.constexpr, PADDED: tl.constexpr, SYMMETRIC: tl.constexpr):
    """``(1, PADDED, PADDED)``: the column of each pair, its weight, and whether it has any."""
    i = tl.arange(0, PADDED)[None, :, None]
    j = tl.arange(0, PADDED)[None, None, :]
    if SYMMETRIC:
        column = 1 + D + i * D - i * (i + 1) // 2 + j
        weight = tl.where(i == j, 0.7071067811865476, 1.0)
        exists = (i <= j) & (j < D)
    else:
        column = 1 + D + i * D + j
        weight = 0.7071067811865476
        exists = (i < D) & (j < D)
    return column, weight, exists


@jit
def _features_forward(
    x, out, scale, N, F, D: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """``out (N, F)`` of ``x (N, D)``; a program makes ``ROWS`` rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = first + rows < N
    inside = real[:, None] & (columns < D)[None, :]
    value = tl.load(x + first * D + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32) * tl.sqrt(scale)
    kind = out.dtype.element_ty
    start = out + first * F
    tl.store(start + rows * F, tl.full([ROWS], 1.0, kind), mask=real)
    tl.store(start + rows[:, None] * F + 1 + columns[None, :], value.to(kind), mask=inside)
    place, weight, exists = _pairs(D, PADDED, SYMMETRIC)
    pairs = value[:, :, None] * value[:, None, :] * weight
    there = start + rows[:, None, None] * F + place
    tl.store(there, pairs.to(kind), mask=real[:, None, None] & exists)


@jit
def _features_backward(
    x, d_out, d_x, scale, N, F, D: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """``d_x (N, D)`` of ``d_out (N, F)``."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = first + rows < N
    inside = real[:, None] & (columns < D)[None, :]
    at = first * D + rows[:, None] * D + columns[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    start = d_out + first * F
    linear = tl.load(start + rows[:, None] * F + 1 + columns[None, :], mask=inside, other=0.0)
    place, weight, exists = _pairs(D, PADDED, SYMMETRIC)
    there = start + rows[:, None, None] * F + place
    pairs = tl.load(there, mask=real[:, None, None] & exists, other=0.0).to(tl.float32)
    pairs *= weight * scale
    total = linear.to(tl.float32) * tl.sqrt(scale)
    total += tl.sum(pairs * value[:, None, :], 2) + tl.sum(pairs * value[:, :, None], 1)
    tl.store(d_x + at, total.to(d_x.dtype.element_ty), mask=inside)


def taylor_features(x: Tensor, *, scale: float | None = None) -> Tensor:
    """``(..., 1 + D + D^2)`` of ``x (..., D)``; column ``1 + D + D i + j`` is the pair ``i, j``.

    Args:
        x: float16, bfloat16 or float32, up to 32 wide.
        scale: of the scores, greater than 0; ``D ** -0.5`` if None.

    Differentiable once. Raises ValueError or TypeError for what does not fit, ImportError where
    Triton is missing.
    """
    return _features(x, scale, False)


def symmetric_taylor_features(x: Tensor, *, scale: float | None = None) -> Tensor:
    """``(..., 1 + D + D (D + 1) / 2)``: the pairs ``i <= j``, row by row of the upper triangle.

    Arguments and errors as `taylor_features`.
    """
    return _features(x, scale, True)


def _features(x: Tensor, scale: float | None, symmetric: bool) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}")
    if x.dim() == 0 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"x: expected a last axis of 1 to {WIDEST}, got {tuple(x.shape)}")
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number greater than 0, got {scale}")
    check_device("taylor_features", _features_forward, x)
    out = _Features.apply(x.reshape(-1, x.shape[-1]).contiguous(), float(scale), symmetric)
    return out.view(*x.shape[:-1], out.shape[1])


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, symmetric):
        ctx.save_for_backward(x)
        ctx.options = scale, symmetric
        out = x.new_empty(len(x), width(x.shape[1], symmetric))
        _launch(_features_forward, x, (x, out), scale, symmetric)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _launch(_features_backward, x, (x, d_out.contiguous(), d_x), *ctx.options)
        return d_x, None, None


def _launch(kernel, x: Tensor, tensors: tuple[Tensor, ...], scale: float, symmetric: bool) -> None:
    N, D = x.shape
    rows, side = tile(D)
    options = {} if is_interpreted(kernel) else {"num_warps": WARPS}
    if N:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            kernel[(-(-N // rows),)](
                *tensors, scale, N, width(D, symmetric), D=D, SYMMETRIC=symmetric, ROWS=rows,
                PADDED=side, **options,
            )  # fmt: skip


def tile(D: int) -> tuple[int, int]:
    """Rows of a program, and the power of two that columns are padded to."""
    side = max(2, 1 << (D - 1).bit_length())
    return min(64, PAIRS // side**2), side


def width(D: int, symmetric: bool) -> int:
    """Columns of the features."""
    return 1 + D + (D * (D + 1) // 2 if symmetric else D * D)


def feature_bytes(N: int, D: int, *, symmetric: bool, itemsize: int = 2) -> tuple[int, int]:
    """Bytes that the two passes move: inputs and features once, which is the least there is; back,
    inputs, gradients in (but for the constant column's) and out."""
    F = width(D, symmetric)
    return N * (D + F) * itemsize, N * (2 * D + F - 1) * itemsize


def _specialisation(kernel: str, kind: str, D: int, symmetric: bool) -> Specialisation:
    rows, side = tile(D)
    forward = kernel == "_features_forward"
    names = ("x", "out") if forward else ("x", "d_out", "d_x")
    return Specialisation(
        kernel=kernel,
        label=f"{kind} D={D}{' symmetric' * symmetric}",
        direction="forward" if forward else "backward",
        signature=dict.fromkeys(names, f"*{kind}") | {"scale": "fp32", "N": "i32", "F": "i32"},
        constexprs=dict(D=D, SYMMETRIC=symmetric, ROWS=rows, PADDED=side),
        num_warps=WARPS,
    )


SPECIALISATIONS = [
    _specialisation(kernel, *which)
    for kernel in ("_features_forward", "_features_backward")
    for which in (("fp16", 16, False), ("fp32", 16, True), ("bf16", 32, True))
]
