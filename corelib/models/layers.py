"""The building blocks of the lab's small models: what LLaMA-like models are made of.

Names and layouts follow Hugging Face's ``LlamaForCausalLM``, so that weights can be copied either
way: RMSNorm (Zhang & Sennrich, arXiv 1910.07467), rotary positions on half-split pairs (Su et al.,
arXiv 2104.09864), SwiGLU (Shazeer, arXiv 2002.05202), grouped-query attention (Ainslie et al.,
arXiv 2305.13245).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from ..primitives import (
    attention,
    masked_attention_reference,
    rope_half_split,
    visible_keys,
)


def attend(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    *,
    causal: bool = True,
    scale: float | None = None,
    pads: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B H L D"]:
    """Attention by the contract; row ``b`` ignores its first ``pads[b]`` keys."""
    if pads is None:
        return attention(q, k, v, causal=causal, scale=scale)
    visible = visible_keys(q.shape[2], k.shape[2], causal=causal)
    visible = visible & (torch.arange(k.shape[2]) >= pads[:, None, None, None])
    return masked_attention_reference(q, k, v, visible, scale=scale)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``; the mean square is taken in float32 at least."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; ``H`` query, ``G`` key/value heads.

    ``qkv_bias``: queries, keys and values have a bias, as in Qwen2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        causal: bool,
        qkv_bias: bool = False,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.causal = causal
        self.q_proj = nn.Linear(width, heads * head_width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        positions: Real[Tensor, "*b L"],
        frequencies: Float[Tensor, " pairs"],
        cache=None,
        layer: int = 0,
    ) -> Float[Tensor, "B L C"]:
        B, L, _ = x.shape
        q = self.q_proj(x).view(B, L, self.heads, self.head_width).transpose(1, 2)
        k = self.k_proj(x).view(B, L, self.kv_heads, self.head_width).transpose(1, 2)
        v = self.v_proj(x).view(B, L, self.kv_heads, self.head_width).transpose(1, 2)
        q, k = (rope_half_split(t, positions, frequencies) for t in (q, k))
        if cache is None:
            out = attend(q, k, v, causal=self.causal)
        else:
            cache.append(layer, k, v)
            out = cache.attend(layer, q)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))

    @torch.no_grad()
    def look_back(
        self, frequencies: Float[Tensor, " pairs"], *, strength: float, pairs: int = 8
    ) -> None:
        """Set the biases so that, of itself, head ``h`` looks most at the token ``h + 1`` back.

        Without any bias nothing in a query or key is the same at all tokens, and looking at a
        distance is learnt slowly. Only the ``pairs`` fastest rotations tell neighbours apart.
        """
        D = self.head_width
        pairs = min(pairs, D // 2)
        for projection, back in ((self.q_proj, 1), (self.k_proj, 0)):
            bias = projection.bias.zero_().view(-1, D)
            heads = torch.arange(len(bias), dtype=frequencies.dtype)
            angle = -back * (heads[:, None] + 1) * frequencies[:pairs]
            bias[:, :pairs] = strength * angle.cos()
            bias[:, D // 2 : D // 2 + pairs] = strength * angle.sin()
        self.v_proj.bias.zero_()


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        hidden: int,
        causal: bool,
        qkv_bias: bool = False,
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(width)
        self.self_attn = Attention(width, heads, kv_heads, head_width, causal, qkv_bias)
        self.post_attention_layernorm = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)

    def forward(self, x, positions, frequencies, cache=None, layer: int = 0):
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, positions, frequencies, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))
