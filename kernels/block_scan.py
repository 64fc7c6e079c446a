"""A first-order scan of pairs of channels: 2 x 2 matrices, resets, both directions.

    h_t = A_t h_{t-1} + x_t                    (``reverse``: h_t = A_t h_{t+1} + x_t)

The walk is that of `corelib.kernels.diagonal_scan`: a program owns a batch row and a block of
channels, loads a block of steps once, and scans it in registers. It is a kernel of its own because
a step composes six numbers with six, twelve products where the diagonal has two: other tiles fit.

Backward is the same walk from the other end over transposed matrices: the gradient of ``x`` is
``g_t = dh_t + A_{t+1}^T g_{t+1}``, that of ``A`` is ``g_t h_{t-1}^T``, written in the same pass.
Nothing but the inputs and the states is kept for it.

In the inputs' own precision, float32 or float64. No ``tl.dot``: the matrices are too small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, jit, tl
from corelib.kernels.gates.specialisation import Specialisation
from corelib.kernels.newton_rnn import Tile, compose_pairs, launch

__all__ = ["backward_bytes", "block_scan", "forward_bytes"]

FORWARD, BACKWARD = Tile(16, 8, 1), Tile(16, 8, 2)


@jit
def _load_block(pointer, at, exists, keep, RESET: tl.constexpr):
    """Four entries, row by row; zeros where nothing is kept."""
    if RESET:
        exists = exists & keep
    a00 = tl.load(pointer + at, mask=exists, other=0.0)
    a01 = tl.load(pointer + at + 1, mask=exists, other=0.0)
    a10 = tl.load(pointer + at + 2, mask=exists, other=0.0)
    return a00, a01, a10, tl.load(pointer + at + 3, mask=exists, other=0.0)


@jit
def _load_pair(pointer, at, exists):
    one = tl.load(pointer + at, mask=exists, other=0.0)
    return one, tl.load(pointer + at + 1, mask=exists, other=0.0)


@jit
def _scan_forward(
    blocks, x, reset, state, out, L, C, RESET: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    h0, h1 = _load_pair(state, 2 * (row * C + channels), real)
    last = (steps == BLOCK_T - 1)[:, None]
    for first in range(0, L, BLOCK_T):
        walk = first + steps
        time = L - 1 - walk if REVERSE else walk
        exists = (walk < L)[:, None] & real[None, :]
        at = (row * L + time[:, None]) * C + channels[None, :]
        keep = exists
        if RESET:
            keep = tl.load(reset + row * L + time, mask=walk < L, other=0)[:, None] == 0
        a00, a01, a10, a11 = _load_block(blocks, 4 * at, exists, keep, RESET)
        x0, x1 = _load_pair(x, 2 * at, exists)
        a00, a01, a10, a11, x0, x1 = tl.associative_scan(
            (a00, a01, a10, a11, x0, x1), 0, compose_pairs
        )
        x0 += a00 * h0[None, :] + a01 * h1[None, :]
        x1 += a10 * h0[None, :] + a11 * h1[None, :]
        tl.store(out + 2 * at, x0, mask=exists)
        tl.store(out + 2 * at + 1, x1, mask=exists)
        h0, h1 = tl.sum(tl.where(last, x0, 0.0), 0), tl.sum(tl.where(last, x1, 0.0), 0)


@jit
def _scan_backward(
    d_out, blocks, reset, state, out, d_blocks, d_x, L, C, RESET: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    begin0, begin1 = _load_pair(state, 2 * (row * C + channels), real)
    carried0 = tl.zeros([BLOCK_C], begin0.dtype)
    carried1 = tl.zeros([BLOCK_C], begin0.dtype)
    last = (steps == BLOCK_T - 1)[:, None]
    for first in range(0, L, BLOCK_T):
        walk = L - 1 - first - steps  # from the last step of the forward walk to the first
        inside = (walk >= 0)[:, None] & real[None, :]
        # the matrix of the step behind, through which this state acts on it; of none at the end
        follows = (walk >= 0) & (walk < L - 1)
        behind = L - 2 - walk if REVERSE else walk + 1
        time = L - 1 - walk if REVERSE else walk
        keep, keep_here = inside, inside
        if RESET:
            keep = tl.load(reset + row * L + behind, mask=follows, other=1)[:, None] == 0
            keep_here = tl.load(reset + row * L + time, mask=walk >= 0, other=1)[:, None] == 0
        at = (row * L + behind[:, None]) * C + channels[None, :]
        exists = follows[:, None] & real[None, :]
        a00, a01, a10, a11 = _load_block(blocks, 4 * at, exists, keep, RESET)
        at = (row * L + time[:, None]) * C + channels[None, :]
        g0, g1 = _load_pair(d_out, 2 * at, inside)
        a00, a10, a01, a11, g0, g1 = tl.associative_scan(  # of the transposed matrices
            (a00, a10, a01, a11, g0, g1), 0, compose_pairs
        )
        g0 += a00 * carried0[None, :] + a10 * carried1[None, :]
        g1 += a01 * carried0[None, :] + a11 * carried1[None, :]
        carried0 = tl.sum(tl.where(last, g0, 0.0), 0)
        carried1 = tl.sum(tl.where(last, g1, 0.0), 0)
        tl.store(d_x + 2 * at, g0, mask=inside)
        tl.store(d_x + 2 * at + 1, g1, mask=inside)
        earlier = at + C if REVERSE else at - C
        h0, h1 = _load_pair(out, 2 * earlier, inside & (walk > 0)[:, None])
        is_first = (walk == 0)[:, None]
        h0 = tl.where(is_first, begin0[None, :], h0)
        h1 = tl.where(is_first, begin1[None, :], h1)
        if RESET:
            h0, h1 = tl.where(keep_here, h0, 0.0), tl.where(keep_here, h1, 0.0)
        tl.store(d_blocks + 4 * at, g0 * h0, mask=inside)
        tl.store(d_blocks + 4 * at + 1, g0 * h1, mask=inside)
        tl.store(d_blocks + 4 * at + 2, g1 * h0, mask=inside)
        tl.store(d_blocks + 4 * at + 3, g1 * h1, mask=inside)


def block_scan(
    blocks: Tensor,
    x: Tensor,
    *,
    reset: Tensor | None = None,
    state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """All states of ``h_t = blocks_t @ h_{t-1} + x_t``, ``(B, L, C, 2)``.

    Args:
        blocks: ``(B, L, C, 2, 2)``. x: ``(B, L, C, 2)``, float32 or float64, as all others.
        reset: ``(B, L)`` booleans, where the past is forgotten before ``x_t`` is added.
        state: ``(B, C, 2)``, before the first step (with ``reverse``: behind the last); None is
            zero.
        reverse: from the last step to the first.

    Differentiable once in ``blocks``, ``x`` and ``state``. Raises ValueError or TypeError for
    shapes, dtypes or devices that do not fit, ImportError where Triton is missing.
    """
    check_device("block_scan", _scan_forward, blocks, x)
    if x.dim() != 4 or x.shape[3] != 2:
        raise ValueError(f"x: expected (B, L, C, 2), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    B, L, C, _ = x.shape
    state = x.new_zeros(B, C, 2) if state is None else state
    for name, y, shape in (("blocks", blocks, (B, L, C, 2, 2)), ("state", state, (B, C, 2))):
        if tuple(y.shape) != shape or y.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected {shape} in {x.dtype}, got {tuple(y.shape)} in {y.dtype}"
            )
    if reset is not None and (reset.shape != (B, L) or reset.dtype != torch.bool):
        raise ValueError(f"reset: expected booleans {(B, L)}, got {tuple(reset.shape)}")
    return _Scan.apply(*(y.contiguous() for y in (blocks, x, state)), reset, reverse)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, x, state, reset, reverse):
        B, L, C, _ = x.shape
        flags = state if reset is None else reset.to(torch.int8).contiguous()
        out, ctx.options = torch.empty_like(x), dict(RESET=reset is not None, REVERSE=reverse)
        ctx.save_for_backward(blocks, state, flags, out)
        if out.numel():
            launch(_scan_forward, FORWARD, B, C, blocks, x, flags, state, out, L, C, **ctx.options)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        blocks, state, flags, out = ctx.saved_tensors
        B, L, C, _ = out.shape
        d_blocks, d_x = torch.empty_like(blocks), torch.empty_like(out)
        if not out.numel():
            return d_blocks, d_x, torch.zeros_like(state), None, None
        launch(
            _scan_backward, BACKWARD, B, C,
            d_out.contiguous(), blocks, flags, state, out, d_blocks, d_x, L, C, **ctx.options,
        )  # fmt: skip
        first = L - 1 if ctx.options["REVERSE"] else 0
        d_state = (blocks[:, first] * d_x[:, first, :, :, None]).sum(2)
        if ctx.options["RESET"]:
            d_state = d_state.masked_fill(flags[:, first, None, None] != 0, 0)
        return d_blocks, d_x, d_state, None, None


def forward_bytes(B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that the forward pass moves: matrices, inputs and states once, and the first state."""
    return itemsize * B * C * (8 * L + 2)


def backward_bytes(B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: gradients in, matrices and states but one of each, both
    gradients out, and the first state."""
    return itemsize * B * C * (8 * L + 6 * (L - 1) + 2)


def _specialisation(kernel: str, dtype: str, reset: bool) -> Specialisation:
    forward = kernel == "_scan_forward"
    names = ["blocks", "state", "out"]
    names += ["x"] if forward else ["d_out", "d_blocks", "d_x"]
    tile = FORWARD if forward else BACKWARD
    return Specialisation(
        kernel=kernel,
        label=f"{dtype}{' reset reversed' * reset}",
        direction="forward" if forward else "backward",
        signature=dict.fromkeys(names, f"*{dtype}")
        | {"reset": "*i8" if reset else f"*{dtype}"}
        | dict.fromkeys(("L", "C"), "i32"),
        constexprs={
            "RESET": reset, "REVERSE": reset, "BLOCK_T": tile.block_t, "BLOCK_C": tile.block_c,
        },
        num_warps=tile.num_warps,
    )  # fmt: skip


SPECIALISATIONS = [
    _specialisation(kernel, *which)
    for kernel in ("_scan_forward", "_scan_backward")
    for which in (("fp32", False), ("fp32", True), ("fp64", True))
]
