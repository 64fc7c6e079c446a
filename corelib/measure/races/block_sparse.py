"""Block-sparse attention on this machine: against dense attention, a mask, and FlexAttention.

The contestants compute the same thing: attention over the listed blocks. What a user would pick
otherwise is PyTorch's attention with a boolean mask (as much work as dense), or `flex_attention`
with a block mask, compiled where this machine can compile. Dense causal attention computes
something else and takes part in `block-sparse-density`, to show from which density on lists pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ...primitives.block_scores import keep_ends, reachable_blocks, top_blocks
from ...primitives.block_sparse import BlockLists, block_sparse_attention
from ..gradients import forward_backward
from ..race import Missing, race
from ..scaling import sweep
from . import Row, register, rows

H, D = 4, 64


def random_lists(L: int, block: int, density: float, heads: int = H) -> BlockLists:
    """For each row equally many random blocks, ``density`` of the visible ones in all."""
    generator = torch.Generator().manual_seed(0)
    reachable = reachable_blocks(L, L, block, causal=True)
    n = len(reachable)
    scores = torch.rand(1, heads, n, n, generator=generator).masked_fill(~reachable, -torch.inf)
    each = max(1, round(n * (1 - (1 - density) ** 0.5)))
    return BlockLists.from_mask(keep_ends(top_blocks(scores, each), reachable, last=1), block)


def inputs(L: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, L, D, generator=generator) for _ in range(3)]


def flex(lists: BlockLists, L: int) -> Callable | Missing:
    """``f(q, k, v)`` by compiled FlexAttention over the same blocks."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        listed = lists.mask()
        mask = create_block_mask(
            lambda b, h, i, j: listed[b, h, i // lists.block, j // lists.block] & (j <= i),
            1, H, L, L, device="cpu", BLOCK_SIZE=lists.block,
        )  # fmt: skip
        compiled = torch.compile(flex_attention)
        q, k, v = inputs(L)
        compiled(q, k, v, block_mask=mask)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    except Exception as error:  # no compiler, or shapes that it refuses
        return Missing(f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")


@register("block-sparse", "attention over a quarter of the visible blocks of 128")
def block_sparse_over_length(quick: bool) -> Iterator[Row]:
    lengths = (512, 1024) if quick else (1024, 2048, 4096, 8192, 16384)

    def contestants(L: int) -> dict[str, Callable | Missing]:
        q, k, v = inputs(L)
        lists = random_lists(L, 128, 0.25)
        found = {"corelib": lambda: block_sparse_attention(q, k, v, lists, causal=True)}
        if L <= 4096:  # its mask of L x L x heads booleans
            visible = lists.visible(L, L, causal=True)
            found["torch, masked"] = lambda: F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible
            )
        other = Missing("left out of the quick race") if quick else flex(lists, L)
        missing = isinstance(other, Missing)
        found["flex_attention"] = other if missing else lambda: other(q, k, v)
        return found

    yield from rows(
        sweep(lengths, contestants, min_time=0.02, repeats=3),
        what="forward", shape=f"B1 H{H} D{D} float32, 25 % of blocks of 128",
        flops=lambda L: 4 * D * int(random_lists(L, 128, 0.25).counts.sum()) * 128**2,
    )  # fmt: skip


@register("block-sparse-density", "block-sparse against dense causal attention, by density")
def block_sparse_over_density(quick: bool) -> Iterator[Row]:
    for L in (512,) if quick else (2048, 4096, 8192):
        for block in (64, 128):
            for density in (0.25, 0.5) if quick else (0.1, 0.25, 0.5, 0.75):
                lists = random_lists(L, block, density)
                result = race(_sparse_and_dense(L, lists), check=None, min_time=0.05)
                shape = f"B1 H{H} L{L} D{D} float32, blocks of {block}, {density:.0%} of them"
                yield from rows(result, what="forward", shape=shape)


def _sparse_and_dense(L: int, lists: BlockLists) -> dict[str, Callable]:
    q, k, v = inputs(L)
    return {
        "corelib": lambda: block_sparse_attention(q, k, v, lists, causal=True),
        "torch, dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }


@register("block-sparse-backward", "block-sparse against dense causal attention, both passes")
def block_sparse_backward(quick: bool) -> Iterator[Row]:
    for L in (512,) if quick else (2048, 4096):
        for density in (0.25, 0.5):
            lists = random_lists(L, 128, density)

            def sparse(q, k, v, lists=lists):
                return block_sparse_attention(q, k, v, lists, causal=True)

            def dense(q, k, v):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            contestants = {
                name: forward_backward(function, *inputs(L))
                for name, function in (("corelib", sparse), ("torch, dense", dense))
            }
            result = race(contestants, check=None, min_time=0.05)
            shape = f"B1 H{H} L{L} D{D} float32, {density:.0%} of blocks of 128"
            yield from rows(result, what="forward and backward", shape=shape)
