"""Scoring key blocks, choosing among them, and measuring the choice.

*Scores.* The mean of a block of queries times the mean of a block of keys is the mean of all their
scores (the dot product is linear), so one number per pair of blocks stands for ``block ** 2``; it
costs ``1 / block ** 2`` of the scores, and misses a few large ones among many small.

*Choice.* The best ``k`` blocks of a row (`top_blocks`), or as many as hold a share of the row's
probability (`mass_blocks`), with blocks that are always kept (`keep_ends`).

*Meters.* ``exp(lse_kept - lse_all)`` is the share of a query's attention that the kept keys hold
(`attention_recall`); `block_density` is the share of the visible blocks that is computed;
`relative_error` compares outputs.

On a GPU, means and scores come from the Triton kernels of ``corelib.kernels.block_scores``, unless
they are to be differentiated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .block_sparse import BlockLists, check_block


def pool_blocks(x: Float[Tensor, "B H L D"], block: int) -> Float[Tensor, "B H n D"]:
    """The mean of every block of ``block`` positions; the last one over those that exist."""
    check_block(block)
    if _takes_kernel(x):
        from corelib.kernels.block_scores import pool_blocks as kernel

        return kernel(x, block)
    L = x.shape[2]
    rest = -L % block
    sums = F.pad(x, (0, 0, 0, rest)).unflatten(2, (-1, block)).sum(3)
    sizes = x.new_full((sums.shape[2], 1), block)
    if rest:
        sizes[-1] = block - rest
    return sums / sizes


def reachable_blocks(L: int, S: int, block: int, *, causal: bool) -> Bool[Tensor, "nq nk"]:
    """Pairs of blocks in which some query may see some key."""
    check_block(block)
    first = torch.arange(0, S, block)
    last = torch.arange(0, L, block).add(block).clamp(max=L) - 1 + S - L
    reachable = first[None, :] <= last[:, None]
    return reachable if causal else torch.ones_like(reachable)


def pooled_block_scores(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    block: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Float[Tensor, "B H nq nk"]:
    """``scale * mean(q block) . mean(k block)``; ``-inf`` for blocks that cannot be seen.

    A softmax over the last axis estimates how a row of blocks shares its attention. Raises
    ValueError where ``k``'s heads do not divide ``q``'s or widths differ.
    """
    scale = _checked_scale(q, k, scale)
    if _takes_kernel(q, k):
        from corelib.kernels.block_scores import pooled_block_scores as kernel

        return kernel(q, k, block, causal=causal, scale=scale)
    pooled_k = pool_blocks(k, block).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = pool_blocks(q, block) @ pooled_k.transpose(2, 3) * scale
    return _hide_unreachable(scores, q, k, block, causal)


def grouped_block_scores(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    block: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Float[Tensor, "B G nq nk"]:
    """`pooled_block_scores` added up over the query heads that share a key head.

    For a choice that all heads of a group share. Raises as `pooled_block_scores`.
    """
    scale = _checked_scale(q, k, scale)
    if _takes_kernel(q, k):
        from corelib.kernels.block_scores import grouped_block_scores as kernel

        return kernel(q, k, block, causal=causal, scale=scale)
    pooled_q = pool_blocks(q, block).unflatten(1, (k.shape[1], -1)).sum(2)
    scores = pooled_q @ pool_blocks(k, block).transpose(2, 3) * scale
    return _hide_unreachable(scores, q, k, block, causal)


def _takes_kernel(*tensors: Tensor) -> bool:
    """The Triton kernels: for a GPU, forward only, up to float32 and 256 channels."""
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    fits = all(x.is_cuda and x.itemsize <= 4 and 1 <= x.shape[-1] <= 256 for x in tensors)
    return fits and not tracked


def _checked_scale(q: Tensor, k: Tensor, scale: float | None) -> float:
    (_, H, _, D), (_, G, _, width) = q.shape, k.shape
    if G == 0 or H % G or width != D:
        raise ValueError(f"k: expected heads that divide {H} and width {D}, got {G} and {width}")
    return D**-0.5 if scale is None else scale


def _hide_unreachable(scores: Tensor, q: Tensor, k: Tensor, block: int, causal: bool) -> Tensor:
    reachable = reachable_blocks(q.shape[2], k.shape[2], block, causal=causal).to(q.device)
    return scores.masked_fill(~reachable, -torch.inf)


def top_blocks(scores: Float[Tensor, "B H nq nk"], k: int) -> Bool[Tensor, "B H nq nk"]:
    """The ``k`` blocks with the largest finite scores of each row (all, where there are fewer)."""
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    values, index = scores.topk(min(k, scores.shape[-1]), -1)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return chosen.scatter_(-1, index, values > -torch.inf)


def mass_blocks(shares: Float[Tensor, "B H nq nk"], mass: float) -> Bool[Tensor, "B H nq nk"]:
    """The fewest blocks whose ``shares`` (rows of a softmax) add up to ``mass`` or more.

    A ``mass`` above 1 keeps every block with a share above 0.
    """
    if mass < 0:
        raise ValueError(f"mass: expected at least 0, got {mass}")
    ranked, index = shares.nan_to_num(0.0).sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    keep = (before < mass) & (ranked > 0)
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def keep_ends(
    chosen: Bool[Tensor, "B H nq nk"],
    reachable: Bool[Tensor, "nq nk"],
    *,
    first: int = 0,
    last: int = 0,
) -> Bool[Tensor, "B H nq nk"]:
    """``chosen`` and, in each row, the ``first`` and the ``last`` of the reachable blocks."""
    number = reachable.sum(-1, keepdim=True)
    place = torch.arange(reachable.shape[1], device=reachable.device)
    kept = (place < first) | ((place >= number - last) & (place < number))
    return chosen | (kept & reachable)


def block_density(lists: BlockLists, L: int, S: int, *, causal: bool) -> float:
    """Listed blocks over blocks that can be seen, from 0 to 1."""
    reachable = reachable_blocks(L, S, lists.block, causal=causal).to(lists.blocks.device)
    B, H = lists.shape[:2]
    return float((lists.mask() & reachable).sum() / (B * H * reachable.sum()).clamp(min=1))


def attention_recall(
    lse_kept: Float[Tensor, "*rows"], lse_all: Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """The share of each query's attention that falls on the kept keys.

    ``lse_*``: log-sum-exps of sparse and of dense attention. A query that sees no key at all has
    recall 1.
    """
    nothing = lse_all == -torch.inf
    return torch.exp(lse_kept - lse_all.masked_fill(nothing, 0.0)).masked_fill(nothing, 1.0)


def relative_error(
    out: Float[Tensor, "*rows V"], exact: Float[Tensor, "*rows V"]
) -> Float[Tensor, ""]:
    """``|out - exact| / |exact|``, Euclidean norms over everything."""
    return (out - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
