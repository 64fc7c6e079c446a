"""Leaky integrate-and-fire neurons over time, forward, and their surrogate gradient, backward.

    h_t = v_{t-1} + (x_t - v_{t-1}) / tau      s_t = h_t >= threshold      v_t = h_t (1 - s_t)

A program owns a batch row and a block of neurons. Forward it has to walk, for the reset depends on
the spike: four inputs are loaded together, so that their way from memory is waited for once, and
the membrane stays in registers. For backward it writes down ``h``.

Backward the spikes are known, and what is left is a linear recurrence from the end,

    w_t = (1 - 1 / tau) (ds_t slope p (1 - p) + (1 - s_t) w_{t+1})           dx_t = w_t / (tau - 1)

with ``p = sigmoid(slope (h_t - threshold))``: a block of steps is loaded at once, and an
associative scan runs over it.

``tau``, ``threshold`` and ``slope`` are compiled in: a model has one or two settings of them.
Computed in float32 for half precision, whose spikes are exact, else in the inputs' own precision.
No ``tl.dot``: there is no product of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["backward_bytes", "forward_bytes", "spiking_scan"]


class Tile(NamedTuple):
    """Steps (of backward) and neurons at a time, and warps."""

    block_t: int
    block_c: int
    num_warps: int


FORWARD, BACKWARD = Tile(4, 64, 1), Tile(32, 16, 2)


@jit
def _compose(a, x, b, y):
    """First ``w -> a w + x``, then ``w -> b w + y``."""
    return b * a, b * x + y


@jit
def _step(
    x_t, v, at, exists, spikes, membrane, SHARE: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """One step of the neurons, written down where it ``exists``; else the membrane stays."""
    h = v + (x_t - v) * SHARE
    fires = h >= THRESHOLD
    tl.store(spikes + at, tl.where(fires, 1.0, 0.0).to(spikes.dtype.element_ty), mask=exists)
    if KEEP:
        tl.store(membrane + at, h, mask=exists)
    return tl.where(exists, tl.where(fires, 0.0, h), v)


@jit
def _spikes_forward(
    x, state, spikes, membrane, after, L, C, SHARE: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = neurons < C
    v = tl.load(state + row * C + neurons, mask=real, other=0.0)
    for first in range(0, L, 4):
        at = (row * L + first) * C + neurons
        in_1, in_2 = real & (first + 1 < L), real & (first + 2 < L)
        in_3 = real & (first + 3 < L)
        x_0 = tl.load(x + at, mask=real, other=0.0).to(v.dtype)
        x_1 = tl.load(x + at + C, mask=in_1, other=0.0).to(v.dtype)
        x_2 = tl.load(x + at + 2 * C, mask=in_2, other=0.0).to(v.dtype)
        x_3 = tl.load(x + at + 3 * C, mask=in_3, other=0.0).to(v.dtype)
        v = _step(x_0, v, at, real, spikes, membrane, SHARE, THRESHOLD, KEEP)
        v = _step(x_1, v, at + C, in_1, spikes, membrane, SHARE, THRESHOLD, KEEP)
        v = _step(x_2, v, at + 2 * C, in_2, spikes, membrane, SHARE, THRESHOLD, KEEP)
        v = _step(x_3, v, at + 3 * C, in_3, spikes, membrane, SHARE, THRESHOLD, KEEP)
    tl.store(after + row * C + neurons, v, mask=real)


@jit
def _spikes_backward(
    d_spikes, membrane, d_after, d_x, d_state, L, C, SHARE: tl.constexpr, THRESHOLD: tl.constexpr,
    SLOPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    neurons = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), neurons < C
    w = tl.load(d_after + row * C + neurons, mask=real, other=0.0)
    for first in range(0, L, BLOCK_T):
        time = L - 1 - first - steps
        at = (row * L + time[:, None]) * C + neurons[None, :]
        exists = (time >= 0)[:, None] & real[None, :]
        h = tl.load(membrane + at, mask=exists, other=0.0)
        given = tl.load(d_spikes + at, mask=exists, other=0.0).to(h.dtype)
        p = 1 / (1 + tl.exp(-SLOPE * (h - THRESHOLD)))
        # before the first step nothing is kept and nothing added: the last w stays
        through = tl.where(exists, (h < THRESHOLD).to(h.dtype) * (1 - SHARE), 1.0)
        fed = tl.where(exists, given * p * (1 - p) * (SLOPE * (1 - SHARE)), 0.0)
        through, fed = tl.associative_scan((through, fed), 0, _compose)
        all_w = fed + through * w[None, :]
        tl.store(d_x + at, (all_w * (SHARE / (1 - SHARE))).to(d_x.dtype.element_ty), mask=exists)
        w = tl.sum(tl.where((steps == BLOCK_T - 1)[:, None], all_w, 0.0), 0)
    tl.store(d_state + row * C + neurons, w, mask=real)


def spiking_scan(
    x: Tensor,
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    slope: float = 4.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Spikes ``(B, L, C)``, zeros and ones in x's dtype, and the membrane after the last step.

    Args:
        x: ``(B, L, C)``, what flows into each neuron at each step; a floating dtype.
        tau: time constant in steps, above 1.
        threshold: at which a neuron fires.
        slope: of the sigmoid whose derivative stands in for the step's.
        state: ``(B, C)``, the membrane before the first step; None is at rest, 0.

    Differentiable once, in ``x`` and ``state``. Raises ValueError or TypeError for arguments that
    do not fit, ImportError where Triton is missing.
    """
    check_device("spiking_scan", _spikes_forward, x)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, L, C), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    if not tau > 1:
        raise ValueError(f"tau: expected a number above 1, got {tau!r}")
    B, _, C = x.shape
    state = x.new_zeros(B, C) if state is None else state
    if tuple(state.shape) != (B, C) or state.dtype != x.dtype:
        raise ValueError(
            f"state: expected {(B, C)} in {x.dtype}, got {tuple(state.shape)} in {state.dtype}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    needed = torch.is_grad_enabled() and (x.requires_grad or state.requires_grad)
    spikes, after = _Spikes.apply(x, state.to(wide), tau, threshold, slope, needed)
    return spikes, after.to(x.dtype)


class _Spikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, state, tau, threshold, slope, needed):
        B, L, C = x.shape
        x, state = x.contiguous(), state.contiguous()
        spikes, after = torch.empty_like(x), torch.empty_like(state)
        membrane = torch.empty_like(x, dtype=state.dtype) if needed else state
        if state.numel():
            _launch(
                _spikes_forward, FORWARD, B, C, x, state, spikes, membrane, after, L, C,
                SHARE=1 / tau, THRESHOLD=threshold, KEEP=needed,
            )  # fmt: skip
        ctx.save_for_backward(membrane)
        ctx.options = tau, threshold, slope, x.dtype
        return spikes, after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_spikes, d_after):
        (membrane,), (tau, threshold, slope, dtype) = ctx.saved_tensors, ctx.options
        B, L, C = membrane.shape
        d_spikes, d_after = d_spikes.contiguous(), d_after.contiguous()
        d_x, d_state = torch.empty_like(membrane, dtype=dtype), torch.empty_like(d_after)
        if d_state.numel():
            _launch(
                _spikes_backward, BACKWARD, B, C, d_spikes, membrane, d_after, d_x, d_state, L, C,
                SHARE=1 / tau, THRESHOLD=threshold, SLOPE=slope, BLOCK_T=BACKWARD.block_t,
            )  # fmt: skip
        return d_x, d_state, None, None, None, None


def _launch(kernel, tile: Tile, B: int, C: int, *arguments, **constants) -> None:
    options = {} if is_interpreted(kernel) else {"num_warps": tile.num_warps}
    kernel[(B, -(-C // tile.block_c))](*arguments, BLOCK_C=tile.block_c, **constants, **options)


def forward_bytes(B: int, L: int, C: int, *, itemsize: int = 4, keep: bool = True) -> int:
    """Bytes that the forward pass moves: inputs and spikes once, the membrane where it is kept (in
    float32 at least), and the state before and after."""
    wide = max(4, itemsize)
    return B * L * C * (2 * itemsize + wide * keep) + 2 * B * C * wide


def backward_bytes(B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: gradients in and out, the membrane, both ends' states."""
    wide = max(4, itemsize)
    return B * L * C * (2 * itemsize + wide) + 2 * B * C * wide


def _specialisation(kernel: str, kind: str, keep: bool) -> Specialisation:
    forward = kernel == "_spikes_forward"
    wide = dict.fromkeys(
        ("state", "membrane", "after") if forward else ("membrane", "d_after", "d_state"), "*fp32"
    )
    narrow = dict.fromkeys(("x", "spikes") if forward else ("d_spikes", "d_x"), f"*{kind}")
    tile = FORWARD if forward else BACKWARD
    return Specialisation(
        kernel=kernel,
        label=f"{kind}{' inference' * (not keep)}",
        direction="forward" if forward else "backward",
        signature=wide | narrow | {"L": "i32", "C": "i32"},
        constexprs={"SHARE": 0.5, "THRESHOLD": 1.0, "BLOCK_C": tile.block_c}
        | ({"KEEP": keep} if forward else {"SLOPE": 4.0, "BLOCK_T": tile.block_t}),
        num_warps=tile.num_warps,
    )


SPECIALISATIONS = [
    _specialisation("_spikes_forward", "fp32", True),
    _specialisation("_spikes_forward", "bf16", False),
    _specialisation("_spikes_backward", "fp32", True),
    _specialisation("_spikes_backward", "bf16", True),
]
