"""Exact attention on a CPU in O(L * block) memory, differentiable through ``out`` and ``lse``.

The forward pass runs each part of the plan (``_cpu_plan``) with PyTorch's blocked kernel, which
also returns the log-sum-exp, and merges the parts of a row. The backward pass needs no merging:
with the *final* ``out`` and ``lse`` of a row, each part's probabilities are
``exp(scores - lse)``, so that its share of the gradients can be computed by itself and added
(FlashAttention, arXiv 2205.14135, section 3.1 and appendix B.2).

The gradient of ``lse`` enters through the row sum that softmax's backward pass subtracts,
``delta_i = sum_c dout_ic * out_ic - dlse_i``. PyTorch's kernel forms ``delta`` itself from ``dout``
and ``out``; appending to the widths a column with ``dout = 1`` and ``out = -dlse`` gives it the
right one, and the zeros in that column of ``v`` keep everything else as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._cpu_plan import Group, Part, plan
from ._cpu_tiles import band_backward, band_forward
from ._flash import additive, flash_backward, flash_forward
from .merge import merge_partials


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of checked CPU tensors in the layout and by the rules of ``attention``."""
    groups = plan(q.shape[2], k.shape[2], causal=causal, window=window, sinks=sinks)
    return with_gradients(_forward, _backward, q, k, v, groups, scale)


def with_gradients(forward: Callable, backward: Callable, q, k, v, work, scale):
    """``forward(q, k, v, work, scale)``, an ``(out, lse)`` through which gradients flow.

    ``backward(grad_out, grad_lse, q, k, v, out, lse, work, scale)`` makes those of ``q, k, v``;
    ``grad_lse`` may be None.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(forward, backward, q, k, v, work, scale)
    return forward(q, k, v, work, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, q, k, v, work, scale):
        out, lse = forward(q, k, v, work, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run, ctx.work, ctx.scale = backward, work, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        grads = None, None, None
        if grad_out is not None or grad_lse is not None:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grads = ctx.run(grad_out, grad_lse, q, k, v, out, lse, ctx.work, ctx.scale)
        return None, None, *grads, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, groups: tuple[Group, ...], scale: float
) -> tuple[Tensor, Tensor]:
    B, H, L, D = q.shape
    V = v.shape[-1]
    q, k, v = (_widen(x, max(D, V)) for x in (q, k, v))
    if len(groups) == 1 and groups[0][:2] == (0, L):
        out, lse = _group_forward(groups[0], q, k, v, scale)
        return out[..., :V], lse
    out = q.new_zeros(B, H, L, V)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((B, H, L), -torch.inf, dtype=lse_dtype)
    for group in groups:
        rows = slice(group.start, group.stop)
        part_out, lse[:, :, rows] = _group_forward(group, q[:, :, rows], k, v, scale)
        out[:, :, rows] = part_out[..., :V]
    return out, lse


def _group_forward(
    group: Group, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``q`` holds the rows of the group only."""
    total = None
    for part in group.parts:
        keys = slice(part.start, part.stop)
        result = _FORWARD[part.pattern](q, k[:, :, keys], v[:, :, keys], scale)
        total = result if total is None else merge_partials(*total, *result)
    return total


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: tuple[Group, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    L, S, D, V = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    grad_out, out, extra = _with_lse_columns(grad_out, grad_lse, out)
    q, k, v, out, grad_out = (_widen(x, max(D, V + extra)) for x in (q, k, v, out, grad_out))
    whole = len(groups) == 1 and groups[0] in [
        Group(0, L, (Part(pattern, 0, S),)) for pattern in ("full", "causal", "shifted")
    ]
    if whole:
        pattern = groups[0].parts[0].pattern
        dq, dk, dv = _BACKWARD[pattern](grad_out, q, k, v, out, lse, scale)
        return dq[..., :D], dk[..., :D], dv[..., :V]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
    for group in groups:
        rows = slice(group.start, group.stop)
        q_, out_, lse_, grad_ = (x[:, :, rows] for x in (q, out, lse, grad_out))
        for part in group.parts:
            keys = slice(part.start, part.stop)
            shares = _BACKWARD[part.pattern](
                grad_, q_, k[:, :, keys], v[:, :, keys], out_, lse_, scale
            )
            for total, share, where in zip(sums, shares, (rows, keys, keys), strict=True):
                total[:, :, where] += share
    dq, dk, dv = (total.to(q.dtype) for total in sums)
    return dq[..., :D], dk[..., :D], dv[..., :V]


def _widen(x: Tensor, width: int) -> Tensor:
    """Append zeros to the last axis: the kernel wants one width, and zeros change no score."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _with_lse_columns(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, int]:
    """``grad_out``, ``out`` and the width to add: columns with ``sum(dout * out) = -dlse``.

    Two of them, so that a half-precision column and its rounding error hold ``dlse`` together.
    """
    if grad_lse is None:
        return grad_out, out, 0
    high = (-grad_lse).to(out.dtype)
    low = (-grad_lse - high).to(out.dtype)
    ones = torch.ones_like(high)
    return (
        torch.cat([grad_out, torch.stack([ones, ones], dim=-1)], dim=-1),
        torch.cat([out, torch.stack([high, low], dim=-1)], dim=-1),
        2,
    )


def _anticausal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Seen from the last row and key, an anticausal triangle is a causal one."""
    q, k, v = (x.flip(2) for x in (q, k, v))
    out, lse = flash_forward(q, k, v, scale, causal=True)
    return out.flip(2), lse.flip(2)


def _anticausal_backward(grad_out, q, k, v, out, lse, scale):
    flipped = [x.flip(2) for x in (grad_out, q, k, v, out, lse)]
    return [x.flip(2) for x in flash_backward(*flipped, scale, causal=True)]


def _shifted_mask(q: Tensor, k: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    return additive(j <= i + k.shape[2] - q.shape[2], q)


def _shifted_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return flash_forward(q, k, v, scale, causal=False, mask=_shifted_mask(q, k))


def _shifted_backward(grad_out, q, k, v, out, lse, scale):
    mask = _shifted_mask(q, k)
    return flash_backward(grad_out, q, k, v, out, lse, scale, causal=False, mask=mask)


_FORWARD = {
    "full": lambda *args: flash_forward(*args, causal=False),
    "causal": lambda *args: flash_forward(*args, causal=True),
    "anticausal": _anticausal_forward,
    "band": band_forward,
    "shifted": _shifted_forward,
}
_BACKWARD = {
    "full": lambda *args: flash_backward(*args, causal=False),
    "causal": lambda *args: flash_backward(*args, causal=True),
    "anticausal": _anticausal_backward,
    "band": band_backward,
    "shifted": _shifted_backward,
}
