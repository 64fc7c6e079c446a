"""Keys rebuilt from a low-rank factor: gather, multiply, rotate, without a trip to memory between.

    out[b, g, j] = RoPE(left[b, positions[b, g, j]] @ right[b, g], positions[b, g, j])

ShadowKV (arXiv 2410.21465) keeps unrotated keys as two thin factors and rebuilds those that a step
selects. A program makes a block of keys of one head: it loads the listed rows of ``left``, a slice
of the rank at a time, and multiplies them with the two halves of ``right``'s channels, which RoPE
then turns into each other (pairs ``n, n + D / 2``). The intermediate, unrotated keys, stay in
registers.

Angles need no table. A frequency is a whole number of ``2 ** -48`` turns a position; position
times frequency, modulo a turn, is exact in integers, and the sine of what is left is a polynomial
(`_sine`). In float32 the angle of position 100,000 would be off by 0.004 radians.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from corelib.kernels._flash_launch import with_contiguous_rows
from corelib.kernels._shared import (
    check_device,
    is_interpreted,
    jit,
    padded,
    precision,
    tl,
)
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["low_rank_bytes", "low_rank_keys"]

TURN = 1 << 48  # the unit of angles: this many make a turn
#: Keys of a block, columns of the factor at a time, warps, stages.
BLOCK_N, BLOCK_R, WARPS, STAGES = 32, 32, 4, 3


@jit
def _sine(phase):
    """The sine of ``phase`` in 2 ** -48 turns, to 1e-7.

    Wrapped to half a turn either way and folded to a quarter, then the Taylor series to x ** 11.
    """
    wrapped = ((phase + 140737488355328) & 281474976710655) - 140737488355328
    turns = wrapped.to(tl.float32) * 3.552713678800501e-15
    folded = tl.where(turns > 0.25, 0.5 - turns, tl.where(turns < -0.25, -0.5 - turns, turns))
    x = folded * 6.283185307179586
    y = x * x
    series = 1.0 - y * (1.0 / 72.0) * (1.0 - y * (1.0 / 110.0))
    series = 1.0 - y * (1.0 / 42.0) * series
    series = 1.0 - y * (1.0 / 20.0) * series
    return x * (1.0 - y * (1.0 / 6.0) * series)


@jit
def _low_rank_keys_kernel(
    left, right, positions, turns, out, stride_lb, stride_ls, stride_rb, stride_rg, stride_rr,
    stride_pb, stride_pg, G, S, R, n, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program ``(request and head, block)``: keys ``block * BLOCK_N ..`` of the head's list."""
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, group = pair // G, pair % G
    entries = block * BLOCK_N + tl.arange(0, BLOCK_N)
    places = positions + request * stride_pb + group * stride_pg + entries
    listed = tl.load(places, mask=entries < n, other=-1).to(tl.int64)
    exists = (listed >= 0) & (listed < S)
    rows = left + request * stride_lb + listed[:, None] * stride_ls
    factor = right + request * stride_rb + group * stride_rg
    columns = tl.arange(0, BLOCK_P)
    turned = columns < PAIRS
    first = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for at in range(0, R, BLOCK_R):
        ranks = at + tl.arange(0, BLOCK_R)
        inside = exists[:, None] & (ranks < R)[None, :]
        some = tl.load(rows + ranks[None, :], mask=inside, other=0.0)
        inside = (ranks < R)[:, None] & turned[None, :]
        half = factor + ranks[:, None] * stride_rr + columns[None, :]
        some_first = tl.load(half, mask=inside, other=0.0)
        some_second = tl.load(half + PAIRS, mask=inside, other=0.0)
        first = tl.dot(some, some_first, first, input_precision=PRECISION)
        second = tl.dot(some, some_second, second, input_precision=PRECISION)
    frequency = tl.load(turns + columns, mask=turned, other=0)
    phase = listed[:, None] * frequency[None, :]
    sine, cosine = _sine(phase), _sine(phase + 70368744177664)  # a quarter turn on
    keys = out + pair * n * (2 * PAIRS) + entries[:, None] * (2 * PAIRS) + columns[None, :]
    written = (entries < n)[:, None] & turned[None, :]
    kind = out.dtype.element_ty
    tl.store(keys, (first * cosine - second * sine).to(kind), mask=written)
    tl.store(keys + PAIRS, (second * cosine + first * sine).to(kind), mask=written)


def low_rank_keys(left: Tensor, right: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotated keys ``(B, G, n, D)`` of the listed tokens.

    Args:
        left: ``(B, S, R)``, for all heads.
        right: ``(B, G, R, D)``.
        positions: ``(B, G, n)`` integers: tokens, and where they stood. Below 0 (and from ``S`` on)
            is padding and gives zeros.
        frequencies: ``(D / 2,)`` radians per position, any device.

    Not differentiable.
    """
    _check(left, right, positions, frequencies)
    check_device("low_rank_keys", _low_rank_keys_kernel, left, right)
    (B, S, R), (_, G, _, D), n = left.shape, right.shape, positions.shape[2]
    out = left.new_empty(B, G, n, D)
    if 0 in (B, S, R, n):
        return out.zero_()
    left, right, positions = with_contiguous_rows(left, right, positions)
    turns = (frequencies.to("cpu", torch.float64) / (2 * math.pi) * TURN).round().to(torch.int64)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    options = {} if is_interpreted(_low_rank_keys_kernel) else options
    with torch.cuda.device(left.device) if left.is_cuda else nullcontext():
        _low_rank_keys_kernel[(B * G, -(-n // BLOCK_N))](
            left, right, positions, turns.to(left.device), out, *left.stride()[:2],
            *right.stride()[:3], *positions.stride()[:2], G, S, R, n, PAIRS=D // 2,
            BLOCK_P=padded(D // 2), BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
            PRECISION=precision(left.dtype), **options,
        )  # fmt: skip
    return out


def _check(left: Tensor, right: Tensor, positions: Tensor, frequencies: Tensor) -> None:
    for name, x, axes in (("left", left, "(B, S, R)"), ("right", right, "(B, G, R, D)")):
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != left.dtype:
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.dim() != axes.count(",") + 1:
            raise ValueError(f"{name}: expected {axes}, got {tuple(x.shape)}")
    (B, _, R), (_, G, _, D) = left.shape, right.shape
    if right.shape[0] != B or right.shape[2] != R:
        raise ValueError(f"right: expected ({B}, G, {R}, D), got {tuple(right.shape)}")
    if D % 2 or not 2 <= D <= 256:
        raise ValueError(f"right: expected an even width of 2 to 256, got {D}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
    if positions.dim() != 3 or positions.shape[:2] != (B, G):
        raise ValueError(f"positions: expected ({B}, {G}, n), got {tuple(positions.shape)}")
    if frequencies.shape != (D // 2,):
        raise ValueError(f"frequencies: expected ({D // 2},), got {tuple(frequencies.shape)}")
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        raise ValueError("left, right: the kernel has no backward pass; call it under no_grad()")


def low_rank_bytes(
    listed: int, B: int, G: int, n: int, R: int, D: int, *, itemsize: int = 2, index_size: int = 8
) -> int:
    """Bytes that the kernel moves for lists of ``n`` with ``listed`` tokens in all of them.

    Each listed row of ``left`` once, each key once; ``right`` and the frequencies once a block.
    """
    blocks = B * G * -(-n // BLOCK_N)
    a_block = R * D * itemsize + D // 2 * 8
    return listed * R * itemsize + B * G * n * (D * itemsize + index_size) + blocks * a_block


def _specialisation(dtype: str, width: int) -> Specialisation:
    strides = [f"stride_{name}" for name in ("lb", "ls", "rb", "rg", "rr", "pb", "pg")]
    signature = dict.fromkeys(("left", "right", "out"), f"*{dtype}")
    signature |= dict.fromkeys(("positions", "turns"), "*i64")
    signature |= dict.fromkeys([*strides, "G", "S", "R", "n"], "i32")
    constexprs = {
        "PAIRS": width // 2, "BLOCK_P": padded(width // 2), "BLOCK_N": BLOCK_N, "BLOCK_R": BLOCK_R,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    return Specialisation(
        kernel="_low_rank_keys_kernel",
        label=f"{dtype} D={width}",
        direction="forward",
        signature=signature,
        constexprs=constexprs,
        num_warps=WARPS,
        num_stages=STAGES,
        divisible=tuple(strides[:5]) + ("R",),
        overrides={"gfx942": {"num_stages": STAGES - 1, "constexprs": {"PRECISION": "ieee"}}},
    )


SPECIALISATIONS = [_specialisation(*kind) for kind in (("fp16", 64), ("bf16", 128), ("fp32", 128))]
