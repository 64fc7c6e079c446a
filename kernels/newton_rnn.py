"""A round of Newton's method over a nonlinear recurrence, residual, Jacobian and scan in one pass.

    after_t = f(h_{t-1}, x_t)     J_t = df/dh     h'_t = J_t h'_{t-1} + (after_t - J_t h_{t-1})

for the GRU and the LSTM of ParaRNN (arXiv 2510.21450, section 3), whose channels talk to themselves
only: ``J_t`` is a number a channel, of the LSTM a block of 2 x 2. A program owns a batch row and a
block of channels and walks over time; it loads a block of steps of ``x`` and of the states before,
makes ``J`` and the right-hand side in registers, runs an associative scan over them and writes the
new states. So a round reads four numbers a step (LSTM: five) and writes one (two); the Jacobians,
which plain PyTorch writes and reads several times, never leave the chip. The first guess,
``f(0, x_t)``, is the same pass without the scan.

Backward (`corelib.kernels.newton_rnn_backward`) is one pass more, at the states found.

In the inputs' own precision, float32 or float64. No ``tl.dot``: there is no product of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation

__all__ = ["forward_bytes", "newton_rnn"]

ROWS = {"gru": 3, "lstm": 5}


class Tile(NamedTuple):
    """Steps and channels at a time, and warps."""

    block_t: int
    block_c: int
    num_warps: int


FORWARD = {"gru": Tile(32, 8, 2), "lstm": Tile(16, 8, 1)}


# --- the cells and the scans, which the backward pass shares --------------------------------------


@jit
def compose(a, x, b, y):
    """First ``h -> a h + x``, then ``h -> b h + y``."""
    return b * a, b * x + y


@jit
def compose_pairs(a00, a01, a10, a11, x0, x1, b00, b01, b10, b11, y0, y1):
    """The same for pairs ``h``, with matrices of 2 x 2."""
    return (
        b00 * a00 + b01 * a10, b00 * a01 + b01 * a11, b10 * a00 + b11 * a10,
        b10 * a01 + b11 * a11, b00 * x0 + b01 * x1 + y0, b10 * x0 + b11 * x1 + y1,
    )  # fmt: skip


@jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@jit
def load_three(pointer, first, stride, exists):
    """Three rows, ``stride`` apart; zeros where there is nothing."""
    one = tl.load(pointer + first, mask=exists, other=0.0)
    two = tl.load(pointer + first + stride, mask=exists, other=0.0)
    return one, two, tl.load(pointer + first + 2 * stride, mask=exists, other=0.0)


@jit
def gru(h, x_z, x_r, x_c, w_z, w_r, w_c):
    """The next state, its derivatives by ``h`` and by what enters the gates, and the reset gate."""
    z, r = tl.sigmoid(x_z + w_z * h), tl.sigmoid(x_r + w_r * h)
    c = _tanh(x_c + w_c * h * r)
    by_z, by_c = (c - h) * z * (1 - z), z * (1 - c * c)
    by_r = by_c * w_c * h * r * (1 - r)
    by_h = 1 - z + w_z * by_z + w_r * by_r + w_c * r * by_c
    return z * c + (1 - z) * h, by_h, by_z, by_r, by_c, r


@jit
def lstm(h, c, x_f, x_z, x_o, w_f, w_z, w_o, p_f, p_o):
    """The next ``h`` and ``c``; of ``c`` the derivatives by what enters ``f`` and ``z``, and by
    ``c`` before; of ``h`` those by what enters ``o``, and by the new ``c``."""
    f, z = tl.sigmoid(x_f + w_f * h + p_f * c), _tanh(x_z + w_z * h)
    after = f * c + (1 - f) * z
    o, squashed = tl.sigmoid(x_o + w_o * h + p_o * after), _tanh(after)
    by_f, by_z = (c - z) * f * (1 - f), (1 - f) * (1 - z * z)
    by_o = squashed * o * (1 - o)
    by_after = o * (1 - squashed * squashed) + p_o * by_o
    return o * squashed, after, by_f, by_z, f + p_f * by_f, by_o, by_after


@jit
def lstm_block(by_f, by_z, by_c, by_o, by_after, w_f, w_z, w_o):
    """The 2 x 2 derivative of the next ``(h, c)`` by the one before, row by row."""
    c_by_h = w_f * by_f + w_z * by_z
    return w_o * by_o + by_after * c_by_h, by_after * by_c, c_by_h, by_c


# --- a round --------------------------------------------------------------------------------------


@jit
def _gru_round(
    x, weights, state, guess, out, L, C, GUESS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    w_z, w_r, w_c = load_three(weights, channels, C, real)
    begin = tl.load(state + row * C + channels, mask=real, other=0.0)
    h = begin
    for first in range(0, L, BLOCK_T):
        time = (row * L + first + steps)[:, None]
        is_first = (first + steps == 0)[:, None]
        exists = (first + steps < L)[:, None] & real[None, :]
        x_z, x_r, x_c = load_three(x, 3 * time * C + channels[None, :], C, exists)
        at = time * C + channels[None, :]
        if GUESS:
            before = tl.zeros([BLOCK_T, BLOCK_C], h.dtype)
        else:
            before = tl.load(guess + at - C, mask=exists & (is_first == 0), other=0.0)
            before = tl.where(is_first, begin[None, :], before)
        after, slope, _z, _r, _c, _ = gru(
            before, x_z, x_r, x_c, w_z[None, :], w_r[None, :], w_c[None, :]
        )
        if not GUESS:
            through, fed = tl.associative_scan((slope, after - slope * before), 0, compose)
            after = fed + through * h[None, :]
            h = tl.sum(tl.where((steps == BLOCK_T - 1)[:, None], after, 0.0), 0)
        tl.store(out + at, after, mask=exists)


@jit
def _lstm_round(
    x, weights, state, guess, out, L, C, GUESS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    steps, real = tl.arange(0, BLOCK_T), channels < C
    w_f, w_z, w_o = load_three(weights, channels[None, :], C, real[None, :])
    p_f = tl.load(weights + 3 * C + channels, mask=real, other=0.0)[None, :]
    p_o = tl.load(weights + 4 * C + channels, mask=real, other=0.0)[None, :]
    begin_h = tl.load(state + 2 * (row * C + channels), mask=real, other=0.0)
    begin_c = tl.load(state + 2 * (row * C + channels) + 1, mask=real, other=0.0)
    h, c = begin_h, begin_c
    for first in range(0, L, BLOCK_T):
        time = (row * L + first + steps)[:, None]
        is_first = (first + steps == 0)[:, None]
        exists = (first + steps < L)[:, None] & real[None, :]
        x_f, x_z, x_o = load_three(x, 3 * time * C + channels[None, :], C, exists)
        at = 2 * (time * C + channels[None, :])
        if GUESS:
            old_h = tl.zeros([BLOCK_T, BLOCK_C], h.dtype)
            old_c = tl.zeros([BLOCK_T, BLOCK_C], h.dtype)
        else:
            old_h = tl.load(guess + at - 2 * C, mask=exists & (is_first == 0), other=0.0)
            old_c = tl.load(guess + at - 2 * C + 1, mask=exists & (is_first == 0), other=0.0)
            old_h = tl.where(is_first, begin_h[None, :], old_h)
            old_c = tl.where(is_first, begin_c[None, :], old_c)
        new_h, new_c, by_f, by_z, by_c, by_o, by_after = lstm(
            old_h, old_c, x_f, x_z, x_o, w_f, w_z, w_o, p_f, p_o
        )
        if not GUESS:
            J00, J01, J10, J11 = lstm_block(by_f, by_z, by_c, by_o, by_after, w_f, w_z, w_o)
            new_h -= J00 * old_h + J01 * old_c
            new_c -= J10 * old_h + J11 * old_c
            J00, J01, J10, J11, new_h, new_c = tl.associative_scan(
                (J00, J01, J10, J11, new_h, new_c), 0, compose_pairs
            )
            new_h += J00 * h[None, :] + J01 * c[None, :]
            new_c += J10 * h[None, :] + J11 * c[None, :]
            last = (steps == BLOCK_T - 1)[:, None]
            h = tl.sum(tl.where(last, new_h, 0.0), 0)
            c = tl.sum(tl.where(last, new_c, 0.0), 0)
        tl.store(out + at, new_h, mask=exists)
        tl.store(out + at + 1, new_c, mask=exists)


_ROUNDS = {"gru": _gru_round, "lstm": _lstm_round}


def newton_rnn(
    cell: str, x: Tensor, weights: Tensor, state: Tensor | None = None, *, iterations: int = 3
) -> Tensor:
    """All states of a GRU or LSTM after ``iterations`` rounds of Newton's method.

    Args:
        cell: ``"gru"`` or ``"lstm"``, as `corelib.state_space.pararnn` writes them.
        x: ``(B, L, 3, C)``, what enters each gate, float32 or float64.
        weights: ``(3, C)``, of an LSTM ``(5, C)``: of each channel to itself.
        state: ``(B, C)``, of an LSTM ``(B, C, 2)``, before the first step; None is zero.
        iterations: rounds after the first guess ``f(0, x_t)``.

    Returns:
        ``(B, L, C)``, of an LSTM ``(B, L, C, 2)``; differentiable once in ``x``, ``weights`` and
        ``state``, by the adjoint at the states found.

    Raises ValueError or TypeError for names, shapes, dtypes or devices that do not fit, ImportError
    where Triton is missing.
    """
    check_device("newton_rnn", _gru_round, x, weights)
    if cell not in ROWS:
        raise ValueError(f"cell: expected one of {list(ROWS)}, got {cell!r}")
    if x.dim() != 4 or x.shape[2] != 3:
        raise ValueError(f"x: expected (B, L, 3, C), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    B, _, _, C = x.shape
    pair = (2,) if cell == "lstm" else ()
    state = x.new_zeros(B, C, *pair) if state is None else state
    wanted = ("weights", weights, (ROWS[cell], C)), ("state", state, (B, C, *pair))
    for name, y, shape in wanted:
        if tuple(y.shape) != shape or y.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected {shape} in {x.dtype}, got {tuple(y.shape)} in {y.dtype}"
            )
    return _Newton.apply(cell, iterations, *(y.contiguous() for y in (x, weights, state)))


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, iterations, x, weights, state):
        B, L, _, C = x.shape
        h = x.new_empty(B, L, *state.shape[1:])
        if h.numel():
            kernel, tile = _ROUNDS[cell], FORWARD[cell]
            launch(kernel, tile, B, C, x, weights, state, h, h, L, C, GUESS=True)
            for _ in range(iterations):
                guess, h = h, torch.empty_like(h)
                launch(kernel, tile, B, C, x, weights, state, guess, h, L, C, GUESS=False)
        ctx.save_for_backward(x, weights, state, h)
        ctx.cell = cell
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_h):
        from corelib.kernels.newton_rnn_backward import newton_rnn_backward

        return None, None, *newton_rnn_backward(ctx.cell, d_h, *ctx.saved_tensors)


def launch(kernel, tile: Tile, B: int, C: int, *arguments, **constants) -> None:
    """Run ``kernel`` with a program for each batch row and block of channels."""
    options = {} if is_interpreted(kernel) else {"num_warps": tile.num_warps}
    kernel[(B, -(-C // tile.block_c))](
        *arguments, BLOCK_T=tile.block_t, BLOCK_C=tile.block_c, **constants, **options
    )


def forward_bytes(
    cell: str, B: int, L: int, C: int, *, iterations: int = 3, itemsize: int = 4
) -> int:
    """Bytes that the guess and the rounds move: inputs of the gates and new states every time, the
    states before but in the guess; weights and first state every time."""
    wide, rounds = (2 if cell == "lstm" else 1), iterations + 1
    always = rounds * (3 * L + wide * L + wide) * B * C
    programs = B * rounds * ROWS[cell] * C
    return itemsize * (always + programs + iterations * wide * B * (L - 1) * C)


def specialisation(kernel: str, dtype: str, tile: Tile, names: list[str], **constants):
    """A row of this operation's table; ``names`` are the pointers."""
    direction = "backward" if kernel.endswith("backward") else "forward"
    guess = " first guess" if constants.get("GUESS") else ""
    return Specialisation(
        kernel=kernel,
        label=f"{dtype}{guess}",
        direction=direction,
        signature=dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(("L", "C"), "i32"),
        constexprs={**constants, "BLOCK_T": tile.block_t, "BLOCK_C": tile.block_c},
        num_warps=tile.num_warps,
    )


_NAMES = ["x", "weights", "state", "guess", "out"]
SPECIALISATIONS = [
    specialisation(f"_{cell}_round", dtype, FORWARD[cell], _NAMES, GUESS=guess)
    for cell in ROWS
    for dtype, guess in (("fp32", False), ("fp32", True), ("fp64", False))
]
