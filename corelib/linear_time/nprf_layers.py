"""Layers of kernelised attention with a relative bias (arXiv 2106.12566), around `nprf_rpe`.

Project, take features of the normalised queries and keys, attend under a learnt bias of each head
and distance, project. `NPRFAttention` sees both ways; `CausalNPRFAttention` is a sequence mixer.
Not from the paper: decoding, which a general bias makes as long as the past (`nprf_rpe` says why).
Oracle: the dense form with the layers' own weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.random_features import orthogonal_directions

from .nprf_rpe import kernel_attention_rpe, kernel_attention_rpe_dense, nprf


class History(NamedTuple):
    """What a general bias needs of the past: ``phi_k (B, H, S, m)`` and ``v (B, H, S, V)``."""

    phi_k: Tensor
    v: Tensor


class NPRFAttention(nn.Module):
    """Both ways: ``(B, L, C) -> (B, L, C)`` for up to ``max_len`` positions; the bias starts at 0.

    ``features`` directions (D if None), drawn once, orthogonal, kept with the weights.
    """

    def __init__(
        self,
        C: int,
        heads: int,
        max_len: int,
        *,
        features: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        if max_len < 1:
            raise ValueError(f"max_len: expected at least 1, got {max_len}")
        self.heads, width = heads, C // heads
        self.q, self.k, self.v, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(heads, 2 * max_len - 1))
        directions = orthogonal_directions(features or width, width, generator=generator)
        self.register_buffer("directions", directions)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """Every position sees every other."""
        return self._merge(kernel_attention_rpe(*self._operands(x), self.bias, causal=False))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return nprf(q, self.directions), nprf(k, self.directions), v

    def _merge(self, mixed: Tensor) -> Tensor:
        return self.out(mixed.transpose(1, 2).flatten(2))


class CausalNPRFAttention(NPRFAttention):
    """A sequence mixer (see `contracts`). Its state is the past, for a general bias has no other.

    A stretch from nothing costs O(L log L); what continues one costs its length times the past's.
    """

    def init_state(self, batch: int) -> History:
        """No past."""
        empty = self.bias.new_zeros(batch, self.heads, 0, len(self.directions))
        return History(empty, self.v.weight.new_zeros(*empty.shape[:3], len(self.directions.T)))

    def forward(
        self, x: Float[Tensor, "B L C"], state: History | None = None
    ) -> tuple[Float[Tensor, "B L C"], History]:
        """``(y, state)`` over a stretch of tokens."""
        phi_q, *own = self._operands(x)
        fresh = state is None or state.phi_k.shape[2] == 0
        past = zip(state or own, own, strict=True)
        state = History(*(own if fresh else (torch.cat(pair, 2) for pair in past)))
        form = kernel_attention_rpe if fresh and x.shape[1] > 1 else kernel_attention_rpe_dense
        return self._merge(form(phi_q, *state, self.bias, causal=True)), state

    def step(
        self, x_t: Float[Tensor, "B C"], state: History
    ) -> tuple[Float[Tensor, "B C"], History]:
        """One token."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state
