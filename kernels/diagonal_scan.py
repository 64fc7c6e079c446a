"""A first-order scan of every channel, real or complex, with resets, in both directions.

    h_t = a_t h_{t-1} + x_t                    (``reverse``: h_t = a_t h_{t+1} + x_t)

A program owns a batch row and a block of channels and walks over time; a block of steps is loaded
once, and an associative scan runs over it in registers. Each number is read once and each state
written once. A complex number is two planes, so that its product is four of real numbers. Where
``reset`` is set, the decay counts as 0.

Backward is the same walk from the other end: ``g_t = dh_t + conj(a_{t+1}) g_{t+1}`` is the gradient
of ``x``, and that of ``a`` is ``g_t conj(h_{t-1})``, written in the same pass. Nothing but the
inputs and the states is kept for it, and nothing is divided.

In the inputs' own precision, float32 or float64. No ``tl.dot``: there is no product of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["backward_bytes", "diagonal_scan", "forward_bytes"]


class Tile(NamedTuple):
    """Steps and channels at a time, and warps."""

    block_t: int
    block_c: int
    num_warps: int


FORWARD, BACKWARD = Tile(32, 16, 2), Tile(32, 16, 2)


@jit
def _compose(a, x, b, y):
    """First ``h -> a h + x``, then ``h -> b h + y``."""
    return b * a, b * x + y


@jit
def _compose_complex(a, a_imag, x, x_imag, b, b_imag, y, y_imag):
    real, imag = b * x - b_imag * x_imag + y, b * x_imag + b_imag * x + y_imag
    return b * a - b_imag * a_imag, b * a_imag + b_imag * a, real, imag


@jit
def _load(pointer, at, exists, other, COMPLEX: tl.constexpr):
    """Real and imaginary part; of real numbers, the number twice (the second is never used)."""
    if COMPLEX:
        real = tl.load(pointer + 2 * at, mask=exists, other=other)
        return real, tl.load(pointer + 2 * at + 1, mask=exists, other=0.0)
    else:
        real = tl.load(pointer + at, mask=exists, other=other)
        return real, real


@jit
def _store(pointer, at, exists, real, imag, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(pointer + 2 * at, real, mask=exists)
        tl.store(pointer + 2 * at + 1, imag, mask=exists)
    else:
        tl.store(pointer + at, real, mask=exists)


@jit
def _advance(a, a_imag, x, x_imag, h, h_imag, COMPLEX: tl.constexpr):
    """All states of a block of steps (its first axis), from the state ``h`` before it."""
    if COMPLEX:
        through, turned, x, x_imag = tl.associative_scan(
            (a, a_imag, x, x_imag), 0, _compose_complex
        )
        real = x + through * h[None, :] - turned * h_imag[None, :]
        return real, x_imag + through * h_imag[None, :] + turned * h[None, :]
    else:
        through, x = tl.associative_scan((a, x), 0, _compose)
        real = x + through * h[None, :]
        return real, real


@jit
def _scan_forward(
    decay, x, reset, state, out, L, C, stride_row, stride_step, COMPLEX: tl.constexpr,
    RESET: tl.constexpr, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    h, h_imag = _load(state, row * C + channels, real, 0.0, COMPLEX)
    for first in range(0, L, BLOCK_T):
        walk = first + steps
        time = L - 1 - walk if REVERSE else walk
        exists = (walk < L)[:, None] & real[None, :]
        # past the end the decay is 1 and the input 0: the last state stays
        at = row * stride_row + time[:, None].to(tl.int64) * stride_step + channels[None, :]
        a, a_imag = _load(decay, at, exists, 1.0, COMPLEX)
        if COMPLEX:
            a_imag = tl.where(exists, a_imag, 0.0)
        if RESET:
            keep = tl.load(reset + row * L + time, mask=walk < L, other=0)[:, None] == 0
            a, a_imag = tl.where(keep, a, 0.0), tl.where(keep, a_imag, 0.0)
        at = (row * L + time[:, None]) * C + channels[None, :]
        fed, fed_imag = _load(x, at, exists, 0.0, COMPLEX)
        all_h, all_imag = _advance(a, a_imag, fed, fed_imag, h, h_imag, COMPLEX)
        _store(out, at, exists, all_h, all_imag, COMPLEX)
        last = (steps == BLOCK_T - 1)[:, None]
        h = tl.sum(tl.where(last, all_h, 0.0), 0)
        h_imag = tl.sum(tl.where(last, all_imag, 0.0), 0)


@jit
def _scan_backward(
    d_out, decay, reset, state, out, d_decay, d_x, L, C, stride_row, stride_step,
    COMPLEX: tl.constexpr, RESET: tl.constexpr, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    begin, begin_imag = _load(state, row * C + channels, real, 0.0, COMPLEX)
    g = tl.zeros([BLOCK_C], begin.dtype)
    g_imag = tl.zeros([BLOCK_C], begin.dtype)
    for first in range(0, L, BLOCK_T):
        walk = L - 1 - first - steps  # from the last step of the forward walk to the first
        inside = (walk >= 0)[:, None] & real[None, :]
        # the decay of the step behind, through which this state acts on it; of none at the end
        behind = L - 2 - walk if REVERSE else walk + 1
        exists = inside & (walk < L - 1)[:, None]
        at = row * stride_row + behind[:, None].to(tl.int64) * stride_step + channels[None, :]
        a, a_imag = _load(decay, at, exists, 0.0, COMPLEX)
        if RESET:
            kept = (walk >= 0) & (walk < L - 1)
            keep = tl.load(reset + row * L + behind, mask=kept, other=0)[:, None] == 0
            a, a_imag = tl.where(keep, a, 0.0), tl.where(keep, a_imag, 0.0)
        time = L - 1 - walk if REVERSE else walk
        at = (row * L + time[:, None]) * C + channels[None, :]
        fed, fed_imag = _load(d_out, at, inside, 0.0, COMPLEX)
        all_g, all_imag = _advance(a, -a_imag, fed, fed_imag, g, g_imag, COMPLEX)
        _store(d_x, at, inside, all_g, all_imag, COMPLEX)
        earlier = at + C if REVERSE else at - C
        h, h_imag = _load(out, earlier, inside & (walk > 0)[:, None], 0.0, COMPLEX)
        is_first = (walk == 0)[:, None]
        h = tl.where(is_first, begin[None, :], h)
        if COMPLEX:
            h_imag = tl.where(is_first, begin_imag[None, :], h_imag)
            d_a, d_a_imag = all_g * h + all_imag * h_imag, all_imag * h - all_g * h_imag
        else:
            d_a, d_a_imag = all_g * h, all_g * h
        if RESET:
            keep = tl.load(reset + row * L + time, mask=walk >= 0, other=1)[:, None] == 0
            d_a, d_a_imag = tl.where(keep, d_a, 0.0), tl.where(keep, d_a_imag, 0.0)
        _store(d_decay, at, inside, d_a, d_a_imag, COMPLEX)
        last = (steps == BLOCK_T - 1)[:, None]
        g = tl.sum(tl.where(last, all_g, 0.0), 0)
        g_imag = tl.sum(tl.where(last, all_imag, 0.0), 0)


def diagonal_scan(
    decay: Tensor,
    x: Tensor,
    *,
    reset: Tensor | None = None,
    state: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """All states of ``h_t = decay_t * h_{t-1} + x_t``, ``(B, L, C)``.

    Args:
        decay: ``(B, L, C)``, or ``(C,)`` for all steps alike; of x's dtype.
        x: ``(B, L, C)``, float32, float64, complex64 or complex128.
        reset: ``(B, L)`` booleans, where the past is forgotten before ``x_t`` is added.
        state: ``(B, C)``, before the first step (with ``reverse``: behind the last); None is zero.
        reverse: from the last step to the first.

    Differentiable once in ``decay``, ``x`` and ``state``. Raises ValueError or TypeError for
    shapes, dtypes or devices that do not fit, ImportError where Triton is missing.
    """
    check_device("diagonal_scan", _scan_forward, decay, x)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, L, C), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise TypeError(f"x: expected single or double precision, got {x.dtype}")
    B, L, C = x.shape
    decay = decay.expand(B, L, C) if decay.shape == (C,) else decay
    state = x.new_zeros(B, C) if state is None else state
    for name, y, shape in (("decay", decay, (B, L, C)), ("state", state, (B, C))):
        if tuple(y.shape) != shape or y.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected {shape} in {x.dtype}, got {tuple(y.shape)} in {y.dtype}"
            )
    if reset is not None and (reset.shape != (B, L) or reset.dtype != torch.bool):
        raise ValueError(f"reset: expected booleans {(B, L)}, got {tuple(reset.shape)}")
    return _Scan.apply(decay, x, state, reset, reverse)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay, x, state, reset, reverse):
        B, L, C = x.shape
        decay = _planes(decay if decay.stride(-1) == 1 else decay.contiguous())
        state = _planes(state.contiguous())
        flags = state if reset is None else reset.to(torch.int8).contiguous()
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        ctx.save_for_backward(decay, state, flags, out)
        ctx.options = x.is_complex(), reset is not None, reverse
        if out.numel():
            _launch(
                _scan_forward, FORWARD, x.is_complex(), decay, _planes(x.contiguous()), flags,
                state, _planes(out), L, C, *_strides(decay, x.is_complex()),
                RESET=reset is not None, REVERSE=reverse,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        decay, state, flags, out = ctx.saved_tensors
        is_complex, has_reset, reverse = ctx.options
        _, L, C = out.shape
        d_decay, d_x = torch.empty_like(out), torch.empty_like(out)
        if not out.numel():
            return d_decay, d_x, torch.zeros_like(d_out[:, :1]).sum(1), None, None
        _launch(
            _scan_backward, BACKWARD, is_complex, _planes(d_out.contiguous()), decay, flags, state,
            _planes(out), _planes(d_decay), _planes(d_x), L, C, *_strides(decay, is_complex),
            RESET=has_reset, REVERSE=reverse,
        )  # fmt: skip
        first = L - 1 if reverse else 0
        a = torch.view_as_complex(decay[:, first].contiguous()) if is_complex else decay[:, first]
        d_state = a.conj() * d_x[:, first]
        if has_reset:
            d_state = d_state.masked_fill(flags[:, first, None] != 0, 0)
        return d_decay, d_x, d_state, None, None


def _planes(x: Tensor) -> Tensor:
    """Complex numbers as real and imaginary parts side by side; real ones as they are."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _strides(decay: Tensor, is_complex: bool) -> tuple[int, int]:
    """Of a batch row and of a step, counted in numbers of their kind."""
    return decay.stride(0) // (1 + is_complex), decay.stride(1) // (1 + is_complex)


def _launch(kernel, tile: Tile, is_complex: bool, *arguments, **constants) -> None:
    options = {} if is_interpreted(kernel) else {"num_warps": tile.num_warps}
    B, C = arguments[0].shape[0], arguments[0].shape[2]
    kernel[(B, -(-C // tile.block_c))](
        *arguments, COMPLEX=is_complex, BLOCK_T=tile.block_t, BLOCK_C=tile.block_c,
        **constants, **options,
    )  # fmt: skip


def forward_bytes(B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that the forward pass moves: decays, inputs and states once, and the first state."""
    return itemsize * (3 * B * L * C + B * C)


def backward_bytes(B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: gradients in, decays and states but one of each, both
    gradients out, and the first state."""
    return itemsize * (3 * B * L * C + 2 * B * (L - 1) * C + B * C)


def _specialisation(kernel: str, kind: str, is_complex: bool, reset: bool) -> Specialisation:
    forward = kernel == "_scan_forward"
    names = ["decay", "state", "out"]
    names += ["x"] if forward else ["d_out", "d_decay", "d_x"]
    tile = FORWARD if forward else BACKWARD
    label = f"{kind}{' complex' * is_complex}{' reset reversed' * reset}"
    return Specialisation(
        kernel=kernel,
        label=label,
        direction="forward" if forward else "backward",
        signature=dict.fromkeys(names, f"*{kind}")
        | {"reset": "*i8" if reset else f"*{kind}"}
        | dict.fromkeys(("L", "C"), "i32")
        | dict.fromkeys(("stride_row", "stride_step"), "i64"),
        constexprs={
            "COMPLEX": is_complex, "RESET": reset, "REVERSE": reset,
            "BLOCK_T": tile.block_t, "BLOCK_C": tile.block_c,
        },
        num_warps=tile.num_warps,
    )  # fmt: skip


SPECIALISATIONS = [
    _specialisation(kernel, *which)
    for kernel in ("_scan_forward", "_scan_backward")
    for which in (("fp32", False, False), ("fp32", True, True), ("fp64", False, True))
]
