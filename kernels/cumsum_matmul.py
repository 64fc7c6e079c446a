"""A running sum as products with a triangle of ones, block by block.

    y_t = x_0 + ... + x_t                y[block] = T @ x[block] + carried,  carried = y[last]

for ``x (B, L, C)`` along ``L`` (XAMBA, arXiv 2502.06924, on a GPU's matrix units in the place of an
NPU's). A program owns a batch row and a block of channels and walks over time; within a block of 64
steps the sums are one ``tl.dot`` with a constant triangle that is made in registers, between blocks
a row is carried. Each number is read once and written once.

Backward is the same sum from the other end: ``T`` transposed, an upper triangle, and the walk in
reverse. Products in the inputs' own type, sums in float32; the ones are exact in every type, and
float32 goes as three TF32 products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, precision, tl
from corelib.kernels.gates.specialisation import TARGETS, Specialisation

__all__ = ["cumsum_matmul", "moved_bytes"]

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Tile(NamedTuple):
    """Steps and channels at a time, and warps."""

    block_t: int
    block_c: int
    num_warps: int


TILE = Tile(64, 32, 4)


@jit
def _cumsum(
    x, out, L, C, x_row, x_step, x_channel, out_row, out_step, out_channel, REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps = tl.arange(0, BLOCK_T)
    if REVERSE:
        seen = steps[:, None] <= steps[None, :]
    else:
        seen = steps[:, None] >= steps[None, :]
    triangle = tl.where(seen, 1.0, 0.0).to(x.dtype.element_ty)
    carried = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, L, BLOCK_T):
        if REVERSE:
            time, last = L - BLOCK_T - first + steps, steps == 0
        else:
            time, last = first + steps, steps == BLOCK_T - 1
        exists = ((time >= 0) & (time < L))[:, None] & (channels < C)[None, :]
        time = time.to(tl.int64)[:, None]
        at = row * x_row + time * x_step + channels[None, :] * x_channel
        values = tl.load(x + at, mask=exists, other=0.0)
        sums = tl.dot(triangle, values, input_precision=PRECISION) + carried[None, :]
        at = row * out_row + time * out_step + channels[None, :] * out_channel
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=exists)
        carried = tl.sum(tl.where(last[:, None], sums, 0.0), 0)


def cumsum_matmul(x: Tensor, *, reverse: bool = False) -> Tensor:
    """``x.cumsum(1)`` of ``x (B, L, C)``; with ``reverse``, sums from each step to the end.

    Args:
        x: float16, bfloat16 or float32, of any strides; the result has x's dtype.

    Differentiable. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit,
    ImportError where Triton is missing.
    """
    check_device("cumsum_matmul", _cumsum, x)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, L, C), got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float16, bfloat16 or float32, got {x.dtype}")
    return _CumulativeSum.apply(x, reverse)


class _CumulativeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reverse):
        ctx.reverse, out = reverse, torch.empty_like(x)
        B, L, C = x.shape
        if out.numel():
            options = {} if is_interpreted(_cumsum) else {"num_warps": TILE.num_warps}
            _cumsum[(B, -(-C // TILE.block_c))](
                x, out, L, C, *x.stride(), *out.stride(), REVERSE=reverse, BLOCK_T=TILE.block_t,
                BLOCK_C=TILE.block_c, PRECISION=precision(x.dtype), **options,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, d_out):
        return _CumulativeSum.apply(d_out, not ctx.reverse), None


def moved_bytes(B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that either direction moves: every number in, every sum out."""
    return 2 * itemsize * B * L * C


def _specialisation(dtype: torch.dtype, reverse: bool) -> Specialisation:
    name = _DTYPES[dtype]
    constants = {"BLOCK_T": TILE.block_t, "BLOCK_C": TILE.block_c, "REVERSE": reverse}
    strides = ("x_row", "x_step", "out_row", "out_step")
    return Specialisation(
        kernel="_cumsum",
        label=f"{name} {'upper, from the end' if reverse else 'lower'}",
        direction="backward" if reverse else "forward",
        signature={"x": f"*{name}", "out": f"*{name}"}
        | dict.fromkeys(("L", "C"), "i32")
        | dict.fromkeys(strides, "i64"),
        constexprs=constants
        | {"x_channel": 1, "out_channel": 1, "PRECISION": precision(dtype, "sm_90")},
        num_warps=TILE.num_warps,
        divisible=strides,
        overrides={
            target: {"constexprs": {"PRECISION": precision(dtype, target)}}
            for target in TARGETS
            if target.startswith("gfx")
        },
    )


SPECIALISATIONS = [
    _specialisation(dtype, reverse)
    for dtype in (torch.float32, torch.bfloat16)
    for reverse in (False, True)
]
