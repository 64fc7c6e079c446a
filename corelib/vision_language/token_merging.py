"""Merging vision tokens that are alike, and attention that knows how many a token stands for.

ToMe ("Token Merging: your ViT but faster", Bolya et al., arXiv 2210.09461, section 3): tokens at
even places form a set A, those at odd places a set B. Every token of A finds the most similar one
of B (cosine); the ``m`` pairs that are most alike become one token each, the mean of what it stands
for. A pass so removes half of the tokens at most, in one matrix product and no loop.

A token that stands for ``size`` equal ones should weigh as much: ``size`` copies of a key in a
softmax are one key with ``log(size)`` added to its score (`proportional_attention`; ibid., eq. 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelib.primitives import attention


class Merged(NamedTuple):
    """``x (B, n, C)``: the tokens that are left, in the order of their places.

    ``size (B, n)``: how many each stands for. ``source (B, N)``: which of the ``n`` each of the
    ``N`` given tokens went into. ``place (B, n)``: the given token whose place it keeps.
    """

    x: Float[Tensor, "B n C"]
    size: Float[Tensor, "B n"]
    source: Int[Tensor, "B N"]
    place: Int[Tensor, "B n"]


def tome_merge(
    x: Float[Tensor, "B N C"], m: int, size: Float[Tensor, "B N"] | None = None
) -> Merged:
    """One pass: the ``m`` most similar pairs become one token each.

    ``size``: how many tokens each stands for already (1). Means are weighted with it, so that
    ``sum(size * x)`` stays what it was. Raises ``ValueError`` unless ``0 <= m <= N // 2``.
    """
    B, N, _ = x.shape
    if not 0 <= m <= N // 2:
        raise ValueError(f"m: expected 0 to {N // 2} pairs of {N} tokens, got {m}")
    size = x.new_ones(B, N) if size is None else size
    goes_to = torch.arange(N, device=x.device).repeat(B, 1)
    if m:
        unit = torch.nn.functional.normalize(x, dim=-1)
        likeness, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
        leaving = likeness.topk(m, -1).indices
        goes_to.scatter_(1, 2 * leaving, 2 * partner.gather(1, leaving) + 1)
    stays = goes_to == torch.arange(N, device=x.device)
    source = (stays.cumsum(1) - 1).gather(1, goes_to)
    sizes = size.new_zeros(B, N - m).scatter_add(1, source, size)
    sums = x.new_zeros(B, N - m, x.shape[2])
    sums = sums.scatter_add(1, source[..., None].expand_as(x), x * size[..., None])
    place = stays.nonzero()[:, 1].view(B, N - m)
    return Merged(sums / sizes[..., None], sizes, source, place)


def merge_to(
    x: Float[Tensor, "B N C"],
    n: int,
    size: Float[Tensor, "B N"] | None = None,
    *,
    most: float = 0.5,
) -> Merged:
    """Passes of `tome_merge` until ``n`` tokens are left; each removes a share ``most`` at most.

    A pass that removes half has to merge *every* token of its set A, also those that are like no
    other. Smaller shares take more passes, each of which takes the most similar pairs only. Raises
    ``ValueError`` unless ``1 <= n <= N`` and ``0 < most <= 0.5``.
    """
    N = x.shape[1]
    if not 1 <= n <= N:
        raise ValueError(f"n: expected 1 to {N} tokens, got {n}")
    if not 0 < most <= 0.5:
        raise ValueError(f"most: expected more than 0 and at most 0.5, got {most}")
    found = tome_merge(x, 0, size)
    while found.x.shape[1] > n:
        left = found.x.shape[1]
        step = tome_merge(found.x, min(left - n, max(1, int(most * left))), found.size)
        source, place = step.source.gather(1, found.source), found.place.gather(1, step.place)
        found = Merged(step.x, step.size, source, place)
    return found


def merge_to_ratio(
    x: Float[Tensor, "B N C"],
    ratio: float,
    size: Float[Tensor, "B N"] | None = None,
    *,
    most: float = 0.5,
) -> Merged:
    """`merge_to` a share ``ratio`` of the tokens, rounded, and at least one.

    Frames of a video are merged each by itself: let them be rows of the batch.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected more than 0 and at most 1, got {ratio}")
    return merge_to(x, max(1, round(ratio * x.shape[1])), size, most=most)


def proportional_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    size: Float[Tensor, "B S"],
    *,
    causal: bool,
    scale: float | None = None,
) -> Float[Tensor, "B H L V"]:
    """Attention in which key ``s`` counts ``size[s]`` times.

    ``scale * q . k + log(size)`` is one more channel: the bias in the keys, ``1 / scale`` in the
    queries.
    """
    if tuple(size.shape) != (k.shape[0], k.shape[2]) or bool((size <= 0).any()):
        raise ValueError(
            f"size: expected positive numbers ({k.shape[0]}, {k.shape[2]}), "
            f"got {tuple(size.shape)}, the least {float(size.min()):g}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = size.log().to(k.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, 1)
    q = torch.cat([q, torch.full_like(q[..., :1], 1 / scale)], -1)
    return attention(q, torch.cat([k, bias], -1), v, causal=causal, scale=scale)
