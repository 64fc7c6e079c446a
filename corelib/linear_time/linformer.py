"""Linformer (Wang et al., arXiv 2006.04768): attention over mixtures of positions.

    softmax(q (E k)^T / sqrt(D)) (F v)          E, F (R, length): learned, R fixed

``R`` mixed keys stand for all: a token costs the same however long the text is. Each of them has
seen every position, so there is no causal form. With ``E = F = I`` it is attention. The layers here
are what `greenformers` compares: plain attention, Linformer, and the feed-forward around them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives import attention


def linformer_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    E: Float[Tensor, "R S"],
    F: Float[Tensor, "R S"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H L V"]:
    """``softmax(q (E k)^T) (F v)``: ``R`` mixtures of keys in place of ``S`` keys."""
    if E.shape[-1] != k.shape[2] or F.shape[-1] != v.shape[2]:
        shapes = tuple(E.shape), tuple(F.shape)
        raise ValueError(f"E, F: expected (R, {k.shape[2]}), got {shapes}")
    return attention(q, E @ k, F @ v, causal=False, scale=scale)


class SelfAttention(nn.Module):
    """Attention over all positions on ``(B, L, C)``: four projections."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=False)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        return self.out(self.mix(q, k, v).transpose(1, 2).flatten(2))


class LinformerAttention(SelfAttention):
    """`SelfAttention` over ``rank`` mixtures of at most ``length`` positions.

    ``E, F (rank, length)``, one pair for all heads. A shorter text uses their first columns.
    """

    def __init__(self, C: int, heads: int, *, length: int, rank: int):
        super().__init__(C, heads)
        self.E, self.F = (nn.Parameter(torch.randn(rank, length) * length**-0.5) for _ in "EF")

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, length = k.shape[2], self.E.shape[1]
        if n > length:
            raise ValueError(f"x: expected at most {length} positions, got {n}")
        return linformer_attention(q, k, v, self.E[:, :n], self.F[:, :n])


class TransformerLayer(nn.Module):
    """``x + mixer(norm(x))``, then the same with two linear layers, ``4 C`` wide in between."""

    def __init__(self, mixer: nn.Module, C: int):
        super().__init__()
        self.mixer = mixer
        self.mixer_norm, self.norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))
