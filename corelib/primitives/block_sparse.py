"""Block-sparse attention: each block of queries of each head reads the key blocks of its own list.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j of the listed blocks
                                                        that query i may see

The lists are kept as one row after another (compressed sparse rows, `BlockLists`), so that what is
not listed costs nothing: no mask of ``L x S`` numbers, no loop over empty blocks. The methods that
*choose* blocks (MInference, FlexPrefill, PBS-Attn, LongGen, BigBird, ...) all end in this call.

* `block_sparse_attention`: on a CPU tiles of queries with similar lists run together
  (``_gathered``); on a GPU the Triton kernel of ``corelib.kernels.block_sparse_attention``.
* `block_sparse_attention_reference`: dense attention under the lists' mask.

Query ``i`` stands at key position ``i + S - L``. Blocks are counted by index: query block ``a`` has
queries ``a * block ..``, key block ``c`` keys ``c * block ..``; the last ones may be shorter. Keys
that were moved (PBS-Attn sorts them inside a segment) say where they belong: with
``key_positions (B, G, S)``, ``causal`` compares with those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ._checks import check_attention
from ._gathered import Chunk, Part, alike, gathered_attention
from .attention import OutAndLse, masked_attention_reference

HIDDEN, PARTLY, WHOLE = 0, 1, 2


@dataclass(frozen=True)
class BlockLists:
    """Which key blocks each query block reads, for every batch row and query head.

    ``blocks[offsets[r] : offsets[r + 1]]`` are the key blocks of row ``r = (b * H + h) * nq + a``,
    rising and without repetition. ``shape``: ``(B, H, nq, nk)``. ``block``: positions in a block.
    """

    offsets: Int[Tensor, " rows1"]
    blocks: Int[Tensor, " entries"]
    shape: tuple[int, int, int, int]
    block: int

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "B H nq nk"], block: int) -> BlockLists:
        """Lists of the True entries."""
        check_block(block)
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise TypeError(
                f"mask: expected booleans (B, H, nq, nk), got {mask.dtype} {mask.shape}"
            )
        counts = mask.sum(-1).flatten()
        offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(offsets, mask.nonzero()[:, 3].to(torch.int32), tuple(mask.shape), block)

    @property
    def rows(self) -> Int[Tensor, " entries"]:
        """The row of every entry."""
        every = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return every.repeat_interleave(self.offsets.diff(), output_size=len(self.blocks))

    @property
    def counts(self) -> Int[Tensor, "B H nq"]:
        """Key blocks per query block."""
        return self.offsets.diff().view(self.shape[:3])

    def mask(self) -> Bool[Tensor, "B H nq nk"]:
        """The lists as a matrix of booleans."""
        B, H, nq, nk = self.shape
        mask = torch.zeros(B * H * nq, nk, dtype=torch.bool, device=self.blocks.device)
        mask[self.rows, self.blocks] = True
        return mask.view(self.shape)

    def visible(
        self, L: int, S: int, *, causal: bool, key_positions: Int[Tensor, "B G S"] | None = None
    ) -> Bool[Tensor, "B H L S"]:
        """Which key each query sees, one by one."""
        wide = self.mask().repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
        visible = wide[:, :, :L, :S]
        if not causal:
            return visible
        positions = torch.arange(S)[None, None] if key_positions is None else key_positions
        positions = positions.repeat_interleave(self.shape[1] // positions.shape[1], 1)
        here = torch.arange(L)[:, None] + S - L
        return visible & (positions[:, :, None] <= here).to(visible.device)


class Sorted(NamedTuple):
    """Lists as a kernel walks them: ``offsets[r] .. middles[r]`` need no mask, up to
    ``offsets[r + 1]`` a mask is needed; blocks that nothing in the row can see are gone."""

    offsets: Int[Tensor, " rows1"]
    middles: Int[Tensor, " rows"]
    blocks: Int[Tensor, " entries"]


def sort_lists(
    lists: BlockLists, L: int, S: int, *, causal: bool, key_positions: Tensor | None = None
) -> Sorted:
    """Bring the blocks that every query of the row sees whole to the front of each list.

    On a GPU nothing here makes the CPU wait: what is hidden then lies behind the last list.
    """
    rows, state = lists.rows, _states(lists, L, S, causal, key_positions)
    total = len(lists.offsets) - 1
    key = torch.where(state == HIDDEN, 2 * total, 2 * rows + (state == PARTLY))
    blocks = lists.blocks[torch.argsort(key, stable=True)]
    seen, whole = (
        torch.zeros_like(lists.offsets[1:]).index_add_(0, rows, counted.to(lists.offsets.dtype))
        for counted in (state != HIDDEN, state == WHOLE)
    )
    offsets = F.pad(seen.cumsum(0), (1, 0)).to(torch.int32)
    blocks = blocks if blocks.is_cuda else blocks[: offsets[-1]]
    return Sorted(offsets, offsets[:-1] + whole.to(torch.int32), blocks)


def _states(lists: BlockLists, L: int, S: int, causal: bool, key_positions) -> Tensor:
    """For every entry: does its row see the block `HIDDEN`, `PARTLY` or `WHOLE`?"""
    B, H, nq, nk = lists.shape
    block, rows, blocks = lists.block, lists.rows, lists.blocks.long()
    first = blocks * block
    complete = first + block <= S
    if not causal:
        return torch.where(complete, WHOLE, PARTLY)
    low, high = first, first + block - 1
    if key_positions is not None:
        ends = [torch.full_like(key_positions[..., :1], end) for end in (L + S, -1)]
        padding = nk * block - S
        bounds = [
            torch.cat([key_positions, end.expand(-1, -1, padding)], -1).unflatten(-1, (nk, block))
            for end in ends
        ]
        group = rows // (H * nq) * key_positions.shape[1]
        group = group + rows // nq % H // (H // key_positions.shape[1])
        low = bounds[0].amin(-1).flatten(0, 1)[group, blocks]
        high = bounds[1].amax(-1).flatten(0, 1)[group, blocks]
    here = rows % nq * block + S - L
    last = torch.clamp(rows % nq * block + block, max=L) - 1 + S - L
    state = torch.where(complete & (high <= here), WHOLE, PARTLY)
    return torch.where(low > last, HIDDEN, state)


def block_sparse_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    lists: BlockLists,
    *,
    causal: bool,
    scale: float | None = None,
    key_positions: Int[Tensor, "B G S"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """Attention over the listed blocks; ``(out, lse)`` with ``return_lse=True``.

    Rows that see no key are zeros with ``lse = -inf``. Differentiable through both. Nothing is
    read but the listed blocks. Raises ValueError or TypeError for what does not fit.
    """
    check_block_sparse(q, k, v, lists, scale, key_positions)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.is_cuda:
        from corelib.kernels.block_sparse_attention import block_sparse_attention as kernel

        options = dict(causal=causal, scale=scale, key_positions=key_positions)
        return kernel(q, k, v, lists, **options, return_lse=return_lse)
    chunks = _chunks(q, k, lists, causal, key_positions)
    tiles, keys, values = (_tiles(x, lists.block) for x in (q, k, v))
    out, lse = gathered_attention(tiles, keys, values, chunks, scale)
    out, lse = (x.reshape(*q.shape[:2], -1, *x.shape[2:])[:, :, : q.shape[2]] for x in (out, lse))
    return (out, lse) if return_lse else out


def _tiles(x: Tensor, block: int) -> Tensor:
    """``(B, H, L, D) -> (B * H * n, block, D)``, the last block filled up with zeros."""
    rest = -x.shape[2] % block
    x = F.pad(x, (0, 0, 0, rest)) if rest else x
    return x.reshape(-1, block, x.shape[-1])


def _chunks(q, k, lists, causal, key_positions) -> list[Chunk]:
    """Tiles with equally many blocks, and equally many that need a mask, run together."""
    (_, H, L, _), (_, G, S, D) = q.shape, k.shape
    _, _, nq, nk = lists.shape
    options = dict(causal=causal, key_positions=key_positions)
    offsets, middles, blocks = (x.long() for x in sort_lists(lists, L, S, **options))
    groups = torch.arange(len(middles)) // nq
    groups = groups // H * G + groups % H // (H // G)
    whole, edges = middles - offsets[:-1], offsets[1:] - middles
    chunks, masks = [], {}
    for partly in edges.unique().tolist():
        counts = torch.where(edges == partly, whole + partly, 0)
        for tiles in alike(counts, lists.block * D):
            n = int(counts[tiles[0]])
            listed = blocks[offsets[tiles, None] + torch.arange(n)]
            units = groups[tiles, None] * nk + listed
            if not partly:
                chunks.append(Chunk(tiles, [Part(units)]))
                continue
            ahead = listed[:, n - partly :] - (tiles % nq)[:, None]
            same = causal and key_positions is None and bool((ahead == ahead[:1]).all())
            # Where only the distance from the diagonal matters, tiles share a mask.
            key = (n, *ahead[0].tolist()) if same else None
            if key is None or key not in masks:
                some = slice(0, 1 if same else None)
                masks[key] = _mask(
                    n, tiles[some], listed[some, n - partly :], groups, lists, k, L, **options
                )
            chunks.append(Chunk(tiles, [Part(units, *masks[key])]))
    return chunks


def _mask(n, tiles, edges, groups, lists, k, L, *, causal, key_positions):
    """The additive mask of lists of ``n`` blocks that end in ``edges (R, few)``; its empty rows."""
    S, block = k.shape[2], lists.block
    within, places = torch.arange(block), tiles % lists.shape[2]
    keys = (edges[..., None] * block + within).flatten(1)  # (R, few * block)
    here = places[:, None] * block + within + S - L
    exists = (keys < S)[:, None].expand(-1, block, -1)
    if not causal:
        seen = exists
    elif key_positions is None:  # hides what is behind the last key too, at any distance alike
        seen = keys[:, None] <= here[..., None]
    else:
        positions = key_positions.flatten(0, 1)[groups[tiles, None], keys.clamp(max=S - 1)]
        seen = exists & (positions[:, None] <= here[..., None])
    mask = torch.zeros((len(tiles), 1, block, n * block), dtype=k.dtype)
    mask[:, 0, :, (n - edges.shape[1]) * block :].masked_fill_(~seen, -torch.inf)
    empty = ~seen.any(-1)[:, None] if n == edges.shape[1] else None
    return mask, empty


def block_sparse_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    lists: BlockLists,
    *,
    causal: bool,
    scale: float | None = None,
    key_positions: Int[Tensor, "B G S"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """`block_sparse_attention` with the whole ``L x S`` matrix."""
    check_block_sparse(q, k, v, lists, scale, key_positions)
    L, S = q.shape[2], k.shape[2]
    visible = lists.visible(L, S, causal=causal, key_positions=key_positions)
    return masked_attention_reference(q, k, v, visible, scale=scale, return_lse=return_lse)


def check_block(block: int) -> None:
    """Raise unless ``block`` is a positive int."""
    if isinstance(block, bool) or not isinstance(block, int):
        raise TypeError(f"block: expected an int, got {type(block).__name__}")
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")


def check_block_sparse(q, k, v, lists, scale, key_positions) -> None:
    """Raise ValueError or TypeError unless lists and positions fit ``q``, ``k`` and ``v``."""
    check_attention(q, k, v, None, 0, scale)
    if not isinstance(lists, BlockLists):
        raise TypeError(f"lists: expected BlockLists, got {type(lists).__name__}")
    (B, H, L, _), (_, G, S, _) = q.shape, k.shape
    wanted = (B, H, -(-L // lists.block), -(-S // lists.block))
    if lists.shape != wanted:
        raise ValueError(f"lists: expected blocks (B, H, nq, nk) = {wanted}, got {lists.shape}")
    if lists.blocks.device != q.device:
        raise ValueError(f"lists: expected the device of q, {q.device}, got {lists.blocks.device}")
    if key_positions is not None and key_positions.shape != (B, G, S):
        got = tuple(key_positions.shape)
        raise ValueError(f"key_positions: expected shape {(B, G, S)}, got {got}")
