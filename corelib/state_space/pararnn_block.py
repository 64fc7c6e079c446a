"""ParaRNN's layers: the cells of `corelib.state_space.pararnn` as sequence mixers, and the paper's
block around them (arXiv 2510.21450; the block is Mamba-2's with the cell in place of its scan).

    layer:     gates = x W                         every channel of x reaches every gate
               h[t] = cell(h[t-1], gates[t])       each channel alone, all t by Newton's method
    block:     u, z = norm(x) W_in                 twice ``expand * C`` channels
               h = layer(silu(conv(u)))            conv: short, causal, each channel alone
               x = x + (norm(h * silu(z))) W_out
               x = x + mlp(norm(x))                SwiGLU, ``8 / 3 * C`` wide

The block's state is the convolution's last inputs and the cell's. Constants that the sources at
hand do not give (widths of the MLP, four inputs of the convolution) are Mamba-2's and Llama's.
Oracle: the same block on `sequential_rnn`, and its own ``step``, which runs the cell itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import causal_short_conv
from .mamba2 import GatedRMSNorm
from .pararnn import GRU, LSTM, Cell, Weights, newton_rnn


class ParaRNN(nn.Module):
    """A nonlinear RNN as a sequence mixer on ``(B, L, C)``, in parallel over the sequence.

    Args:
        channels: width of input, output and state.
        cell: `GRU` or `LSTM`.
        iterations: rounds of Newton's method; ``step`` needs none and is exact.
        bound: the cell's weights are kept within ``-bound .. bound``, where Newton converges.
    """

    def __init__(self, channels: int, cell: Cell = GRU, *, iterations: int = 3, bound: float = 0.5):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if not bound > 0:
            raise ValueError(f"bound: expected more than 0, got {bound}")
        self.channels, self.cell = channels, cell
        self.iterations, self.bound = iterations, bound
        self.enter = nn.Linear(channels, 3 * channels)
        self.own = nn.Parameter((2 * torch.rand(cell.rows, channels) - 1) / math.sqrt(channels))

    def weights(self) -> Weights:
        """The cell's weights, within bounds."""
        return self.own.clamp(-self.bound, self.bound)

    def forward(
        self, x: Float[Tensor, "B L C"], state: Tensor | None = None
    ) -> tuple[Float[Tensor, "B L C"], Tensor]:
        """All positions at once; ``state`` is ``(B, C)``, of an LSTM ``(B, C, 2)``."""
        state = self.init_state(x.shape[0]) if state is None else state
        gates = self.enter(x).unflatten(-1, (3, self.channels))
        h = newton_rnn(self.cell, gates, self.weights(), state, iterations=self.iterations)
        return (h[..., 0] if self.cell.tail else h), (h[:, -1] if x.shape[1] else state)

    def step(self, x_t: Float[Tensor, "B C"], state: Tensor) -> tuple[Tensor, Tensor]:
        """One position by the cell itself."""
        gates = self.enter(x_t).unflatten(-1, (3, self.channels))
        state = self.cell.step(state, gates, self.weights())
        return (state[..., 0] if self.cell.tail else state), state

    def init_state(self, batch: int) -> Tensor:
        """Zeros."""
        return self.own.new_zeros(batch, self.channels, *self.cell.tail)


def ParaGRU(channels: int, **options) -> ParaRNN:
    """`ParaRNN` with the GRU cell: diagonal Jacobians."""
    return ParaRNN(channels, GRU, **options)


def ParaLSTM(channels: int, **options) -> ParaRNN:
    """`ParaRNN` with the LSTM cell: 2 x 2 Jacobians."""
    return ParaRNN(channels, LSTM, **options)


class BlockState(NamedTuple):
    """What a block knows of the past: recent inputs of the convolution, state of the cell."""

    inputs: Float[Tensor, "B E inputs"]
    cell: Float[Tensor, "B E *tail"]


class ParaRNNBlock(nn.Module):
    """The paper's residual block: convolution, nonlinear RNN, gated norm, then an MLP.

    Args:
        width: C. cell: `GRU` or `LSTM`. expand: channels of the RNN for each of the block's.
        conv: inputs that the convolution sees. iterations, bound: as in `ParaRNN`.
    """

    def __init__(
        self,
        width: int,
        cell: Cell = GRU,
        *,
        expand: int = 2,
        conv: int = 4,
        iterations: int = 3,
        bound: float = 0.5,
    ):
        super().__init__()
        for name, value in (("width", width), ("expand", expand), ("conv", conv)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        inner, between = expand * width, -(-8 * width // 3)
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner)
        self.rnn = ParaRNN(inner, cell, iterations=iterations, bound=bound)
        self.gated_norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * between, bias=False)
        self.mlp_out = nn.Linear(between, width, bias=False)

    def forward(
        self, x: Float[Tensor, "B L C"], state: BlockState | None = None
    ) -> tuple[Float[Tensor, "B L C"], BlockState]:
        """The outputs, residual path included, and the state behind the last input."""
        state = self.init_state(len(x)) if state is None else state
        u, z = self.in_proj(self.norm(x)).chunk(2, -1)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        u, inputs = causal_short_conv(u.mT, weight, bias, state=state.inputs, return_state=True)
        u = F.silu(u).mT
        if x.shape[1] == 1:  # a decoding step: the cell itself is exact and costs less
            h, cell = self.rnn.step(u[:, 0], state.cell)
            h = h[:, None]
        else:
            h, cell = self.rnn(u, state.cell)
        x = x + self.out_proj(self.gated_norm(h, z))
        gate, value = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        return x + self.mlp_out(F.silu(gate) * value), BlockState(inputs, cell)

    def step(
        self, x_t: Float[Tensor, "B C"], state: BlockState
    ) -> tuple[Float[Tensor, "B C"], BlockState]:
        """One input more."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch: int) -> BlockState:
        """Nothing seen yet."""
        inner, _, conv = self.conv1d.weight.shape
        inputs = self.conv1d.weight.new_zeros(batch, inner, conv - 1)
        return BlockState(inputs, self.rnn.init_state(batch))


def example() -> dict:
    """A block of width 6, and six tokens for it.

    >>> parts = example()
    >>> parts["mixer"](parts["x"])[0].shape
    torch.Size([2, 6, 6])
    """
    torch.manual_seed(0)
    mixer = ParaRNNBlock(6, iterations=6).double()
    return dict(mixer=mixer, x=torch.randn(2, 6, 6, dtype=torch.float64))
