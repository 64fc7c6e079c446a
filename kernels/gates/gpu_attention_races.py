"""Races of attention's kernels against SDPA and flex_attention; see `gpu_ground`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corelib.kernels.gates.gpu_ground import HALF, Contest, Ground, contestants_of
from corelib.measure import Missing


def _qkv(on: Ground, B: int, H: int, G: int, L: int, S: int, D: int) -> list[Tensor]:
    return [on.randn(B, h, n, D, dtype=on.half) for h, n in ((H, L), (G, S), (G, S))]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def _flex(mask: Callable, B: int | None, H: int | None, L: int, device: str) -> Callable:
    """Compiled flex_attention with a mask of its own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask, B, H, L, L, device, _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True)


def causal_attention(on: Ground, D: int, backward: bool) -> Contest:
    from corelib.kernels.flash_attention import flash_attention

    B, H, G, L = on.size(4, 1), on.size(16, 2), on.size(4, 1), on.size(4096, 40)
    D = on.size(D, 16)
    leaves = _qkv(on, B, H, G, L, L, D)
    flex = on.only_real(lambda: _flex(lambda b, h, i, j: i >= j, None, None, L, on.device))
    functions = {
        "kernel": lambda q, k, v: flash_attention(q, k, v, causal=True),
        "sdpa": lambda q, k, v: _sdpa(q, k, v, is_causal=True),
        "flex_attention": flex,
    }
    flops = 2 * B * H * L * L * D * (3.5 if backward else 1)
    return Contest(contestants_of(functions, leaves, backward), flops=flops, tolerance=HALF)


def decode(on: Ground) -> Contest:
    from corelib.kernels.split_kv_decode import decode_bytes, split_kv_decode, stream_k_decode

    B, H, G, S = on.size(8, 1), on.size(32, 2), on.size(8, 1), on.size(32768, 40)
    D = on.size(128, 16)
    q, k, v = _qkv(on, B, H, G, 1, S, D)
    least = decode_bytes([S] * B, H, G, 1, D, D, partials=B * G, itemsize=q.itemsize)
    return Contest(
        {
            "kernel, stream-K": on.replayed(lambda: stream_k_decode(q, k, v)),
            "kernel, 16 splits": on.replayed(lambda: split_kv_decode(q, k, v, splits=16)),
            "sdpa": on.replayed(lambda: _sdpa(q, k, v)),
            "kernel, stream-K, launched": lambda: stream_k_decode(q, k, v),
            "sdpa, launched": lambda: _sdpa(q, k, v),
        },
        bytes=least,
        tolerance=HALF,
    )


def block_sparse(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.block_sparse_attention import block_sparse_attention
    from corelib.primitives.block_sparse import BlockLists

    B, H, G, L = 1, on.size(16, 2), on.size(4, 1), on.size(8192, 48)
    D, block = on.size(128, 16), on.size(128, 16)
    n = L // block
    chosen = on.rand(B, H, n, n) < 0.25
    chosen |= torch.eye(n, dtype=torch.bool, device=on.device)
    chosen &= torch.ones_like(chosen).tril()
    lists = BlockLists.from_mask(chosen, block)
    leaves = _qkv(on, B, H, G, L, L, D)

    def seen(b, h, i, j):
        return chosen[b, h, i // block, j // block] & (i >= j)

    functions = {
        "kernel": lambda q, k, v: block_sparse_attention(q, k, v, lists, causal=True),
        "flex_attention": on.only_real(lambda: _flex(seen, B, H, L, on.device)),
    }
    if on.small:
        everywhere = chosen.repeat_interleave(block, 2).repeat_interleave(block, 3).tril()
        functions["sdpa, masked"] = lambda q, k, v: _sdpa(q, k, v, attn_mask=everywhere)
    flops = 4 * D * block**2 * int(chosen.sum()) * (3.5 if backward else 1)
    return Contest(contestants_of(functions, leaves, backward), flops=flops, tolerance=HALF)


def vertical_slash(on: Ground) -> Contest:
    from corelib.kernels.vertical_slash_attention import vertical_slash_attention
    from corelib.primitives.vertical_slash import kept_keys

    H, G, L, D = on.size(16, 2), on.size(4, 1), on.size(8192, 64), on.size(128, 16)
    q, k, v = _qkv(on, 1, H, G, L, L, D)
    columns = on.rand(1, H, L) < 0.02
    distances = on.rand(1, H, L) < 0.005
    distances[..., : L // 32] = True

    # Whole blocks of 64 queries share what any slash of theirs covers.
    kept = torch.logical_or(*kept_keys(columns[0], distances[0], L, 64))
    mask = kept.repeat_interleave(64, 1)[:, :L].tril()

    def seen(b, h, i, j):
        return (i >= j) & kept[h, i // 64, j]

    flex = on.only_real(lambda: _flex(seen, 1, H, L, on.device))
    return Contest(
        {
            "kernel": lambda: vertical_slash_attention(q, k, v, columns, distances),
            "flex_attention": flex if isinstance(flex, Missing) else lambda: flex(q, k, v),
            "sdpa, masked": lambda: _sdpa(q, k, v, attn_mask=mask),
        },
        tolerance=HALF,
    )


def gather_decode(on: Ground) -> Contest:
    from corelib.kernels.gather_sparse_decode import gather_sparse_decode

    B, H, G, S = on.size(8, 1), on.size(32, 2), on.size(8, 1), on.size(32768, 60)
    n, D = on.size(2048, 9), on.size(128, 16)
    q, k, v = _qkv(on, B, H, G, 1, S, D)
    indices = on.rand(B, G, S).topk(n).indices

    def gathered(q, k, v, indices):
        rows = indices[..., None].expand(-1, -1, -1, D)
        return _sdpa(q, k.gather(2, rows), v.gather(2, rows))

    compiled = on.compiled(gathered)
    least = B * G * n * (2 * D * q.itemsize + 8) + 2 * q.nbytes
    return Contest(
        {
            "kernel": on.replayed(lambda: gather_sparse_decode(q, k, v, indices)),
            "gather, sdpa": on.replayed(lambda: gathered(q, k, v, indices)),
            "gather, sdpa, compiled": on.replayed(lambda: compiled(q, k, v, indices)),
            "kernel, launched": lambda: gather_sparse_decode(q, k, v, indices),
            "gather, sdpa, launched": lambda: gathered(q, k, v, indices),
        },
        bytes=least,
        tolerance=HALF,
    )


def low_rank(on: Ground) -> Contest:
    from corelib.kernels.low_rank_keys import low_rank_bytes, low_rank_keys
    from corelib.primitives.rope import rope_half_split

    B, G, S, R = on.size(8, 1), on.size(8, 2), on.size(32768, 60), on.size(160, 16)
    n, D = on.size(2048, 9), on.size(128, 16)
    left, right = on.randn(B, S, R, dtype=on.half), on.randn(B, G, R, D, dtype=on.half) / R**0.5
    positions = on.rand(B, G, S).topk(n).indices
    frequencies = 10000.0 ** -(torch.arange(D // 2, device=on.device) / (D // 2))

    def plain(left, right, positions, frequencies):
        rows = left[:, None].expand(-1, G, -1, -1)
        rows = rows.gather(2, positions[..., None].expand(-1, -1, -1, R))
        return rope_half_split(rows @ right, positions, frequencies).to(left.dtype)

    compiled = on.compiled(plain)
    given = left, right, positions, frequencies
    return Contest(
        {
            "kernel": on.replayed(lambda: low_rank_keys(*given)),
            "plain": on.replayed(lambda: plain(*given)),
            "plain, compiled": on.replayed(lambda: compiled(*given)),
        },
        bytes=low_rank_bytes(B * G * n, B, G, n, R, D, itemsize=left.itemsize),
        flops=2 * B * G * n * R * D,
        tolerance=HALF,
    )


def column_sums(on: Ground) -> Contest:
    from corelib.kernels.attention_column_sums import attention_column_sums

    H, G, L, D = on.size(16, 2), on.size(4, 1), on.size(8192, 48), on.size(128, 16)
    q, k, _ = _qkv(on, 1, H, G, L, L, D)
    hidden = torch.ones(L, L, dtype=torch.bool, device=on.device).triu(1)

    def scores(q, k):
        wide = k.repeat_interleave(H // G, 1)
        return (q @ wide.mT).float().mul(D**-0.5).masked_fill(hidden, -torch.inf)

    def plain(q, k, lse):
        return torch.exp(scores(q, k) - lse[..., None]).sum(2)

    lse, compiled = scores(q, k).logsumexp(-1), on.compiled(plain)
    return Contest(
        {
            "kernel": lambda: attention_column_sums(q, k, lse, causal=True),
            "whole map": lambda: plain(q, k, lse),
            "whole map, compiled": lambda: compiled(q, k, lse),
        },
        flops=H * L * L * D,
        tolerance=HALF,
    )


def block_scoring(on: Ground) -> Contest:
    from corelib.kernels.block_scores import block_score_bytes, pooled_block_scores

    H, G, L, D = on.size(32, 2), on.size(8, 1), on.size(65536, 64), on.size(128, 16)
    block = on.size(64, 16)
    q, k, _ = _qkv(on, 1, H, G, L, L, D)

    def plain(q, k):
        means = [x.unflatten(2, (-1, block)).float().mean(3).to(x.dtype) for x in (q, k)]
        scores = (means[0] @ means[1].repeat_interleave(H // G, 1).mT).float() * D**-0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf)

    compiled = on.compiled(plain)
    return Contest(
        {
            "kernel": lambda: pooled_block_scores(q, k, block, causal=True).float().exp(),
            "plain": lambda: plain(q, k).exp(),
            "plain, compiled": lambda: compiled(q, k).exp(),
        },
        bytes=block_score_bytes(1, H, G, L, L, D, block=block, itemsize=q.itemsize),
        tolerance=HALF,
    )


#: Kernel module -> what is raced -> the race.
ATTENTION_RACES: dict[str, dict[str, Callable[[Ground], Contest]]] = {
    "flash_attention": {
        "causal, B4 H16 G4 L4096 D128": lambda on: causal_attention(on, 128, False),
        "causal, B4 H16 G4 L4096 D64": lambda on: causal_attention(on, 64, False),
        "with backward, D128": lambda on: causal_attention(on, 128, True),
        "with backward, D64": lambda on: causal_attention(on, 64, True),
    },
    "split_kv_decode": {"B8 H32 G8 S32768 D128, as CUDA graphs": decode},
    "block_sparse_attention": {
        "a quarter of the blocks of 128, H16 L8192 D128": lambda on: block_sparse(on, False),
        "with backward": lambda on: block_sparse(on, True),
    },
    "vertical_slash_attention": {"H16 L8192 D128": vertical_slash},
    "gather_sparse_decode": {"2048 of 32768 keys, B8 H32 G8 D128, as CUDA graphs": gather_decode},
    "low_rank_keys": {"2048 of 32768 keys, B8 G8 R160 D128, as CUDA graphs": low_rank},
    "attention_column_sums": {"H16 L8192 D128": column_sums},
    "block_scores": {"H32 G8 L65536 D128, blocks of 64": block_scoring},
}
