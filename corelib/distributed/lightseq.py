"""LightSeq, or DistFlashAttn: causal ring attention without idle ranks (arXiv 2310.03294).

Idea: under a causal mask the early ranks of a ring have nothing to do for most of the time. Let
them compute blocks *for late ranks*: fetch queries instead of keys, send the partial result back.
In step ``t`` of ``P // 2 + 1`` rank ``r`` works (`balanced_schedule`)

    t = 0           on its own stretch, causally
    r - t >= 0      on its own queries with the keys of rank r - t
    else            on its own keys with the queries of rank r - t + P, as a helper

and a partial result is merged by its log-sum-exp (`corelib.primitives.merge_partials`). For even
``P`` the helpers of the last step would repeat pairs of that very step, so they idle: ``P / 2``
slots. What a step needs is fetched during the one before.

Second idea, for training with recomputation: a checkpoint at the layer's input makes the backward
pass run the whole attention, with its communication, once more just to get its output again. Put
the checkpoint *behind* attention: keep ``out`` and ``lse``, and recompute only what is cheap
(`remat_aware_checkpoint`).

| here              | paper                 | what                                            |
|:------------------|:----------------------|:------------------------------------------------|
| ranks, P          | P                     | workers; ``n = L / P`` positions each           |
| out, lse          | o, (m, l)             | partial result; normalised here, not there      |
| helper            | helper                | works for another rank's queries                |
| kept              | saved o, L            | what recomputation takes instead of attending   |

Exact: equals attention over the whole sequence, forward and backward, with more ranks than heads
too. Different: the released code wants an even ``P``, here any; partial results are exchanged
normalised with their log-sum-exp, the same numbers; both exchanges are point to point.
Bytes a rank sends depend on its place (`bytes_sent`). Not causal there is no triangle to fold: then
this is the plain ring. Oracle: dense attention; the schedule, against all pairs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .block_attention import Kept, OutMaybeLse, block_attention, block_attention_reference
from .shared import Pair, Schedule, borrowed_from, check_ranks, place_in, ring_schedule


def balanced_schedule(ranks: int) -> Schedule:
    """Every causal pair of stretches once, in ``ranks // 2 + 1`` steps."""
    check_ranks(ranks)
    return [[_work(r, t, ranks) for r in range(ranks)] for t in range(ranks // 2 + 1)]


def _work(r: int, t: int, ranks: int) -> Pair | None:
    if r >= t:
        return Pair(r, r - t)
    return None if 2 * t == ranks else Pair(r - t + ranks, r)


def dist_flash_attention(
    q: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    *,
    causal: bool,
    scale: Real | None = None,
    group: Any = None,
    return_lse: bool = False,
    kept: Kept | None = None,
) -> OutMaybeLse:
    """This rank's rows of attention over the sequence that all ranks of ``group`` hold together.

    Call it on every rank with that rank's stretch, of one length on all ranks, in rank order.
    Forward and backward are collectives. ``kept`` is for `remat_aware_checkpoint`. With
    ``return_lse`` also the log-sum-exp ``(B, H, n)``, natural logarithms.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, RuntimeError
    outside a rank.
    """
    _, ranks = place_in(group)
    schedule = balanced_schedule(ranks) if causal else ring_schedule(ranks, causal=False)
    options = dict(causal=causal, scale=scale, group=group, return_lse=return_lse, kept=kept)
    return block_attention(q, k, v, schedule, **options)


def dist_flash_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    *,
    ranks: int,
    scale: Real | None = None,
) -> Float[Tensor, "B H L V"]:
    """The balanced schedule step by step in this process, causal. ``ranks`` divides ``L``."""
    schedule = balanced_schedule(ranks)
    return block_attention_reference(q, k, v, schedule, causal=True, scale=scale)


def remat_aware_checkpoint(
    block: Callable[[Tensor, Kept], Tensor], x: Tensor, kept: Kept | None = None
) -> Tensor:
    """``block(x, kept)`` with recomputation in the backward pass, but of attention.

    ``block`` hands ``kept`` to every `dist_flash_attention` in it. Of the block only ``x`` and the
    outputs and log-sum-exps of attention are held until the backward pass; it recomputes the rest,
    and attention runs once (``kept.attended`` counts), not twice.
    """
    kept = Kept() if kept is None else kept
    return _recomputed(lambda x: block(x, kept), x, kept.replaying)


def layer_checkpoint(
    block: Callable[[Tensor, Kept], Tensor], x: Tensor, kept: Kept | None = None
) -> Tensor:
    """The usual checkpoint, to compare with: only ``x`` is held, and attention runs once more."""
    kept = Kept() if kept is None else kept
    return _recomputed(lambda x: block(x, kept), x, contextlib.nullcontext)


def _recomputed(block: Callable[[Tensor], Tensor], x: Tensor, again: Callable) -> Tensor:
    """``block(x)``; what autograd wants of it is made a second time, within ``again()``.

    As ``torch.utils.checkpoint``, which imports torch's compiler first (five seconds of a core, on
    every rank) and also restores random states; here ``block`` must not draw random numbers.
    """
    saved, numbers = {}, itertools.count()

    def recompute() -> None:
        places = itertools.count()
        keep = lambda tensor: saved.__setitem__(next(places), tensor.detach())  # noqa: E731
        with torch.enable_grad(), again(), saved_tensors_hooks(keep, lambda _: None):
            block(x.detach().requires_grad_(x.requires_grad))

    def unpack(number: int) -> Tensor:
        if number not in saved:
            recompute()
        return saved.pop(number)

    with saved_tensors_hooks(lambda _: next(numbers), unpack):
        return block(x)


def bytes_sent(
    schedule: Schedule, n: int, *, B: int, H: int, G: int, D: int, itemsize: int
) -> list[tuple[int, int]]:
    """Bytes that each rank sends ``(forward, backward)`` under any schedule; values ``D`` wide.

    A fetch of keys and values is ``2 G D`` numbers a position and comes back as many gradients; a
    fetch of queries ``H D``, and ``H (D + 1)`` come back. In the backward pass queries travel with
    their output's gradient and two numbers a row, and ``H D`` come back.
    """
    keys, queries = 2 * G * D, H * D
    rows = B * n * itemsize
    sent = [[0, 0] for _ in schedule[0]]
    for step in schedule:
        for worker, pair in enumerate(step):
            lender = borrowed_from(worker, pair)
            if lender is None:
                continue
            if pair.queries == worker:
                there, back = (keys, keys), (0, keys)
            else:
                there, back = (queries, 2 * queries + 2 * H), (queries + H, queries)
            for direction in (0, 1):
                sent[lender][direction] += there[direction] * rows
                sent[worker][direction] += back[direction] * rows
    return [tuple(pair) for pair in sent]


def idle_slots(schedule: Schedule) -> int:
    """How many (step, rank) places of the schedule hold no work."""
    return sum(pair is None for step in schedule for pair in step)


def example() -> dict:
    """Twelve positions, for one, two, three or four ranks: ``q, k, v`` of the whole sequence.

    >>> dist_flash_attention_reference(**example(), ranks=4).shape
    torch.Size([2, 4, 12, 4])
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 12, 4), (2, 2, 12, 4), (2, 2, 12, 4)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dict(q=q, k=k, v=v)
