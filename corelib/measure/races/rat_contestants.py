"""Who races against RAT (arXiv 2507.04416): the same function in other words, and other layers.

* The function: `ours`; `written_out`, a masked softmax; `flex_over_ends`, compiled flex attention.
* Beside it, functions that are not the same: `dense` attention, and the layers of `layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...linear_time.local_attention import LocalAttention
from ...linear_time.rat import RAT, chunk_scan, rat_attention
from ...linear_time.rat_hybrid import RATHybrid
from ...primitives import masks
from ..race import Missing

H, D, CHUNK = 8, 64, 16


def inputs(L: int, heads: int = H) -> list[Tensor]:
    """q, k, v and gates, laid out as a layer's projections leave them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn(4, 1, L, heads, D, generator=generator).transpose(2, 3)
    return [q, k, v, g.sigmoid()]


def averages(k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    flat = [x.transpose(1, 2).flatten(2) for x in (g, k, v)]
    both = (chunk_scan(flat[0], x, CHUNK) for x in flat[1:])
    return [x.unflatten(2, (g.shape[1], -1)).transpose(1, 2) for x in both]


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = CHUNK) -> Tensor:
    return rat_attention(q, k, v, g, chunk)[0]


def dense(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """One softmax over the scores of all ends, hidden by a mask, and the token's own."""
    own_k, own_v = averages(k, v, g)
    ends_k, ends_v = (x[:, :, CHUNK - 1 :: CHUNK] for x in (own_k, own_v))
    number = torch.arange(q.shape[2])[:, None] // CHUNK
    hidden = torch.arange(ends_k.shape[2]) >= number
    scores = (q @ ends_k.mT).masked_fill(hidden, -torch.inf)
    scores = torch.cat([scores, (q * own_k).sum(-1, keepdim=True)], -1) * D**-0.5
    shares = scores.softmax(-1)
    return shares[..., :-1] @ ends_v + shares[..., -1:] * own_v


def flex_over_ends(L: int) -> Callable | Missing:
    """Compiled flex attention over the ends and, on a diagonal, the own averages: on a CPU it does
    not return the log-sum-exp with which the released code merges the two."""
    count = L // CHUNK
    mask = masks.Mask(
        lambda b, h, i, j: ((j < count) & (j < i // CHUNK)) | (j == i + count), "ends and own"
    )
    q, k, v, _ = inputs(L)
    longer = [torch.cat([x[:, :, ::CHUNK], x], 2) for x in (k, v)]
    flex = compiled_flex(mask, 64, q, *longer)
    if isinstance(flex, Missing):
        return flex

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        own = averages(k, v, g)
        return flex(q, *(torch.cat([x[:, :, CHUNK - 1 :: CHUNK], x], 2) for x in own))

    return run


def compiled_flex(mask: masks.Mask, block: int, *qkv: Tensor) -> Callable | Missing:
    """Flex attention under ``mask`` for tensors like these, or why it cannot be had."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        sizes = qkv[0].shape[2], qkv[1].shape[2]
        blocks = create_block_mask(mask, None, None, *sizes, device="cpu", BLOCK_SIZE=block)
        compiled = torch.compile(partial(flex_attention, block_mask=blocks), dynamic=False)
        compiled(*qkv)
    except Exception as problem:  # no C++ compiler, an older PyTorch, another processor
        return Missing(f"does not compile here ({type(problem).__name__})")
    return compiled


class DenseAttention(nn.Module):
    """Causal attention on ``(B, L, C)`` with PyTorch's fastest kernel; no positions, no gate."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.heads, self.enter = heads, nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        heads = self.enter(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        return self.out(dense(*heads.chunk(3, 1)).transpose(1, 2).flatten(2)), None


def layers(C: int, heads: int, chunk: int, window: int) -> dict[str, nn.Module]:
    """Two layers of each kind."""
    torch.manual_seed(0)
    return {
        "corelib": nn.ModuleList([RAT(C, heads, chunk=chunk) for _ in range(2)]),
        "RAT, local attention": nn.ModuleList([RATHybrid(C, heads, chunk=chunk, window=window)]),
        "local attention": nn.ModuleList(
            [LocalAttention(C, heads, window=window) for _ in range(2)]
        ),
        "dense attention": nn.ModuleList([DenseAttention(C, heads) for _ in range(2)]),
    }
