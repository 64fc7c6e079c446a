"""Attention over vertical columns and slashes: some keys for all queries, some distances for all.

In a causal attention map a column is one key that everybody looks at, a slash (diagonal) one
distance ``o``: query ``i`` looks at key ``i - o``. A kernel works on tiles, so for a block of
queries at positions ``p .. p + block`` the kept keys are

    by slash:   p - o .. p - o + block      for every kept distance o, and for o = 0
    by column:  every kept column that no slash of the block covers already

A slash thus covers a parallelogram's bounding square: a little more than its line, never less, and
every key counts once. Causality holds key by key. The lists of a block are a few ranges and a few
single keys, and the work is theirs alone (MInference, arXiv 2407.02490, appendix C.4). Which lines
to keep is the caller's: MInference's estimate writes 64 rows of probabilities out, linear in S.

* `vertical_slash_attention`: on a CPU kept keys are gathered tile by tile (``_gathered``), and
  gradients flow; on a GPU the Triton kernel of ``corelib.kernels.vertical_slash_attention``.
* `vertical_slash_attention_reference`: dense attention under the mask of kept keys.

``columns (B, H, S)`` and ``distances (B, H, S)`` are booleans; queries align with the last keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._checks import check_attention
from ._gathered import Chunk, Part, alike, gathered_attention
from .attention import OutAndLse, masked_attention_reference, visible_keys
from .block_sparse import check_block


def kept_keys(
    columns: Bool[Tensor, "heads S"], distances: Bool[Tensor, "heads S"], L: int, block: int
) -> tuple[Bool[Tensor, "heads nq S"], Bool[Tensor, "heads nq S"]]:
    """Keys of each query block by slash and by column: disjoint, causality left aside."""
    S = columns.shape[-1]
    counted = distances.int()
    counted[:, :1] = 1
    before = F.pad(counted.cumsum(-1, dtype=torch.int32), (1, 0))  # distances below each number
    first = torch.arange(0, L, block, device=columns.device) + S - L
    ahead = first[:, None] - torch.arange(S, device=columns.device)  # kept: ahead <= o < + block
    low, high = ahead.clamp(0, S), (ahead + block).clamp(0, S)
    by_slash = before[:, high] > before[:, low]
    return by_slash, columns[:, None] & ~by_slash


class SlashLists(NamedTuple):
    """What the kernel walks, a row per (batch row, head, query block), in compressed sparse rows.

    Ranges ``starts .. stops`` are disjoint and at most a block long; ``keys`` are single columns.
    """

    range_offsets: Int[Tensor, " rows1"]
    starts: Int[Tensor, " ranges"]
    stops: Int[Tensor, " ranges"]
    key_offsets: Int[Tensor, " rows1"]
    keys: Int[Tensor, " singles"]


def slash_lists(
    columns: Bool[Tensor, "B H S"], distances: Bool[Tensor, "B H S"], L: int, block: int
) -> SlashLists:
    """Ranges and single keys of every query block, without keys that none of it may see."""
    S = columns.shape[-1]
    by_slash, by_column = kept_keys(columns.flatten(0, 1), distances.flatten(0, 1), L, block)
    place = torch.arange(S, device=columns.device)
    last = torch.arange(0, L, block, device=columns.device).add(block).clamp(max=L) + S - L
    visible = place < last[:, None]
    by_slash, by_column = (by_slash & visible).flatten(0, 1), (by_column & visible).flatten(0, 1)
    begins = by_slash & ~F.pad(by_slash, (1, 0))[:, :-1]
    run = torch.where(begins, place, 0).cummax(-1).values  # where the run of each key began
    begins = by_slash & ((place - run) % block == 0)
    gaps = torch.where(by_slash, S, place).flip(-1).cummin(-1).values.flip(-1)  # where it ends
    starts = begins.nonzero()[:, 1]
    stops = torch.minimum(starts + block, gaps[begins])
    offsets = [F.pad(x.sum(-1).cumsum(0), (1, 0)).int() for x in (begins, by_column)]
    keys = by_column.nonzero()[:, 1]
    return SlashLists(offsets[0], starts.int(), stops.int(), offsets[1], keys.int())


def vertical_slash_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    columns: Bool[Tensor, "B H S"],
    distances: Bool[Tensor, "B H S"],
    *,
    scale: float | None = None,
    block: int = 64,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """Causal attention over the kept columns and slashes; ``(out, lse)`` with ``return_lse=True``.

    ``columns[b, h, j]``: key ``j`` is kept for all queries; ``distances[b, h, o]``: query at
    position ``p`` keeps key ``p - o``, and with it the keys that its block needs for the others.
    Distance 0 is always kept. Raises ValueError or TypeError for what does not fit.
    """
    check_vertical_slash(q, k, v, columns, distances, scale, block)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.is_cuda:
        from corelib.kernels.vertical_slash_attention import vertical_slash_attention as kernel

        options = dict(scale=scale, block=block, return_lse=return_lse)
        return kernel(q, k, v, columns, distances, **options)
    B, H, L, D = q.shape
    rest = -L % block
    tiles = (F.pad(q, (0, 0, 0, rest)) if rest else q).reshape(-1, block, D)
    chunks = _chunks(q, k, columns, distances, block)
    keys, values = (x.reshape(-1, 1, x.shape[-1]) for x in (k, v))
    out, lse = gathered_attention(tiles, keys, values, chunks, scale)
    out, lse = (x.reshape(B, H, -1, *x.shape[2:])[:, :, :L] for x in (out, lse))
    return (out, lse) if return_lse else out


def _chunks(q, k, columns, distances, block) -> list[Chunk]:
    """Each tile's kept keys before its own block, and then its own block under a triangle."""
    (B, H, L, D), (_, G, S, _) = q.shape, k.shape
    first = torch.arange(0, L, block) + S - L
    counts, keys = [], []
    for head in range(B * H):  # one at a time: nq x S booleans, not B x H x nq x S
        kept = kept_keys(
            columns.flatten(0, 1)[head, None], distances.flatten(0, 1)[head, None], L, block
        )
        past = (kept[0] | kept[1])[0] & (torch.arange(S) < first[:, None])
        counts.append(past.sum(-1))
        start = head // H * G + head % H // (H // G)
        keys.append(past.nonzero()[:, 1] + start * S)
    counts, keys = torch.cat(counts), torch.cat(keys)
    offsets = counts.cumsum(0) - counts
    chunks = []
    for tiles in alike(counts + 1, D, share=0.75):  # + 1: a tile without a past has its own block
        own = Part(*_own_block(tiles, first, H, G, S, block, k.dtype))
        n = int(counts[tiles[0]])
        if n == 0:
            chunks.append(Chunk(tiles, [own]))
            continue
        place = torch.arange(n)
        exists = place < counts[tiles, None]
        where = torch.where(exists, offsets[tiles, None] + place, 0)
        mask = torch.zeros(exists.shape, dtype=k.dtype).masked_fill(~exists, -torch.inf)
        empty = ~exists.any(-1)[:, None, None]
        past = Part(keys[where], mask[:, None, None], empty if bool(empty.any()) else None)
        chunks.append(Chunk(tiles, [past, own]))
    return chunks


def _own_block(tiles, first, H, G, S, block, dtype):
    """The keys at the tiles' own positions, the causal mask among them, and its empty rows."""
    nq = len(first)
    heads = tiles // nq
    groups = heads // H * G + heads % H // (H // G)
    keys = first[tiles % nq, None] + torch.arange(block)
    exists = keys >= 0  # those past the end are after every query
    seen = torch.ones(block, block, dtype=torch.bool).tril()[None]
    if not bool(exists.all()):
        seen = seen & exists[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None]
    empty = ~seen.any(-1)[:, None]
    return groups[:, None] * S + keys.clamp(0, S - 1), mask, empty if bool(empty.any()) else None


def vertical_slash_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    columns: Bool[Tensor, "B H S"],
    distances: Bool[Tensor, "B H S"],
    *,
    scale: float | None = None,
    block: int = 64,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """`vertical_slash_attention` with the whole ``L x S`` matrix, block by block, line by line."""
    check_vertical_slash(q, k, v, columns, distances, scale, block)
    (B, H, L, _), S = q.shape, k.shape[2]
    kept = columns[:, :, None].repeat(1, 1, L, 1)
    for b in range(B):
        for h in range(H):
            for o in {0, *distances[b, h].nonzero().flatten().tolist()}:
                for i in range(0, L, block):
                    key = i + S - L - o
                    kept[b, h, i : i + block, max(key, 0) : max(key + block, 0)] = True
    visible = kept & visible_keys(L, S, causal=True)
    return masked_attention_reference(q, k, v, visible, scale=scale, return_lse=return_lse)


def check_vertical_slash(q, k, v, columns, distances, scale, block) -> None:
    """Raise ValueError or TypeError unless the kept columns and distances fit."""
    check_attention(q, k, v, None, 0, scale)
    check_block(block)
    wanted = (*q.shape[:2], k.shape[2])
    for name, kept in (("columns", columns), ("distances", distances)):
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = getattr(kept, "dtype", type(kept).__name__)
            raise TypeError(f"{name}: expected a tensor of booleans, got {got}")
        if kept.shape != wanted:
            raise ValueError(f"{name}: expected shape (B, H, S) = {wanted}, got {kept.shape}")
        if kept.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {kept.device}")
