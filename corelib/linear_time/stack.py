"""Sequence mixers on top of one another, each behind a norm and beside a residual path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MixerStack(nn.Module):
    """``x + mixer(norm(x))``, layer after layer; a sequence mixer whose state is a list."""

    def __init__(self, mixers: Iterable[nn.Module]):
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def init_state(self, batch: int) -> list:
        """Every layer's, before the first token."""
        return [mixer.init_state(batch) for mixer in self.mixers]

    def forward(
        self, x: Float[Tensor, "B L C"], state: list | None = None
    ) -> tuple[Float[Tensor, "B L C"], list]:
        """``(y, state)`` over a stretch of tokens."""
        return self.run(x, state, [{}] * len(self.mixers))

    def run(
        self,
        x: Float[Tensor, "B L C"],
        state: list | None,
        options: Sequence[dict[str, Any]],
    ) -> tuple[Float[Tensor, "B L C"], list]:
        """`forward` with keywords for each layer."""
        states = []
        held = state or [None] * len(self.mixers)
        for mixer, before, given in zip(self.mixers, held, options, strict=True):
            y, after = mixer(F.rms_norm(x, x.shape[-1:]), before, **given)
            x = x + y
            states.append(after)
        return x, states

    def step(self, x_t: Float[Tensor, "B C"], state: list) -> tuple[Float[Tensor, "B C"], list]:
        """One token."""
        states = []
        for mixer, before in zip(self.mixers, state, strict=True):
            y, after = mixer.step(F.rms_norm(x_t, x_t.shape[-1:]), before)
            x_t = x_t + y
            states.append(after)
        return x_t, states
