"""How much attention each key receives: column sums of the attention map, without the map.

    A_ij  = exp(scale * q_i . k_j - lse_i)      for the keys j that query i may see
    sum_j = sum_i weight_i * A_ij

Importance scores of tokens are sums of this kind. With every weight 1 it is the attention that a
key receives in all; with weights of one on the text's rows, what the question looks at; with
weights that are the last result, one step of PageRank on the graph of attention.

On a CPU a stretch of rows is computed at a time, and added up before the next: ``O(S)`` numbers are
kept beside a workspace of fixed size. On a GPU, rows' ``lse`` come first (from the forward pass of
attention they are at hand) and the Triton kernel of ``corelib.kernels.attention_column_sums`` then
walks down each stretch of keys.

Not differentiable: what it is for, a choice of tokens, is not either. Gradients flow through
`attention_column_sums_reference`, which holds the map. Oracle: softmax, then a sum.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ._checks import check_attention
from .attention import attention, visible_keys

WORKSPACE = 1 << 20  # scores that are held at a time


def attention_column_sums(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    *,
    causal: bool,
    scale: float | None = None,
    weights: Float[Tensor, "#B #H L"] | None = None,
    lse: Float[Tensor, "B H L"] | None = None,
) -> Float[Tensor, "B H S"]:
    """``sum_i weights_i * A_ij``; in float32 for half-precision inputs, else in their dtype.

    weights: of the rows; ``None`` means 1 each. lse: the rows' log-sum-exps, where they are known.
    A query that may see no key adds nothing. Raises ``ValueError`` or ``TypeError`` for what does
    not fit.
    """
    _check(q, k, scale, weights, lse)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.no_grad():
        if q.is_cuda:
            from corelib.kernels.attention_column_sums import attention_column_sums as kernel

            if lse is None:  # values of one channel: all that is wanted is the row sums
                options = dict(causal=causal, scale=scale, return_lse=True)
                lse = attention(q, k, k[..., :1], **options)[1]
            return kernel(q, k, lse, causal=causal, scale=scale, weights=weights)
        return _by_rows(q, k, causal, scale, weights, lse)


def attention_column_sums_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    *,
    causal: bool,
    scale: float | None = None,
    weights: Float[Tensor, "#B #H L"] | None = None,
    lse: Float[Tensor, "B H L"] | None = None,
) -> Float[Tensor, "B H S"]:
    """The same with the whole map: slow, obviously right, and differentiable."""
    _check(q, k, scale, weights, lse)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.to(wide) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = visible_keys(q.shape[2], k.shape[2], causal=causal, device=q.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    sums = scores.masked_fill(empty, 0.0).logsumexp(-1) if lse is None else lse.to(wide)
    weight = (scores - sums[..., None]).masked_fill(empty, -torch.inf).exp()
    if weights is not None:
        weight = weight * weights.to(wide)[..., None]
    return weight.sum(2)


def _by_rows(q, k, causal: bool, scale: float, weights, lse) -> Tensor:
    (B, H, L), (G, S) = q.shape[:3], k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = torch.zeros(B, G, H // G, S, dtype=wide)
    if sums.numel() == 0:
        return sums.flatten(1, 2)
    q, keys = (q.to(wide) * scale).unflatten(1, (G, -1)), k.to(wide).mT
    if weights is None:
        weights = torch.ones(1, 1, L, dtype=wide)
    weights = weights.to(wide).expand(B, H, L).unflatten(1, (G, -1))
    step = max(1, WORKSPACE // (B * H * S))
    first = max(0, L - S) if causal else 0  # rows before it see nothing
    for start in range(first, L, step):
        rows = slice(start, min(start + step, L))
        end = rows.stop + S - L if causal else S  # keys from here on are hidden from these rows
        scores = q[:, :, :, rows].flatten(2, 3) @ keys[..., :end]
        scores = scores.unflatten(2, (H // G, -1))
        if causal:
            scores.masked_fill_(~visible_keys(rows.stop - start, end, causal=True), -torch.inf)
        if lse is None:
            shares = scores.softmax(-1)
        else:
            shares = scores.sub_(lse[:, :, rows].to(wide).unflatten(1, (G, -1))[..., None]).exp_()
        sums[..., :end] += (weights[..., None, rows] @ shares)[..., 0, :]
    return sums.flatten(1, 2)


def _check(q: Tensor, k: Tensor, scale, weights: Tensor | None, lse: Tensor | None) -> None:
    check_attention(q, k, k, None, 0, scale)
    rows = tuple(q.shape[:3])
    if lse is not None and tuple(lse.shape) != rows:
        raise ValueError(f"lse: expected shape {rows}, got {tuple(lse.shape)}")
    if weights is None:
        return
    fits = weights.dim() == 3 and weights.shape[2] == rows[2]
    if not fits or any(n not in (1, m) for n, m in zip(weights.shape, rows, strict=True)):
        raise ValueError(
            f"weights: expected a shape that broadcasts to {rows}, got {tuple(weights.shape)}"
        )
