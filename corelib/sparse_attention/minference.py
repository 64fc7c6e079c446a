"""MInference 1.0: sparse prefill, one of three shapes per head (arXiv 2407.02490).

Idea: in a long prompt every head's attention keeps to one of three shapes, whatever the prompt;
*where* its lines and blocks lie changes with the prompt and is estimated cheaply before attending.

| shape            | kept keys                                      | how they are found           |
|:-----------------|:-----------------------------------------------|:-----------------------------|
| `a_shape`        | the first ``sinks``, the ``local`` nearest     | fixed                        |
| `vertical_slash` | ``columns`` keys, ``distances`` diagonals      | from the last queries        |
| `block_sparse`   | the best ``blocks`` for each block of queries  | from block means             |

With the attention of the last queries, ``A = softmax(scale * q[-last:] k^T)`` (section 3.2):

    vertical_j = sum_i A_ij          slash_o = sum_i A_i,i-o          keep the largest of each

and with block means ``softmax(scale * mean(q block) . mean(k block))``, the largest of each row.
Offline, `search_head_patterns` gives each head the shape whose output is nearest to dense among
candidates that cost the same in the kernel (algorithm 1): costs are counted in scores that the
kernel computes, so that a lone slash, which takes a whole tile, is not taken for a cheap line.

| here                  | paper               | what                                            |
|:----------------------|:--------------------|:------------------------------------------------|
| last                  | last_q = 64         | queries that the estimate looks at              |
| vertical, slash       | i_v, i_s (sums)     | ``(B, H, S)``, attention per column or distance |
| columns, distances    | k_v, k_s            | how many are kept                               |
| blocks                | k_b                 | key blocks kept per query block                 |

Exact: with a full budget every shape is dense attention; kept keys are attended exactly and count
once. Approximate: what is not kept is not read. Different: `a_shape` is exact to the token; the
search's gap is the released code's (how many outputs differ by more than 0.005), its candidates
are scaled to a budget by halving. Left out: the released per-model pattern files.
Cost: O(last * S) or O((L / block)^2) to estimate, then ``computed_scores``; decoding stays dense.
Oracle: attention under the mask of kept keys; compare ``minference_forward.py`` of
microsoft/MInference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from corelib.primitives import attention, visible_keys
from corelib.primitives._checks import check_attention
from corelib.primitives.attention import OutAndLse
from corelib.primitives.block_scores import (
    keep_ends,
    pooled_block_scores,
    reachable_blocks,
    top_blocks,
)
from corelib.primitives.block_sparse import BlockLists, block_sparse_attention, check_block
from corelib.primitives.vertical_slash import vertical_slash_attention

from .shared import planted_heads

KINDS = ("a_shape", "vertical_slash", "block_sparse")
FORCED = 30, 100  # columns and distances that are kept before any other (for long prompts)


class Pattern(NamedTuple):
    """A head's shape and its sizes; see `a_shape`, `vertical_slash` and `block_sparse`."""

    kind: str
    first: int
    second: int = 0


def a_shape(sinks: int = 1024, local: int = 4096) -> Pattern:
    """The first ``sinks`` keys and the ``local`` nearest, the query itself among them."""
    return Pattern("a_shape", sinks, local)


def vertical_slash(columns: int = 1000, distances: int = 6096) -> Pattern:
    """So many columns and diagonals, found in the prompt."""
    return Pattern("vertical_slash", columns, distances)


def block_sparse(blocks: int = 100) -> Pattern:
    """So many key blocks for each block of queries, found in the prompt."""
    return Pattern("block_sparse", blocks)


#: The released code's candidates, for prompts of 100,000 tokens and more.
CANDIDATES = (
    a_shape(100, 800), vertical_slash(30, 800), vertical_slash(100, 800), vertical_slash(100, 750),
    vertical_slash(500, 700), vertical_slash(3500, 100), vertical_slash(1000, 4096),
    block_sparse(100),
)  # fmt: skip


def estimate_vertical_slash(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    *,
    last: int = 64,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H S"], Float[Tensor, "B H S"]]:
    """How much the last queries attend to each key, and to each distance.

    Their probabilities are written out, ``(B, H, last, S)``: 64 rows however long the prompt is, so
    time and memory grow as S for each head (256 bytes a key and head in float32).
    """
    last, S = min(last, q.shape[2]), k.shape[2]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = q[:, :, -last:] @ keys.transpose(2, 3) * scale
    visible = visible_keys(last, S, causal=True, device=q.device)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    place = torch.arange(S, device=q.device)
    ahead = (place[-last:, None] - place).clamp(min=0)  # what cannot be seen weighs nothing
    slash = torch.zeros_like(weights[:, :, 0])
    slash.index_add_(2, ahead.flatten(), weights.flatten(2))
    return weights.sum(2), slash


def choose_lines(
    vertical: Float[Tensor, "B H S"],
    slash: Float[Tensor, "B H S"],
    columns: int,
    distances: int,
    *,
    forced: tuple[int, int] = FORCED,
) -> tuple[Bool[Tensor, "B H S"], Bool[Tensor, "B H S"]]:
    """The largest of each, after the ``forced`` first columns and nearest distances."""
    kept = []
    for sums, number, ends in ((vertical, columns, forced[0]), (slash, distances, forced[1])):
        sums = sums.clone()
        sums[..., :ends] += 1.0 + sums.amax(-1, keepdim=True)
        best = sums.topk(min(number, sums.shape[-1]), -1).indices
        kept.append(torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, best, True))
    return kept[0], kept[1]


def choose_blocks(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    blocks: int,
    *,
    block: int = 64,
    scale: float | None = None,
) -> BlockLists:
    """For each query block the key blocks with the best pooled scores, and its own."""
    scores = pooled_block_scores(q, k, block, causal=True, scale=scale)
    reachable = reachable_blocks(q.shape[2], k.shape[2], block, causal=True).to(q.device)
    own = 1 if (k.shape[2] - q.shape[2]) % block == 0 else 2
    return BlockLists.from_mask(keep_ends(top_blocks(scores, blocks), reachable, last=own), block)


def minference_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    patterns: Sequence[Pattern] | Pattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    block: int = 64,
    last: int = 64,
    forced: tuple[int, int] = FORCED,
    return_lse: bool = False,
) -> Float[Tensor, "B H L V"] | OutAndLse:
    """Causal attention in which every head keeps to its pattern.

    Args:
        patterns: one per query head, or one for all.
        block: queries (and keys) in a block.
        last: queries that `vertical_slash` is estimated from.
        forced: columns and distances that it keeps before others; they count towards its sizes.

    A single query is decoding and stays dense. Raises ValueError or TypeError for patterns, shapes
    or options that do not fit.
    """
    check_attention(q, k, v, None, 0, scale)
    check_block(block)
    if not causal:
        raise ValueError("causal: expected True; the patterns are those of causal attention")
    H, G = q.shape[1], k.shape[1]
    patterns = _checked(patterns, H)
    if q.shape[2] == 1:
        return attention(q, k, v, causal=True, scale=scale, return_lse=return_lse)
    options = dict(scale=scale, block=block, last=last, forced=forced)
    if len(set(patterns)) == 1:
        out, lse = _attend(q, k, v, patterns[0], **options)
        return (out, lse) if return_lse else out
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)
    for pattern in dict.fromkeys(patterns):
        heads = torch.tensor([h for h in range(H) if patterns[h] == pattern], device=q.device)
        shared = heads // (H // G)
        part, part_lse = _attend(q[:, heads], k[:, shared], v[:, shared], pattern, **options)
        out, lse = out.index_copy(1, heads, part), lse.index_copy(1, heads, part_lse)
    return (out, lse) if return_lse else out


def _attend(q, k, v, pattern: Pattern, *, scale, block, last, forced) -> tuple[Tensor, Tensor]:
    kind, first, second = pattern
    if kind == "a_shape":
        shape = dict(window=second, sinks=first)
        return attention(q, k, v, causal=True, **shape, scale=scale, return_lse=True)
    if kind == "block_sparse":
        lists = choose_blocks(q, k, first, block=block, scale=scale)
        return block_sparse_attention(q, k, v, lists, causal=True, scale=scale, return_lse=True)
    with torch.no_grad():
        sums = estimate_vertical_slash(q, k, last=last, scale=scale)
        lines = choose_lines(*sums, first, second, forced=forced)
    return vertical_slash_attention(q, k, v, *lines, scale=scale, block=block, return_lse=True)


def _checked(patterns: Sequence[Pattern] | Pattern, H: int) -> list[Pattern]:
    patterns = [patterns] * H if isinstance(patterns, Pattern) else list(patterns)
    if len(patterns) != H:
        raise ValueError(f"patterns: expected one for each of {H} heads, got {len(patterns)}")
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise TypeError(f"patterns: expected Pattern, got {type(pattern).__name__}")
        if pattern.kind not in KINDS:
            raise ValueError(f"patterns: expected a kind of {KINDS}, got {pattern.kind!r}")
        if pattern.first < 0 or pattern.second < (pattern.kind == "a_shape"):
            raise ValueError(f"patterns: expected sizes of at least 0 (local: 1), got {pattern}")
    return patterns


def example() -> dict:
    """Three planted heads of 256 positions, each with its own pattern.

    >>> minference_attention(**example()).shape
    torch.Size([1, 3, 256, 16])
    """
    heads = planted_heads(("a_shape", "vertical_slash", "block"), 256, D=16, stretch=16)
    patterns = a_shape(8, 64), vertical_slash(40, 110), block_sparse(6)
    return dict(q=heads.q, k=heads.k, v=heads.v, patterns=patterns, scale=1.0, block=16)
