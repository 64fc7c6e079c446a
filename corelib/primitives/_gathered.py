"""Attention over gathered keys on a CPU: every tile of queries with its own list of units of keys.

A unit is a block of neighbouring keys, or one key. Tiles whose lists are equally long run together:
their units are copied side by side into a buffer that stays in the cache, and PyTorch's blocked
kernel sees an ordinary batch. The work is that of the listed keys and no more; what is added is one
copy of each listed unit, which all queries of its tile use.

A `Chunk` is one such batch, of tiles that no other chunk has. The keys of its parts are disjoint;
parts merge by their log-sum-exp, and the backward pass needs no merging (see ``cpu_attention``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._flash import backward_op, forward_op
from .cpu_attention import _widen, _with_lse_columns, with_gradients
from .merge import merge_partials

GATHERED = 1 << 18  # numbers of the keys of one chunk: a megabyte in float32


class Part(NamedTuple):
    """Every tile of the chunk reads ``units (R, n)``.

    ``mask`` is additive, ``(R or 1, 1, b or 1, n * u)``, or None where every key is seen; ``empty
    (R or 1, 1, b)`` marks the rows that it leaves without a key, and is None where there are none.
    """

    units: Tensor
    mask: Tensor | None = None
    empty: Tensor | None = None


class Chunk(NamedTuple):
    """``tiles (R,)`` that run together, and what they read."""

    tiles: Tensor
    parts: list[Part]


def alike(counts: Tensor, numbers: int, share: float = 1.0) -> Iterator[Tensor]:
    """Tiles that read something, in sets whose lists can be stacked.

    ``counts (tiles,)``: the lengths of their lists; a set's shortest is at least ``share`` of its
    longest. ``numbers``: in the keys of one list entry; `GATHERED` bounds those of a set.
    """
    order = torch.argsort(counts, descending=True, stable=True)[: int((counts > 0).sum())]
    lengths, at = counts[order].tolist(), 0
    while at < len(lengths):
        end = min(at + max(1, GATHERED // (lengths[at] * numbers)), len(lengths))
        while lengths[end - 1] < share * lengths[at]:
            end -= 1
        yield order[at:end]
        at = end


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: list[Chunk], scale: float
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``q (tiles, b, D)`` over ``k (units, u, D)`` and ``v (units, u, V)``.

    Rows that see no key are zeros with ``lse = -inf``. Gradients flow through both.
    """
    return with_gradients(_forward, _backward, q, k, v, chunks, scale)


def _gather(x: Tensor, units: Tensor, buffer: Tensor | None = None) -> Tensor:
    """``(units, u, D)`` at ``units (R, n)`` -> ``(R, 1, n * u, D)``, written into ``buffer``."""
    taken = None if buffer is None else buffer[: units.numel()]
    taken = torch.index_select(x, 0, units.flatten(), out=taken)
    return taken.view(len(units), 1, -1, x.shape[-1])


def _forward(q, k, v, chunks, scale) -> tuple[Tensor, Tensor]:
    D, V = q.shape[-1], v.shape[-1]
    q, k, v = (_widen(x, max(D, V)) for x in (q, k, v))
    most = max((part.units.numel() for chunk in chunks for part in chunk.parts), default=0)
    buffers = [x.new_empty(most, *x.shape[1:]) for x in (k, v)]
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for tiles, parts in chunks:
        queries = q.index_select(0, tiles)[:, None]
        done = None
        for part in parts:
            result = _attend(queries, k, v, buffers, part, scale)
            done = result if done is None else merge_partials(*done, *result)
        out.index_copy_(0, tiles, done[0][:, 0])
        lse.index_copy_(0, tiles, done[1][:, 0])
    return out[..., :V], lse


def _attend(queries, k, v, buffers, part: Part, scale) -> tuple[Tensor, Tensor]:
    """``(R, 1, b, D)`` over one part."""
    units, mask, empty = part
    keys, values = (_gather(x, units, y) for x, y in zip((k, v), buffers, strict=True))
    out, lse = forward_op(queries, keys, values, attn_mask=mask, scale=scale)
    if empty is not None:  # the kernel says zero
        lse = lse.masked_fill(empty, -torch.inf)
    return out, lse


def _backward(grad_out, grad_lse, q, k, v, out, lse, chunks, scale):
    D, V = q.shape[-1], v.shape[-1]
    empty = lse == -torch.inf
    if grad_lse is not None:  # what comes back through an empty row's -inf is no number
        grad_lse = grad_lse.masked_fill(empty, 0.0)
    grad_out, out, extra = _with_lse_columns(grad_out, grad_lse, out)
    q, k, v, out, grad_out = (_widen(x, max(D, V + extra)) for x in (q, k, v, out, grad_out))
    lse = lse.masked_fill(empty, torch.inf)  # exp(s - inf): its keys weigh nothing
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    for tiles, parts in chunks:
        grads, queries, *done = (x.index_select(0, tiles)[:, None] for x in (grad_out, q, out, lse))
        for units, mask, _ in parts:
            keys, values = (_gather(x, units) for x in (k, v))
            shares = backward_op(
                grads, queries, keys, values, *done, 0.0, False, attn_mask=mask, scale=scale
            )
            dq.index_add_(0, tiles, shares[0][:, 0].to(wide))
            for total, share in zip((dk, dv), shares[1:], strict=True):
                total.index_add_(0, units.flatten(), share.reshape(-1, *total.shape[1:]).to(wide))
    return dq[..., :D].to(q.dtype), dk[..., :D].to(q.dtype), dv[..., :V].to(q.dtype)
