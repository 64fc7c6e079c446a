"""Attention with a window and sinks as a layer, for stacks that mix it with layers of long reach.

What a mixer with a small state blurs, a window keeps sharp: RAT's hybrid (`rat_hybrid`) and JRT's
stack (`jrt_stack`) take turns. A token sees itself, the ``window - 1`` before it and the first
``sinks`` (Longformer, arXiv 2004.05150; sinks: StreamingLLM, arXiv 2309.17453); positions are
RoPE's. Decoding keeps ``window + sinks`` keys and values in a ring, whatever the length.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives import attention, rope_frequencies, rope_half_split
from corelib.primitives.sliding_window import RingCache


class LocalAttention(nn.Module):
    """Attention to the last ``window`` tokens and the first ``sinks``; a sequence mixer."""

    def __init__(self, C: int, heads: int, *, window: int, sinks: int = 0):
        super().__init__()
        if heads < 1 or C % (2 * heads):
            raise ValueError(f"heads: expected C = {C} in shares of even width, got {heads}")
        RingCache(window, sinks)  # checks both
        self.heads, self.window, self.sinks = heads, window, sinks
        self.enter, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.frequencies = rope_frequencies(C // heads)

    def init_state(self, batch: int) -> RingCache:
        """An empty ring; `forward` leaves the one it is given as it is, `step` writes into it."""
        return RingCache(self.window, self.sinks)

    def forward(
        self, x: Float[Tensor, "B L C"], state: RingCache | None = None
    ) -> tuple[Float[Tensor, "B L C"], RingCache]:
        """``(y, state)`` over a stretch of tokens."""
        state = self.init_state(len(x)) if state is None else state.copy()
        q, k, v = self._project(x, state.seen)
        before = state.ordered()
        state.extend(k, v)
        if before is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v)))
        mixed = attention(q, k, v, causal=True, window=self.window, sinks=self.sinks)
        return self.out(mixed.transpose(1, 2).flatten(2)), state

    def step(
        self, x_t: Float[Tensor, "B C"], state: RingCache
    ) -> tuple[Float[Tensor, "B C"], RingCache]:
        """One token."""
        mixed = state.step(*self._project(x_t[:, None], state.seen))
        return self.out(mixed.flatten(1)), state

    def _project(self, x: Tensor, position: int) -> tuple[Tensor, ...]:
        heads = self.enter(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)
        positions = torch.arange(position, position + x.shape[1], device=x.device)
        turn = positions, self.frequencies.to(x.device)
        return rope_half_split(q, *turn), rope_half_split(k, *turn), v
