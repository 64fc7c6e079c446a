"""Attention over a sequence cut among ranks, block by block, as any schedule says.

In each step a rank attends between one stretch of queries and one of keys (`shared.Schedule`) and
merges what it finds into the running ``(out, lse)`` of the queries' owner:

    own queries:   fetch k, v of another rank, attend, merge here
    own keys:      fetch q of another rank, attend, send (out, lse) back, merged there

What step ``t + 1`` needs is under way while step ``t`` computes. The backward pass runs the same
schedule with the finished log-sum-exp (`partial_gradients`): ``dk, dv`` or ``dq`` go back to their
owner. No rank ever holds a row of scores, nor keys of more than two other ranks.

`ring_attention` is the ring with online softmax (Liu et al., arXiv 2310.01889), whose early ranks
idle under a causal mask; `zigzag_ring_attention` evens that out by giving every rank an early and a
late piece (the striped order of arXiv 2311.09431, coarse). Both are baselines of the papers here,
as is `gathered_attention`, which needs no blocks: gather all keys first.
Exact, forward and backward. All stretches have one length.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corelib.primitives import attention, merge_partials
from corelib.primitives._checks import check_attention
from corelib.runtime import all_gather

from ._block_ranks import Blocks, Kept
from .shared import Pair, Schedule, place_in, ring_schedule, stretches

OutMaybeLse = Float[Tensor, "B H n V"] | tuple[Float[Tensor, "B H n V"], Float[Tensor, "B H n"]]
#: ``cut(pair, n)``: the rows of its queries and of its keys that see each other.
Cut = Callable[[Pair, int], tuple[slice, slice]]
ALL = slice(None)


def whole_stretches(pair: Pair, n: int) -> tuple[slice, slice]:
    """Stretches in the order of the sequence: all rows, all keys."""
    return ALL, ALL


def zigzag_halves(pair: Pair, n: int) -> tuple[slice, slice]:
    """Stretches in zigzag order, causal: of an earlier rank the early keys, else the late rows."""
    if pair.keys < pair.queries:
        return ALL, slice(0, n // 2)
    return (slice(n // 2, n), ALL) if pair.keys > pair.queries else (ALL, ALL)


def block_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    schedule: Schedule,
    *,
    causal: bool,
    cut: Cut = whole_stretches,
    scale: Real | None = None,
) -> Float[Tensor, "B H L V"]:
    """The schedule played step by step in this process, on the whole sequence."""
    ranks = len(schedule[0])
    rows, keys, values = (stretches(x, ranks) for x in (q, k, v))
    outs = [x.new_zeros(*x.shape[:3], v.shape[3]) for x in rows]
    lses = [x.new_full(x.shape[:3], -torch.inf) for x in rows]
    for step in schedule:
        for pair in filter(None, step):
            r, s = cut(pair, rows[0].shape[2])
            out, lse = outs[pair.queries].clone(), lses[pair.queries].clone()
            before = out[:, :, r].clone(), lse[:, :, r].clone()
            part = attention(
                rows[pair.queries][:, :, r], keys[pair.keys][:, :, s], values[pair.keys][:, :, s],
                causal=causal and pair.queries == pair.keys, scale=scale, return_lse=True,
            )  # fmt: skip
            out[:, :, r], lse[:, :, r] = merge_partials(*before, *part)
            outs[pair.queries], lses[pair.queries] = out, lse
    return torch.cat(outs, 2)


# --- on ranks -------------------------------------------------------------------------------------


def block_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    schedule: Schedule,
    *,
    causal: bool,
    cut: Cut = whole_stretches,
    scale: Real | None = None,
    group: Any = None,
    return_lse: bool = False,
    kept: Kept | None = None,
) -> OutMaybeLse:
    """This rank's rows of attention, with the work shared out by ``schedule``.

    Call it on every rank of ``group`` with stretches of one length. Forward and backward are
    collectives. ``kept``: where a recomputation finds the outputs of the first time.

    Raises ValueError or TypeError for shapes, dtypes, options or a schedule that do not fit,
    RuntimeError outside a rank.
    """
    check_attention(q, k, v, None, 0, scale)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected the positions of q, {q.shape[2]}, got {k.shape[2]}")
    _, ranks = place_in(group)
    if len(schedule[0]) != ranks:
        raise ValueError(f"schedule: expected one for {ranks} ranks, got {len(schedule[0])}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = Blocks.apply(q, k, v, schedule, causal, cut, scale, group, kept or Kept())
    return (out, lse) if return_lse else out


def ring_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    *,
    causal: bool,
    scale: Real | None = None,
    group: Any = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """The ring with online softmax: keys and values come by, a rank at a time."""
    schedule = ring_schedule(place_in(group)[1], causal=causal)
    options = dict(causal=causal, scale=scale, group=group, return_lse=return_lse)
    return block_attention(q, k, v, schedule, **options)


def zigzag_ring_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    *,
    causal: bool,
    scale: Real | None = None,
    group: Any = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """The ring on a sequence in `zigzag_order`: every rank has half a block in every step.

    Not causal, the order does not matter and this is `ring_attention`.
    """
    if q.shape[2] % 2:
        raise ValueError(f"q: expected an even number of positions a rank, got {q.shape[2]}")
    schedule = ring_schedule(place_in(group)[1], causal=False)
    cut = zigzag_halves if causal else whole_stretches
    options = dict(causal=causal, cut=cut, scale=scale, group=group, return_lse=return_lse)
    return block_attention(q, k, v, schedule, **options)


def gathered_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    *,
    causal: bool,
    scale: Real | None = None,
    group: Any = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """No schedule at all: every rank gathers all keys and values, then attends with its queries.

    As in the training of Llama 3 (arXiv 2407.21783): simple and, with few key/value heads, cheap to
    send; but every rank holds all keys, and under a causal mask the last rank has the most to do.
    """
    check_attention(q, k, v, None, 0, scale)
    rank, ranks = place_in(group)
    seen = (rank + 1 if causal else ranks) * q.shape[2]
    keys, values = (all_gather(x, 2, group)[:, :, :seen] for x in (k, v))
    return attention(q, keys, values, causal=causal, scale=scale, return_lse=return_lse)
