"""Parts of LMUFormer that can run over a stretch and position by position alike.

`Chain` joins layers into one sequence mixer: those with a state of their own (`CausalConv`, an LMU,
spiking neurons), and modules that act on each position alone (``nn.Linear``, an activation,
`ChannelNorm`), which need no ``step``. `StreamingClassifier` puts a head behind it that says after
every position what it would say if the input ended here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Rows = Float[Tensor, "B L C"]
Before = Float[Tensor, "B W C"]


class Chain(nn.Module):
    """Layers one after the other, as one sequence mixer; its state is a list of theirs."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        return self._run(x, [None] * len(self.layers) if state is None else state, False)

    def step(self, x_t: Tensor, state: list) -> tuple[Tensor, list]:
        return self._run(x_t, state, True)

    def init_state(self, batch: int) -> list:
        return [_keeps_state(layer) and layer.init_state(batch) for layer in self.layers]

    def _run(self, x: Tensor, state: list, steps: bool) -> tuple[Tensor, list]:
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            if _keeps_state(layer):
                x, before = (layer.step if steps else layer)(x, before)
            else:
                x = layer(x)
            after.append(before)
        return x, after


class Residual(Chain):
    """A chain whose input is added to its output."""

    def _run(self, x: Tensor, state: list, steps: bool) -> tuple[Tensor, list]:
        y, state = super()._run(x, state, steps)
        return x + y, state


class CausalConv(nn.Module):
    """A convolution over the last ``width`` positions, without bias; the state holds the others."""

    def __init__(self, inputs: int, channels: int, *, width: int = 3):
        super().__init__()
        self.before = width - 1
        self.weight = nn.Parameter(nn.Conv1d(inputs, channels, width).weight.detach())

    def forward(self, x: Rows, state: Before | None = None) -> tuple[Tensor, Tensor]:
        state = self.init_state(len(x)) if state is None else state
        seen = torch.cat([state, x], 1)
        if not x.shape[1]:
            return x.new_zeros(len(x), 0, len(self.weight)), state
        return F.conv1d(seen.mT, self.weight).mT, seen[:, seen.shape[1] - self.before :]

    def step(self, x_t: Float[Tensor, "B C"], state: Before) -> tuple[Tensor, Tensor]:
        seen = torch.cat([state, x_t[:, None]], 1)
        return F.linear(seen.mT.flatten(1), self.weight.flatten(1)), seen[:, 1:]

    def init_state(self, batch: int) -> Tensor:
        return self.weight.new_zeros(batch, self.before, self.weight.shape[1])


class ChannelNorm(nn.BatchNorm1d):
    """Batch norm of the last axis: in training over batch and time, afterwards fixed numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class Stream(NamedTuple):
    """What a classifier remembers: its layers' states, and the sum and number of its logits."""

    body: list
    total: Float[Tensor, "B classes"]
    seen: int


class StreamingClassifier(nn.Module):
    """``body (B, L, F) -> (B, L, C)``, a linear head, and the mean of its logits over positions."""

    def __init__(self, body: Chain, channels: int, classes: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, classes)

    def forward(self, x: Rows) -> Float[Tensor, "B classes"]:
        """Logits for whole sequences."""
        if x.dim() != 3 or not x.shape[1]:
            raise ValueError(f"x: expected (B, L, F) with at least one step, got {tuple(x.shape)}")
        return self.head(self.body(x)[0].mean(1))

    def prefix_logits(self, x: Rows) -> Float[Tensor, "B L classes"]:
        """Logits after every position: what `step` gives, in parallel."""
        logits = self.head(self.body(x)[0])
        return logits.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(logits)[:, None]

    def step(self, x_t: Float[Tensor, "B F"], state: Stream) -> tuple[Tensor, Stream]:
        """Logits for all positions up to this one. Batch norms must be in evaluation mode."""
        if self.training:
            raise ValueError("step: expected a model in evaluation mode (call .eval()), for its "
                             "batch norms have no statistics of a single position")  # fmt: skip
        y, body = self.body.step(x_t, state.body)
        total, seen = state.total + self.head(y), state.seen + 1
        return total / seen, Stream(body, total, seen)

    def init_state(self, batch: int) -> Stream:
        return Stream(
            self.body.init_state(batch), self.head.weight.new_zeros(batch, len(self.head.weight)), 0
        )


def early_exit(
    logits: Float[Tensor, "B L classes"], confidence: float
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """``(labels, lengths)``: stop where the most likely class first has that probability.

    Args:
        logits: after every position, from `StreamingClassifier.prefix_logits`.
        confidence: above 0; a row that never gets there runs to its end.
    """
    if logits.dim() != 3 or not logits.shape[1]:
        raise ValueError(f"logits: expected (B, L, classes), L > 0, got {tuple(logits.shape)}")
    if not confidence > 0:
        raise ValueError(f"confidence: expected more than 0, got {confidence}")
    sure = logits.softmax(-1).amax(-1) >= confidence
    sure[:, -1] = True
    stop = sure.int().argmax(1)
    return logits[torch.arange(len(stop)), stop].argmax(-1), stop + 1


def _keeps_state(layer: nn.Module) -> bool | None:
    return hasattr(layer, "step") or None
