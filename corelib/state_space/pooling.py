"""A sequence mixer at a fraction of the rate: SaShiMi's pooling (2202.09729, section 4.2).

    z = inner(down(x))       down: (B, L, C) -> (B, L / pool, expand C)        (`DownPool`)
    y = shift(up(z))         up:   (B, L / pool, expand C) -> (B, L, C)        (`UpPool`)

``shift`` moves by ``pool`` samples (one pooled step), zeros first: then an output hears only of
groups that ended before it. `Pooled` puts both around any mixer and keeps the contract: parallel,
stepped and in pieces of any length, groups that are not complete being carried along.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..contracts import SequenceMixer


class DownPool(nn.Module):
    """``pool`` neighbours become one, ``expand`` times as wide."""

    def __init__(self, channels: int, pool: int = 4, expand: int = 2):
        super().__init__()
        for name, value in (("channels", channels), ("pool", pool), ("expand", expand)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.pool = pool
        self.linear = nn.Linear(pool * channels, expand * channels)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B M E"]:
        if x.shape[1] % self.pool:
            raise ValueError(f"x: expected a length divisible by {self.pool}, got {x.shape[1]}")
        return self.linear(x.unflatten(1, (-1, self.pool)).flatten(2))


class UpPool(nn.Module):
    """One becomes ``pool`` neighbours; ``channels`` is the width above."""

    def __init__(self, channels: int, pool: int = 4, expand: int = 2):
        super().__init__()
        self.pool = pool
        self.linear = nn.Linear(expand * channels, pool * channels)

    def forward(self, z: Float[Tensor, "B M E"]) -> Float[Tensor, "B L C"]:
        """One pooled step late, zeros first: causal."""
        spread = self.spread(z)
        return torch.cat([torch.zeros_like(spread[:, : self.pool]), spread], 1)[:, : -self.pool]

    def spread(self, z: Float[Tensor, "B M E"]) -> Float[Tensor, "B L C"]:
        """In place, so that a group's first output hears of its last input."""
        y = self.linear(z)
        return y.reshape(z.shape[0], z.shape[1] * self.pool, y.shape[-1] // self.pool)


class PooledState(NamedTuple):
    """``pending (B, <pool, C)``: inputs of a group not yet complete; ``held (B, pool, C)``: the
    outputs of the group that goes on; ``inner``: the state below, None before its first step."""

    pending: Tensor
    held: Tensor
    inner: Any


class Pooled(nn.Module):
    """``inner``, any sequence mixer of width ``expand * channels``, at a ``pool``-th of the rate.

    Itself a sequence mixer on ``(B, L, C)``; stretches may end inside of a group.
    """

    def __init__(self, inner: SequenceMixer, channels: int, pool: int = 4, expand: int = 2):
        super().__init__()
        self.down = DownPool(channels, pool, expand)
        self.inner, self.channels, self.pool = inner, channels, pool
        self.up = UpPool(channels, pool, expand)

    def forward(
        self, x: Float[Tensor, "B L C"], state: PooledState | None = None
    ) -> tuple[Float[Tensor, "B L C"], PooledState]:
        if state is None:
            state = PooledState(x[:, :0], x.new_zeros(x.shape[0], self.pool, self.channels), None)
        pending, late, inner = state
        phase, ready = pending.shape[1], torch.cat([pending, x], 1)
        whole = ready.shape[1] // self.pool * self.pool
        if whole:
            z, inner = self.inner(self.down(ready[:, :whole]), inner)
            late = torch.cat([late, self.up.spread(z)], 1)  # what is held makes it one step late
        y = late[:, phase : phase + x.shape[1]]
        return y, PooledState(ready[:, whole:], late[:, -self.pool :], inner)

    def step(
        self, x_t: Float[Tensor, "B C"], state: PooledState
    ) -> tuple[Float[Tensor, "B C"], PooledState]:
        """The tier below runs only when this input completes a group."""
        pending, held, inner = state
        y = held[:, pending.shape[1]]
        pending = torch.cat([pending, x_t[:, None]], 1)
        if pending.shape[1] < self.pool:
            return y, PooledState(pending, held, inner)
        inner = self.inner.init_state(x_t.shape[0]) if inner is None else inner
        z, inner = self.inner.step(self.down(pending)[:, 0], inner)
        return y, PooledState(pending[:, :0], self.up.spread(z[:, None]), inner)

    def init_state(self, batch: int) -> PooledState:
        nothing = self.up.linear.weight.new_zeros(batch, self.pool, self.channels)
        return PooledState(nothing[:, :0], nothing, self.inner.init_state(batch))
