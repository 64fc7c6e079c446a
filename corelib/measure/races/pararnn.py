"""ParaRNN on this machine: three rounds of Newton's method against the loop over the sequence.

The GRU is also raced against ``torch.nn.GRU`` with the same numbers in diagonal matrices: PyTorch's
own loop in C++, which multiplies by whole matrices. It has no LSTM with coupled gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...state_space.pararnn import GRU, LSTM, Cell, newton_rnn, sequential_rnn
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

B, C = 2, 32
SHAPE = f"B{B} C{C} float32"
OPTIONS = dict(tolerance=1e-3, repeats=3, min_time=0.05)


def gates_and_weights(cell: Cell, L: int, size: float = 0.15) -> tuple[Tensor, Tensor]:
    """Inputs of every gate, and weights small enough that three rounds converge."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, L, 3, C, generator=generator)
    return x, size * torch.randn(cell.rows, C, generator=generator)


def torch_gru(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """``torch.nn.GRU`` computing the same: reset before update, the update gate negated."""
    gru, eye = nn.GRU(3 * C, C, batch_first=True, bias=False), torch.eye(C)
    with torch.no_grad():
        for row, (gate, sign) in enumerate([(1, 1.0), (0, -1.0), (2, 1.0)]):
            part = slice(row * C, (row + 1) * C)
            gru.weight_ih_l0[part] = 0.0
            gru.weight_ih_l0[part, gate * C : (gate + 1) * C] = sign * eye
            gru.weight_hh_l0[part] = sign * torch.diag(weights[gate])
    return lambda x: gru(x.flatten(2))[0]


def _grad_free(call: Callable, *arguments) -> Callable:
    def run():
        with torch.no_grad():
            return call(*arguments)

    return run


def _race(cell: Cell, quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (128, 256, 512, 1024, 2048)
    runs = {"corelib": newton_rnn, "sequential loop": sequential_rnn}

    def forward(L: int) -> dict[str, Callable]:
        x, weights = gates_and_weights(cell, L)
        calls = {name: _grad_free(run, cell, x, weights) for name, run in runs.items()}
        if cell is GRU:
            calls["torch.nn.GRU"] = _grad_free(torch_gru(weights), x)
        return calls

    def both(L: int) -> dict[str, Callable]:
        x, weights = gates_and_weights(cell, L)
        calls = {
            name: forward_backward(lambda x, run=run: run(cell, x, weights), x)
            for name, run in runs.items()
        }
        if cell is GRU:
            calls["torch.nn.GRU"] = forward_backward(torch_gru(weights), x)
        return calls

    yield from rows(sweep(lengths, forward, **OPTIONS), what="forward", shape=SHAPE)
    yield from rows(sweep(lengths, both, **OPTIONS), what="forward + backward", shape=SHAPE)


@register("pararnn-gru", "a diagonal GRU by Newton's method against its loops")
def pararnn_gru(quick: bool) -> Iterator[Row]:
    yield from _race(GRU, quick)


@register("pararnn-lstm", "an LSTM of 2 x 2 blocks by Newton's method against its loop")
def pararnn_lstm(quick: bool) -> Iterator[Row]:
    yield from _race(LSTM, quick)
