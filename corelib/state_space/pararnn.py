"""ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models (arXiv
2510.21450).

Idea: all hidden states of a nonlinear RNN are the solution of one system of equations; Newton's
method solves it in a few rounds, and each round is a *linear* recurrence, which a scan runs in
parallel.

    wanted:    h[t] = f(h[t-1], x[t])                           for all t at once
    start:     h[t] = f(0, x[t])
    round:     J[t] = df/dh (h[t-1], x[t])      at the h of the round before
               h'[t] = J[t] h'[t-1] + (f(h[t-1], x[t]) - J[t] h[t-1])
    backward:  g[t] = dh[t] + J[t+1]^T g[t+1]                   once, with J at the solution

`J` must be cheap: every channel talks to itself only, by ``weights`` in place of matrices, so that
it is a number a channel for the GRU and a 2 x 2 block for the LSTM. The channels mix before the
cell, where ``x`` is made, and after it.

    GRU:   z = sigmoid(w0 h + x0)   r = sigmoid(w1 h + x1)   c = tanh(w2 (h r) + x2)
           h' = z c + (1 - z) h
    LSTM:  f = sigmoid(w0 h + w3 c + x0)   z = tanh(w1 h + x1)   c' = f c + (1 - f) z
           o = sigmoid(w2 h + w4 c' + x2)  h' = o tanh(c')       (coupled gates, peepholes)

| here          | paper        | what                                          | shape           |
|:--------------|:-------------|:----------------------------------------------|:----------------|
| x             | B x          | what enters each gate                         | (B, L, 3, C)    |
| weights       | a (and p)    | of a channel to itself; GRU 3 rows, LSTM 5    | (3 or 5, C)     |
| states        | h; (h, c)    | GRU; LSTM                                     | (B, L, C[, 2])  |
| iterations    | K            | rounds of Newton, 3                           |                 |

Exact: the first ``k`` states after ``k`` rounds, everything after ``L``. In between the error
falls faster and faster where weights are small (``|w| <= 0.5``, as the layers keep them), and may
grow without bound where they are not. Layers and the paper's block: `pararnn_block`.
Cost: ``O(K L C)`` work, in ``O(K sqrt(L))`` calls on a CPU in place of ``O(L)``. On a GPU
`corelib.kernels.newton_rnn` makes each round, Jacobian and scan, in one pass.
Oracles: the sequential loop, ``torch.nn.GRU`` with diagonal matrices, automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from corelib.primitives.diagonal_scan import block_scan, diagonal_scan

Gates = Float[Tensor, "B L 3 C"]
Weights = Float[Tensor, "rows C"]


class Cell(NamedTuple):
    """A recurrent cell: ``step`` alone, ``linearised`` with its Jacobian, and how to scan it."""

    name: str
    rows: int
    step: Callable[[Tensor, Tensor, Tensor], Tensor]
    linearised: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    scan: Callable[..., Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    tail: tuple[int, ...]


# --- the cells ------------------------------------------------------------------------------------


def _gru_parts(h: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    enter_z, enter_r, enter_c = x.unbind(-2)
    z = torch.sigmoid(torch.addcmul(enter_z, w[0], h))
    r = torch.sigmoid(torch.addcmul(enter_r, w[1], h))
    return z, r, torch.tanh(torch.addcmul(enter_c, w[2], h * r))


def gru_step(h: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """``h (..., C)``, ``x (..., 3, C)`` -> the next ``h``; any leading axes."""
    z, _, c = _gru_parts(h, x, weights)
    return torch.lerp(h, c, z)


def gru_linearised(h: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The next ``h`` and its derivative by ``h``, both ``(..., C)``."""
    z, r, c = _gru_parts(h, x, weights)
    d_r = weights[1] * r * (1 - r)
    d_c = weights[2] * (1 - c * c) * torch.addcmul(r, h, d_r)
    d_z = weights[0] * z * (1 - z)
    return torch.lerp(h, c, z), d_z * (c - h) + torch.addcmul(1 - z, z, d_c)


def _lstm_parts(state: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    (h, c), (enter_f, enter_z, enter_o) = state.unbind(-1), x.unbind(-2)
    f = torch.sigmoid(enter_f + w[0] * h + w[3] * c)
    z = torch.tanh(torch.addcmul(enter_z, w[1], h))
    after = torch.lerp(z, c, f)
    o = torch.sigmoid(enter_o + w[2] * h + w[4] * after)
    return f, z, o, after, torch.tanh(after)


def lstm_step(state: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """``state (..., C, 2)``, holding ``h`` and ``c``, to the next; ``x (..., 3, C)``."""
    _, _, o, after, squashed = _lstm_parts(state, x, weights)
    return torch.stack([o * squashed, after], -1)


def lstm_linearised(state: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The next state and its derivative, ``(..., C, 2, 2)``: ``[[h' / h, h' / c], [c' / h, …]]``"""
    f, z, o, after, squashed = _lstm_parts(state, x, weights)
    through_f = (state[..., 1] - z) * f * (1 - f)
    c_h = weights[0] * through_f + weights[1] * (1 - f) * (1 - z * z)
    c_c = torch.addcmul(f, weights[3], through_f)
    through_o, through_c = squashed * o * (1 - o), o * (1 - squashed * squashed)
    of_c = torch.addcmul(through_c, weights[4], through_o)
    h_h, h_c = weights[2] * through_o + of_c * c_h, of_c * c_c
    jacobian = torch.stack([h_h, h_c, c_h, c_c], -1).unflatten(-1, (2, 2))
    return torch.stack([o * squashed, after], -1), jacobian


def _apply_blocks(J: Tensor, h: Tensor) -> Tensor:
    return J[..., 0] * h[..., :1] + J[..., 1] * h[..., 1:]


GRU = Cell("gru", 3, gru_step, gru_linearised, diagonal_scan, torch.mul, lambda J: J, ())
LSTM = Cell("lstm", 5, lstm_step, lstm_linearised, block_scan, _apply_blocks, lambda J: J.mT, (2,))


# --- all states -----------------------------------------------------------------------------------


def sequential_rnn(cell: Cell, x: Gates, weights: Weights, state: Tensor | None = None) -> Tensor:
    """All states, one step after the other: ``(B, L, C)``, of an LSTM ``(B, L, C, 2)``."""
    h = _check(cell, x, weights, state)
    states = [h[:, None][:, :0]]
    for x_t in x.unbind(1):
        h = cell.step(h, x_t, weights)
        states.append(h[:, None])
    return torch.cat(states, 1)


def newton_rnn(
    cell: Cell, x: Gates, weights: Weights, state: Tensor | None = None, *, iterations: int = 3
) -> Tensor:
    """The same states by ``iterations`` rounds of Newton's method over the whole sequence.

    Differentiable once, in ``x``, ``weights`` and ``state``, by the adjoint at the states found: as
    exact as these are. Nothing but the states is kept for it.

    Raises ValueError or TypeError for arguments that do not fit.
    """
    state = _check(cell, x, weights, state)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: expected an int, at least 0, got {iterations!r}")
    if x.is_cuda and x.dtype.itemsize >= 4 and cell in (GRU, LSTM):  # not half precision
        from corelib.kernels.newton_rnn import newton_rnn as kernel

        return kernel(cell.name, x, weights, state, iterations=iterations)
    return _Newton.apply(cell, iterations, x, weights, state)


def newton_trace(
    cell: Cell, x: Gates, weights: Weights, state: Tensor | None = None, *, iterations: int = 3
) -> Float[Tensor, "rounds B L *tail"]:
    """The states after 0, 1, …, ``iterations`` rounds; without gradients."""
    state = _check(cell, x, weights, state)
    with torch.no_grad():
        rounds = [_first_guess(cell, x, weights, state)]
        for _ in range(iterations):
            rounds.append(_round(cell, rounds[-1], x, weights, state))
    return torch.stack(rounds)


def _first_guess(cell: Cell, x: Tensor, weights: Tensor, state: Tensor) -> Tensor:
    return cell.step(torch.zeros_like(state)[:, None], x, weights)


def _before(h: Tensor, state: Tensor) -> Tensor:
    """Each step's state before it."""
    return torch.cat([state[:, None], h], 1)[:, : h.shape[1]]


def _round(cell: Cell, h: Tensor, x: Tensor, weights: Tensor, state: Tensor) -> Tensor:
    before = _before(h, state)
    after, J = cell.linearised(before, x, weights)
    return cell.scan(J, after - cell.apply(J, before), state=state)


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, iterations, x, weights, state):
        h = _first_guess(cell, x, weights, state)
        for _ in range(iterations):
            h = _round(cell, h, x, weights, state)
        ctx.save_for_backward(x, weights, state, h)
        ctx.cell = cell
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_h):
        (x, weights, state, h), cell = ctx.saved_tensors, ctx.cell
        leaves = [y.detach().requires_grad_() for y in (x, weights)]
        before = _before(h, state)
        with torch.enable_grad():
            after, J = cell.linearised(before, *leaves)
        J = cell.transpose(J.detach())
        onwards = torch.cat([J[:, 1:], torch.zeros_like(J[:, :1])], 1)[:, : J.shape[1]]
        g = cell.scan(onwards, d_h.contiguous(), reverse=True)
        d_x, d_weights = torch.autograd.grad(after, leaves, g)
        d_state = cell.apply(J[:, :1], g[:, :1]).sum(1)  # of no step at all: zeros
        return None, None, d_x, d_weights, d_state


def example(cell: Cell = GRU) -> dict:
    """Six steps of one channel.

    >>> newton_rnn(GRU, **example()).shape, newton_rnn(LSTM, **example(LSTM)).shape
    (torch.Size([1, 6, 1]), torch.Size([1, 6, 1, 2]))
    """
    tokens = torch.tensor([1.0, 0, 0, 2, -1, 0], dtype=torch.float64)
    gates = torch.stack([tokens, -0.5 * tokens, 0.8 * tokens], -1)[None, :, :, None]
    weights = torch.tensor([0.5, -0.4, 0.3, 0.2, -0.1], dtype=torch.float64)[: cell.rows, None]
    return dict(x=gates, weights=weights)


def _check(cell: Cell, x: Tensor, weights: Tensor, state: Tensor | None) -> Tensor:
    """The state to start from."""
    if x.dim() != 4 or x.shape[2] != 3:
        raise ValueError(f"x: expected (B, L, 3, C), got shape {tuple(x.shape)}")
    B, _, _, C = x.shape
    if tuple(weights.shape) != (cell.rows, C):
        raise ValueError(f"weights: expected {(cell.rows, C)}, got shape {tuple(weights.shape)}")
    if state is None:
        state = x.new_zeros(B, C, *cell.tail)
    if tuple(state.shape) != (B, C, *cell.tail):
        raise ValueError(f"state: expected {(B, C, *cell.tail)}, got shape {tuple(state.shape)}")
    for name, y in (("weights", weights), ("state", state)):
        if y.dtype != x.dtype or not x.is_floating_point():
            raise TypeError(f"{name}: expected x's dtype, a floating one, {x.dtype}, got {y.dtype}")
    return state
