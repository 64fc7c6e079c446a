"""Exact attention on this machine: against PyTorch's, compiled flex attention and Longformer's.

The sliding-window races check equality with whoever computes the same. Dense causal attention
does not; it is raced unchecked, as what a window is meant to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...primitives import attention, masks, visible_keys
from ..gradients import forward_backward
from ..race import Missing, race
from ..scaling import sweep
from . import Row, peer, register, rows

H, D = 8, 64


def _qkv(L: int, S: int | None = None, heads: int = H, groups: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, L), (groups or heads, S or L), (groups or heads, S or L))
    return [torch.randn(1, h, n, D, generator=generator) for h, n in shapes]


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, return_lse=True)[0]


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@register("attention-lse", "causal attention with its log-sum-exp against PyTorch's without it")
def attention_lse(quick: bool) -> Iterator[Row]:
    lengths = (128, 256) if quick else (256, 512, 1024, 2048, 4096)

    def forward(L: int) -> dict[str, Callable]:
        q, k, v = _qkv(L)
        return {"corelib": lambda: _with_lse(q, k, v), "torch": lambda: _dense(q, k, v)}

    def both(L: int) -> dict[str, Callable]:
        tensors = _qkv(L)
        runs = {"corelib": _with_lse, "torch": _dense}
        return {name: forward_backward(run, *tensors) for name, run in runs.items()}

    shape = f"B1 H{H} D{D} float32"
    yield from rows(sweep(lengths, forward), what="forward", shape=shape, flops=_causal_flops)
    yield from rows(sweep(lengths, both), what="forward + backward", shape=shape)


def _causal_flops(L: int) -> int:
    """Two products of width D over half of the square, each multiplying and adding."""
    return 2 * H * L * L * D


@register("attention-aligned", "queries that align with the last keys: a chunk, and decoding")
def attention_aligned(quick: bool) -> Iterator[Row]:
    S = 512 if quick else 8192
    for what, L in (("chunk of 256", 256), ("decoding", 1)):
        q, k, v = _qkv(L, S, heads=H, groups=2)
        mask = visible_keys(L, S, causal=True)
        contestants = {
            "corelib": lambda q=q, k=k, v=v: _with_lse(q, k, v),
            "torch with a mask": lambda q=q, k=k, v=v, mask=mask: F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=True
            ),
        }
        yield from rows(race(contestants), what=what, shape=f"B1 H{H} G2 D{D} S{S} float32")


@register("sliding-window", "causal attention with a window of 512")
def sliding_window(quick: bool) -> Iterator[Row]:
    window = 64 if quick else 512
    longest = 512 if quick else 8192
    q, k, v = _qkv(longest)
    shape = f"B1 H{H} D{D} window {window} float32"

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, window=window)

    mask = masks.attention_mask(causal=True, window=window)
    same = {"corelib": lambda: ours(q, k, v)}
    same |= {f"compiled flex, block {n}": _flex(mask, n, q, k, v) for n in (64, 128)}
    yield from rows(race(same), what="forward", shape=f"{shape} L{longest}")

    dense = {"corelib": lambda: ours(q, k, v), "torch, dense causal": lambda: _dense(q, k, v)}
    yield from rows(
        race(dense, check=None), what="forward, against no window", shape=f"{shape} L{longest}"
    )
    dense = {
        "corelib": forward_backward(ours, q, k, v),
        "torch, dense causal": forward_backward(_dense, q, k, v),
        "compiled flex": Missing("flex attention has no backward pass on a CPU"),
    }
    yield from rows(
        race(dense, check=None, repeats=3),
        what="forward + backward, against no window",
        shape=f"{shape} L{longest}",
    )
    lengths = (128, 256) if quick else (1024, 2048, 4096, 8192, 16384)

    def alone(L: int) -> dict[str, Callable]:
        tensors = _qkv(L)
        return {"corelib": lambda: ours(*tensors)}

    yield from rows(sweep(lengths, alone), what="growth with the length", shape=shape)


def _flex(mask: masks.Mask, block: int, q: Tensor, k: Tensor, v: Tensor) -> Callable | Missing:
    """Compiled flex attention with a block mask, or why it cannot be had."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        L, S = q.shape[2], k.shape[2]
        blocks = create_block_mask(mask, None, None, L, S, device="cpu", BLOCK_SIZE=block)
        compiled = torch.compile(flex_attention)
        compiled(q, k, v, block_mask=blocks)
    except Exception as problem:  # no C++ compiler, an older PyTorch, another processor
        return Missing(f"does not compile here ({type(problem).__name__})")
    return lambda: compiled(q, k, v, block_mask=blocks)


@register("longformer", "two-sided window: the attention inside transformers' Longformer")
def longformer(quick: bool) -> Iterator[Row]:
    heads, L, side = (2, 256, 32) if quick else (12, 4096, 256)
    q, k, v = _qkv(L, heads=heads)
    shape = f"B1 H{heads} D{D} L{L} {side} keys on each side float32"

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=False, window=side + 1)

    theirs = _longformer(heads, side)
    if isinstance(theirs, Missing):
        forward = both = theirs
    else:
        forward, both = lambda: theirs(q, k, v), forward_backward(theirs, q, k, v)
    contestants = {"corelib": lambda: ours(q, k, v), "transformers": forward}
    with torch.no_grad():
        yield from rows(race(contestants), what="forward", shape=shape)
    contestants = {"corelib": forward_backward(ours, q, k, v), "transformers": both}
    yield from rows(race(contestants, repeats=3), what="forward + backward", shape=shape)


def _longformer(heads: int, side: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | Missing:
    """``LongformerSelfAttention`` on given q, k, v: its projections hand them through."""
    module = peer("transformers.models.longformer.modeling_longformer")
    if isinstance(module, Missing):
        return module
    config = peer("transformers").LongformerConfig(
        attention_window=[2 * side],
        hidden_size=heads * D,
        num_attention_heads=heads,
        attention_probs_dropout_prob=0.0,
    )
    layer = module.LongformerSelfAttention(config, 0).eval()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        L = q.shape[2]
        for name, x in (("query", q), ("key", k), ("value", v)):
            flat = x.permute(2, 0, 1, 3).reshape(L, 1, heads * D)
            setattr(layer, name, _Given(flat))
        nothing = torch.zeros(1, L, dtype=torch.bool)
        out = layer(
            torch.zeros(1, L, heads * D),
            attention_mask=torch.zeros(1, L),
            is_index_masked=nothing,
            is_index_global_attn=nothing,
            is_global_attn=False,
        )[0]
        return out.unflatten(-1, (heads, D)).transpose(1, 2)

    return run


class _Given(torch.nn.Module):
    """A projection whose result is known."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = result

    def forward(self, hidden: Tensor) -> Tensor:
        return self.result
