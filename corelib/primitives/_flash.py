"""PyTorch's CPU flash kernel, with grouped heads.

The kernel takes ``(batch, heads, length, width)`` of one width, with any strides but a last one of
1. Grouped heads are one more batch axis with the shared keys expanded (stride 0), so that no key
is copied. The two operators are the ones that `scaled_dot_product_attention` runs on a CPU; they
are called directly because only they give and take the log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; ``causal`` is aligned with the first key, ``mask (L, S)`` is additive."""
    B, H, L, D = q.shape
    q, k, v = _spread_groups(q, k, v)
    out, lse = forward_op(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out.reshape(B, H, L, D), lse.reshape(B, H, L)


def flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``, given the final ``out`` and ``lse`` of each row."""
    q_shape, k_shape = q.shape, k.shape
    q, k, v, grad_out, out, lse = _spread_groups(q, k, v, grad_out, out, lse)
    dq, dk, dv = backward_op(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    if dk.shape != k_shape:  # one gradient per query head
        dk, dv = dk.sum(1), dv.sum(1)
    return dq.reshape(q_shape), dk.reshape(k_shape), dv.reshape(k_shape)


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """A boolean mask as the kernel wants it: 0 where visible, -inf elsewhere."""
    zeros = torch.zeros(visible.shape, dtype=like.dtype)
    return zeros.masked_fill(~visible, -torch.inf)


def _spread_groups(q: Tensor, k: Tensor, v: Tensor, *per_query: Tensor) -> list[Tensor]:
    """Keys with several query heads: heads of a group become heads, and groups batch rows.

    With a single query (decoding), the query heads of a group become the rows of one head instead:
    the keys are then read once per group.
    """
    B, H, L, _ = q.shape
    G = k.shape[1]
    if G == H:
        return [q, k, v, *per_query]
    if L == 1:
        spread = [x.reshape(B, G, H // G, *x.shape[3:]) for x in (q, *per_query)]
        return [spread[0], k, v, *spread[1:]]
    spread = [x.unflatten(1, (G, H // G)).flatten(0, 1) for x in (q, *per_query)]
    shared = [x.flatten(0, 1)[:, None].expand(-1, H // G, -1, -1) for x in (k, v)]
    return [spread[0], *shared, *spread[1:]]
