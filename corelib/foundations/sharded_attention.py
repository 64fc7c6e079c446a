"""Multi-head attention over a sequence that no worker holds: the system part of `unified_mixing`.

Worker ``r`` of ``P`` holds a stretch of positions, ``q_r, k_r, v_r``, of any length. It attends to
its own stretch, then keys and values come by in tiles, one of every worker at a time, and each
partial result is merged into what it has (`corelib.primitives.merge_partials`):

    out, lse = attention(q_r, k_r, v_r)
    for each tile t:    kv = all_gather(k_r[t], v_r[t])
                        out, lse = merge(out, lse, attention(q_r, kv of the others))

The backward pass has not kept what came by: tiles come again, each partial's gradients follow from
``lse`` alone, and those of keys and values are summed at their owners. With the share of a tile in
the result ``w = exp(lse_t - lse)``,

    d out_t = w d_out        d lse_t = w (d_out . out_t - d_out . out + d_lse)

and the rest is the gradient of ordinary attention over one tile (PyTorch's blocked kernel, here and
there). So no worker ever holds scores ``L x L``, nor all keys, in either direction.

Bytes that a worker sends, with ``n`` the longest stretch: forward ``(P - 1) B G n (D + V)`` numbers
(`bytes_per_worker`), backward twice that. Heads need no traffic at all: give every worker its heads
and name those that share them as its ``group``. Under a causal mask the first worker has the least
to do and all wait for the last (`worker_steps`); interleaved stretches would cure that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corelib.primitives import attention, merge_partials
from corelib.primitives._checks import check_attention
from corelib.primitives.partial_gradients import partial_gradients
from corelib.runtime import all_gather, all_reduce, reduce_scatter

from .shared import check_counts

OutMaybeLse = Float[Tensor, "B H L V"] | tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L"]]


class Step(NamedTuple):
    """``worker`` meets keys ``start .. stop`` of ``source`` in round ``number`` (0: its own).

    ``pairs``: how many (query, key) pairs it scores.
    """

    worker: int
    number: int
    source: int
    start: int
    stop: int
    pairs: int


def worker_steps(lengths: Sequence[int], *, causal: bool, tile: int) -> list[Step]:
    """What every worker does, round by round; ``lengths`` are the stretches of the workers."""
    check_counts(tile=tile)
    steps = [
        Step(w, 0, w, 0, n, n * (n + 1) // 2 if causal else n * n) for w, n in enumerate(lengths)
    ]
    for number, start in enumerate(range(0, max(lengths), tile), 1):
        for worker, queries in enumerate(lengths):
            for source in _visible(worker, len(lengths), causal):
                stop = min(start + tile, lengths[source])
                if start < stop:
                    pairs = queries * (stop - start)
                    steps.append(Step(worker, number, source, start, stop, pairs))
    return steps


def sharded_attention_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: Real | None = None,
    tile: int = 512,
) -> Float[Tensor, "B H L V"]:
    """The workers' rounds played one after the other in this process, as `worker_steps` says."""
    check_attention(q, k, v, None, 0, scale)
    if sum(lengths) != q.shape[2]:
        raise ValueError(f"lengths: expected stretches of {q.shape[2]} in all, got {lengths}")
    lengths = list(lengths)
    rows, keys, values = (x.split(lengths, 2) for x in (q, k, v))
    held: dict[int, tuple[Tensor, Tensor]] = {}
    for step in worker_steps(lengths, causal=causal, tile=tile):
        here = slice(step.start, step.stop)
        partial = attention(
            rows[step.worker], keys[step.source][:, :, here], values[step.source][:, :, here],
            causal=causal and step.number == 0, scale=scale, return_lse=True,
        )  # fmt: skip
        held[step.worker] = merge_partials(*held[step.worker], *partial) if step.number else partial
    return torch.cat([held[w][0] for w in range(len(lengths))], 2)


def bytes_per_worker(
    longest: int, workers: int, *, batch: int, groups: int, widths: int, itemsize: int
) -> int:
    """Bytes of keys and values that a worker sends forward; ``widths`` is ``D + V``.

    The backward pass sends these again, and as many of gradients.
    """
    return (workers - 1) * batch * groups * longest * widths * itemsize


# --- on real ranks --------------------------------------------------------------------------------


def sharded_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G L D"],
    v: Float[Tensor, "B G L V"],
    *,
    causal: bool,
    scale: Real | None = None,
    tile: int = 512,
    group: Any = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """This rank's rows of exact attention over the sequence that all ranks hold together.

    Call it on every rank of ``group`` (None: all) with that rank's stretch; stretches follow each
    other in rank order and may differ in length, 0 included. On all ranks the same things must
    need gradients, and every rank must run the backward pass: both passes are collectives.

    Args:
        q, k, v: the positions of this rank; heads are grouped as in `corelib.primitives.attention`.
        causal: a query sees itself and what is before it, on whatever rank.
        scale: ``None`` means ``D ** -0.5``.
        tile: keys of each rank that come by at a time.
        group: the ranks that share these heads.

    Returns:
        ``out``, and with ``return_lse`` also ``lse (B, H, L)``, natural logarithms.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, RuntimeError
    outside a rank.
    """
    check_attention(q, k, v, None, 0, scale)
    check_counts(tile=tile)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected the positions of q, {q.shape[2]}, got {k.shape[2]}")
    mine = torch.tensor([q.shape[2]], device=q.device)
    lengths = all_gather(mine, group=group).tolist()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _Sharded.apply(q, k, v, lengths, _rank(group), causal, scale, tile, group)
    return (out, lse) if return_lse else out


def _rank(group: Any) -> int:
    return torch.distributed.get_rank(group)


def _visible(worker: int, workers: int, causal: bool) -> list[int]:
    """The other workers whose keys it sees, all of each."""
    return [s for s in range(workers) if s != worker and (not causal or s < worker)]


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, rank, causal, scale, tile, group):
        out, lse = attention(q, k, v, causal=causal, scale=scale, return_lse=True)
        wide = out.to(lse.dtype)
        for _, _, keys, values in _tiles(k, v, lengths, rank, causal, tile, group):
            if keys.shape[2]:
                partial = attention(q, keys, values, causal=False, scale=scale, return_lse=True)
                wide, lse = merge_partials(wide, lse, partial[0].to(lse.dtype), partial[1])
        ctx.save_for_backward(q, k, v, wide, lse)
        ctx.settings = lengths, rank, causal, scale, tile, group
        return wide.to(out.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        lengths, rank, causal, scale, tile, group = ctx.settings
        context = (d_out.to(out.dtype), (d_out * out).sum(-1) - d_lse, lse, scale)
        dq, dk, dv = _gradients(q, k, v, causal, *context)
        widths = [k.shape[3], v.shape[3]]
        for start, sources, keys, values in _tiles(k, v, lengths, rank, causal, tile, group):
            room = min(tile, max(lengths) - start)
            more, dkeys, dvalues = _gradients(q, keys, values, False, *context)
            dq = dq + more
            # (P, B, G, room, D + V): each source's gradients in its place, then home with them
            home = dq.new_zeros(len(lengths), *keys.shape[:2], room, sum(widths))
            at = 0
            for source, n in sources:
                home[source, :, :, :n, : widths[0]] = dkeys[:, :, at : at + n]
                home[source, :, :, :n, widths[0] :] = dvalues[:, :, at : at + n]
                at += n
            n = max(0, min(room, k.shape[2] - start))
            came = reduce_scatter(home, group=group)[0][:, :, :n].split(widths, -1)
            dk[:, :, start : start + n] += came[0]
            dv[:, :, start : start + n] += came[1]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 6


def _tiles(k, v, lengths, rank, causal, tile, group) -> Iterator[tuple]:
    """Round by round: where it starts, ``(source, keys)`` of whom this rank sees, and those."""
    visible, longest = _visible(rank, len(lengths), causal), max(lengths)
    if len(lengths) == 1:
        return
    for start in range(0, longest, tile):
        room = min(tile, longest - start)
        piece = torch.cat([k[:, :, start : start + room], v[:, :, start : start + room]], -1)
        piece = F.pad(piece, (0, 0, 0, room - piece.shape[2]))  # shorter stretches send zeros
        came = all_gather(piece[None], group=group)
        sources = [(s, max(0, min(room, lengths[s] - start))) for s in visible]
        seen = torch.cat([came[s][:, :, :n] for s, n in sources] or [piece[:, :, :0]], 2)
        yield start, sources, *seen.split([k.shape[3], v.shape[3]], -1)


def _gradients(q, k, v, causal, d_out, delta, lse, scale) -> tuple[Tensor, Tensor, Tensor]:
    """One partial's share of the gradients, in the dtype that they are summed in."""
    grads = partial_gradients(q, k, v, d_out, delta, lse, causal=causal, scale=scale)
    return tuple(g.to(lse.dtype) for g in grads)


class ShardedMultiHeadAttention(nn.Module):
    """Multi-head self-attention that also runs on a sequence cut among ranks.

    Weights are the same on every rank. After the backward pass of `sharded`, `sum_gradients`
    makes their gradients those of the whole sequence.

    Args:
        C: model width. heads: query heads; they divide ``C``. groups: key/value heads.
    """

    def __init__(
        self, C: int, heads: int, groups: int | None = None, *, causal: bool = False, **options
    ):
        super().__init__()
        groups = heads if groups is None else groups
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        if groups < 1 or heads % groups:
            raise ValueError(f"groups: expected a divisor of heads = {heads}, got {groups}")
        self.heads, self.groups, self.causal = heads, groups, causal
        width = C // heads
        self.widths = [heads * width, groups * width, groups * width]
        self.into = nn.Linear(C, sum(self.widths), bias=False, **options)
        self.out = nn.Linear(C, C, bias=False, **options)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """The whole sequence, in this process."""
        return self._joined(attention(*self._heads(x), causal=self.causal))

    def sharded(
        self, x: Float[Tensor, "B L C"], *, tile: int = 512, group: Any = None
    ) -> Float[Tensor, "B L C"]:
        """This rank's stretch of the sequence."""
        out = sharded_attention(*self._heads(x), causal=self.causal, tile=tile, group=group)
        return self._joined(out)

    def sum_gradients(self, group: Any = None) -> None:
        """Add up every parameter's gradient over the ranks."""
        for parameter in self.parameters():
            parameter.grad = all_reduce(parameter.grad, group=group)

    def _heads(self, x: Tensor) -> list[Tensor]:
        parts = self.into(x).split(self.widths, -1)
        counts = self.heads, self.groups, self.groups
        split = (part.unflatten(-1, (n, -1)) for part, n in zip(parts, counts, strict=True))
        return [part.transpose(1, 2) for part in split]

    def _joined(self, out: Tensor) -> Tensor:
        return self.out(out.transpose(1, 2).flatten(2))
