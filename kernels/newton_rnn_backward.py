"""The backward pass of `corelib.kernels.newton_rnn`: one scan from the end, and the cell's own
derivatives, in one pass.

    g_t = dh_t + J_{t+1}^T g_{t+1}        dx_t = (df/dx_t)^T g_t        dw = sum_t (df/dw)^T g_t

``J`` is made again from ``x`` and the states, one step ahead of the gradients that are written; so
``x`` is read twice (the second time from the cache, as the two readings lie one step apart).
The walk goes one step past the first: there ``g_{-1} = J_0^T g_0`` is the gradient of the state
before. That of the weights is summed over time in registers and over batch rows afterwards, so
that all gradients are the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels._shared import jit, tl
from corelib.kernels.newton_rnn import (
    ROWS,
    Tile,
    compose,
    compose_pairs,
    gru,
    launch,
    load_three,
    lstm,
    lstm_block,
    specialisation,
)

__all__ = ["backward_bytes", "newton_rnn_backward"]

BACKWARD = {"gru": Tile(32, 8, 2), "lstm": Tile(16, 8, 2)}


@jit
def _gru_backward(
    d_out, x, weights, state, out, d_x, d_weights, d_state, L, C, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    w_z, w_r, w_c = load_three(weights, channels[None, :], C, real[None, :])
    begin = tl.load(state + row * C + channels, mask=real, other=0.0)[None, :]
    carried = tl.zeros([BLOCK_C], begin.dtype)
    sum_z = tl.zeros([BLOCK_C], begin.dtype)
    sum_r = tl.zeros([BLOCK_C], begin.dtype)
    sum_c = tl.zeros([BLOCK_C], begin.dtype)
    for first in range(0, L + 1, BLOCK_T):
        step = (L - 1 - first - steps)[:, None]  # down to -1, which stands for the state before
        time = row * L + step
        at = time * C + channels[None, :]
        inside = (step >= 0) & real[None, :]
        behind = (step >= -1) & (step < L - 1) & real[None, :]
        h = tl.load(out + at, mask=behind & inside, other=0.0)
        h = tl.where(step == -1, begin, h)
        x_z, x_r, x_c = load_three(x, 3 * (time + 1) * C + channels[None, :], C, behind)
        _after, slope, _z, _r, _c, _ = gru(h, x_z, x_r, x_c, w_z, w_r, w_c)
        fed = tl.load(d_out + at, mask=inside, other=0.0)
        through, fed = tl.associative_scan((slope, fed), 0, compose)
        g = fed + through * carried[None, :]
        carried = tl.sum(tl.where((steps == BLOCK_T - 1)[:, None], g, 0.0), 0)
        none = row * C + channels[None, :] + 0 * step
        tl.store(d_state + none, g, mask=(step == -1) & real[None, :])
        h = tl.load(out + at - C, mask=inside & (step > 0), other=0.0)
        h = tl.where(step == 0, begin, h)  # zero, like all that is loaded, where there is no step
        x_z, x_r, x_c = load_three(x, 3 * time * C + channels[None, :], C, inside)
        _after, _slope, by_z, by_r, by_c, r = gru(h, x_z, x_r, x_c, w_z, w_r, w_c)
        d_z, d_r, d_c = g * by_z, g * by_r, g * by_c
        to = 3 * time * C + channels[None, :]
        tl.store(d_x + to, d_z, mask=inside)
        tl.store(d_x + to + C, d_r, mask=inside)
        tl.store(d_x + to + 2 * C, d_c, mask=inside)
        sum_z += tl.sum(d_z * h, 0)
        sum_r += tl.sum(d_r * h, 0)
        sum_c += tl.sum(d_c * h * r, 0)
    to = row * 3 * C + channels
    tl.store(d_weights + to, sum_z, mask=real)
    tl.store(d_weights + to + C, sum_r, mask=real)
    tl.store(d_weights + to + 2 * C, sum_c, mask=real)


@jit
def _lstm_backward(
    d_out, x, weights, state, out, d_x, d_weights, d_state, L, C, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    w_f, w_z, w_o = load_three(weights, channels[None, :], C, real[None, :])
    p_f = tl.load(weights + 3 * C + channels, mask=real, other=0.0)[None, :]
    p_o = tl.load(weights + 4 * C + channels, mask=real, other=0.0)[None, :]
    begin_h = tl.load(state + 2 * (row * C + channels), mask=real, other=0.0)[None, :]
    begin_c = tl.load(state + 2 * (row * C + channels) + 1, mask=real, other=0.0)[None, :]
    carried_h = tl.zeros([BLOCK_C], begin_h.dtype)
    carried_c = tl.zeros([BLOCK_C], begin_h.dtype)
    sum_f = tl.zeros([BLOCK_C], begin_h.dtype)
    sum_z = tl.zeros([BLOCK_C], begin_h.dtype)
    sum_o = tl.zeros([BLOCK_C], begin_h.dtype)
    sum_pf = tl.zeros([BLOCK_C], begin_h.dtype)
    sum_po = tl.zeros([BLOCK_C], begin_h.dtype)
    for first in range(0, L + 1, BLOCK_T):
        step = (L - 1 - first - steps)[:, None]  # down to -1, which stands for the state before
        time = row * L + step
        at = 2 * (time * C + channels[None, :])
        inside = (step >= 0) & real[None, :]
        behind = (step >= -1) & (step < L - 1) & real[None, :]
        h = tl.load(out + at, mask=behind & inside, other=0.0)
        c = tl.load(out + at + 1, mask=behind & inside, other=0.0)
        h, c = tl.where(step == -1, begin_h, h), tl.where(step == -1, begin_c, c)
        x_f, x_z, x_o = load_three(x, 3 * (time + 1) * C + channels[None, :], C, behind)
        _h, _c, by_f, by_z, by_c, by_o, by_after = lstm(
            h, c, x_f, x_z, x_o, w_f, w_z, w_o, p_f, p_o
        )
        J00, J01, J10, J11 = lstm_block(by_f, by_z, by_c, by_o, by_after, w_f, w_z, w_o)
        g_h = tl.load(d_out + at, mask=inside, other=0.0)
        g_c = tl.load(d_out + at + 1, mask=inside, other=0.0)
        J00, J10, J01, J11, g_h, g_c = tl.associative_scan(  # of the transposed blocks
            (J00, J10, J01, J11, g_h, g_c), 0, compose_pairs
        )
        g_h += J00 * carried_h[None, :] + J10 * carried_c[None, :]
        g_c += J01 * carried_h[None, :] + J11 * carried_c[None, :]
        last = (steps == BLOCK_T - 1)[:, None]
        carried_h = tl.sum(tl.where(last, g_h, 0.0), 0)
        carried_c = tl.sum(tl.where(last, g_c, 0.0), 0)
        to = 2 * (row * C + channels[None, :]) + 0 * step
        tl.store(d_state + to, g_h, mask=(step == -1) & real[None, :])
        tl.store(d_state + to + 1, g_c, mask=(step == -1) & real[None, :])
        h = tl.load(out + at - 2 * C, mask=inside & (step > 0), other=0.0)
        c = tl.load(out + at - 2 * C + 1, mask=inside & (step > 0), other=0.0)
        # zero, like all that is loaded, where there is no step
        h, c = tl.where(step == 0, begin_h, h), tl.where(step == 0, begin_c, c)
        x_f, x_z, x_o = load_three(x, 3 * time * C + channels[None, :], C, inside)
        _h, after, by_f, by_z, by_c, by_o, by_after = lstm(
            h, c, x_f, x_z, x_o, w_f, w_z, w_o, p_f, p_o
        )
        of_after, d_o = g_c + g_h * by_after, g_h * by_o
        d_f, d_z = of_after * by_f, of_after * by_z
        to = 3 * time * C + channels[None, :]
        tl.store(d_x + to, d_f, mask=inside)
        tl.store(d_x + to + C, d_z, mask=inside)
        tl.store(d_x + to + 2 * C, d_o, mask=inside)
        sum_f += tl.sum(d_f * h, 0)
        sum_z += tl.sum(d_z * h, 0)
        sum_o += tl.sum(d_o * h, 0)
        sum_pf += tl.sum(d_f * c, 0)
        sum_po += tl.sum(d_o * after, 0)
    to = row * 5 * C + channels
    tl.store(d_weights + to, sum_f, mask=real)
    tl.store(d_weights + to + C, sum_z, mask=real)
    tl.store(d_weights + to + 2 * C, sum_o, mask=real)
    tl.store(d_weights + to + 3 * C, sum_pf, mask=real)
    tl.store(d_weights + to + 4 * C, sum_po, mask=real)


_KERNELS = {"gru": _gru_backward, "lstm": _lstm_backward}


def newton_rnn_backward(
    cell: str, d_out: Tensor, x: Tensor, weights: Tensor, state: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weights`` and ``state`` from those of the states ``out``."""
    B, L, _, C = x.shape
    if not out.numel():
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(state)
    d_x, d_state = torch.empty_like(x), torch.empty_like(state)
    d_weights = weights.new_empty(B, ROWS[cell], C)
    launch(
        _KERNELS[cell], BACKWARD[cell], B, C,
        d_out.contiguous(), x, weights, state, out, d_x, d_weights, d_state, L, C,
    )  # fmt: skip
    return d_x, d_weights.sum(0), d_state


def backward_bytes(cell: str, B: int, L: int, C: int, *, itemsize: int = 4) -> int:
    """Bytes that the backward pass moves: gradients of the states in and of the gates out, the
    gates' inputs twice, the states before each step twice, both but for one step; weights and first
    state, and their gradients."""
    wide = 2 if cell == "lstm" else 1
    a_row = wide * L + 9 * L + 2 * wide * (L - 1) + 2 * wide + 2 * ROWS[cell]
    return itemsize * B * C * a_row


_NAMES = ["d_out", "x", "weights", "state", "out", "d_x", "d_weights", "d_state"]
SPECIALISATIONS = [
    specialisation(f"_{cell}_backward", dtype, BACKWARD[cell], _NAMES)
    for cell in ROWS
    for dtype in ("fp32", "fp64")
]
