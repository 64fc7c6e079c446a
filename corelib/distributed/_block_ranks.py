"""One rank's part in `block_attention`: play a schedule forward and backward, and exchange.

`_play` is the loop over steps; `_forward` and `_backward` say what is lent, computed and merged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corelib.primitives import attention, merge_partials
from corelib.primitives.partial_gradients import partial_gradients

from .shared import Pair, borrowed_from, place_in, start_exchange


class Kept:
    """Outputs that a recomputation takes instead of attending again (`remat_aware_checkpoint`)."""

    def __init__(self):
        self.results: list[tuple[Tensor, Tensor]] = []
        self.attended = 0  # how often attention really ran
        self._next: int | None = None  # None: recording

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        self._next = 0
        try:
            yield
        finally:
            self._next = None

    def get(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if self._next is None:
            self.attended += 1
            self.results.append(compute())
            return self.results[-1]
        self._next += 1
        return self.results[self._next - 1]


class Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, schedule, causal, cut, scale, group, kept):
        out, lse = kept.get(lambda: _forward(q, k, v, schedule, causal, cut, scale, group))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = schedule, causal, cut, scale, group
        return out.to(q.dtype, copy=True), lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        d_out = d_out.to(lse.dtype)
        delta = (d_out * out).sum(-1) - d_lse
        grads = _backward(q, k, v, d_out, delta, lse, *ctx.settings)
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), *[None] * 6


def _forward(q, k, v, schedule, causal, cut, scale, group) -> tuple[Tensor, Tensor]:
    rank, _ = place_in(group)
    D, V, n = q.shape[3], v.shape[3], q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:3], V, dtype=wide)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)

    def attend(pair: Pair, packet: Tensor | None) -> Tensor:
        queries, keys, values = q, k, v
        if pair.queries != rank:
            queries = packet
        elif packet is not None:
            keys, values = packet.split([D, V], -1)
        r, s = cut(pair, n)
        part, part_lse = attention(
            queries[:, :, r], keys[:, :, s], values[:, :, s],
            causal=causal and pair.queries == pair.keys, scale=scale, return_lse=True,
        )  # fmt: skip
        return torch.cat([part.to(wide), part_lse[..., None]], -1)

    def take(pair: Pair, answer: Tensor) -> None:
        r, _ = cut(pair, n)
        part, part_lse = answer[..., :V], answer[..., V]
        out[:, :, r], lse[:, :, r] = merge_partials(out[:, :, r], lse[:, :, r], part, part_lse)

    lent = {"keys": lambda: torch.cat([k, v], -1), "queries": lambda: q}
    answers = {"queries": lambda pair: out.new_empty(*q[:, :, cut(pair, n)[0]].shape[:3], V + 1)}
    _play(schedule, lent, answers, attend, take, group)
    return out, lse


def _backward(q, k, v, d_out, delta, lse, schedule, causal, cut, scale, group) -> list[Tensor]:
    rank, _ = place_in(group)
    widths, n = [k.shape[3], v.shape[3]], q.shape[2]
    query_widths = [q.shape[3], v.shape[3], 1, 1]
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    context = [d_out, delta[..., None], lse[..., None]]

    def differentiate(pair: Pair, packet: Tensor | None) -> Tensor | None:
        queries, keys, values, (d, e, l) = q, k, v, context
        if pair.queries != rank:
            queries, d, e, l = packet.split(query_widths, -1)
            queries = queries.to(q.dtype)
        elif packet is not None:
            keys, values = packet.split(widths, -1)
        r, s = cut(pair, n)
        shares = partial_gradients(
            queries[:, :, r], keys[:, :, s], values[:, :, s], d[:, :, r], e[:, :, r, 0],
            l[:, :, r, 0], causal=causal and pair.queries == pair.keys, scale=scale,
        )  # fmt: skip
        if pair.queries == rank:
            dq[:, :, r] += shares[0]
        if pair.keys == rank:
            dk[:, :, s] += shares[1]
            dv[:, :, s] += shares[2]
        home = shares[:1] if pair.queries != rank else shares[1:]
        return torch.cat(home, -1).to(lse.dtype)

    def take(pair: Pair, answer: Tensor) -> None:
        r, s = cut(pair, n)
        if pair.queries == rank and pair.keys != rank:
            dq[:, :, r] += answer
        elif pair.keys == rank and pair.queries != rank:
            dk[:, :, s] += answer[..., : widths[0]]
            dv[:, :, s] += answer[..., widths[0] :]

    lent = {
        "keys": lambda: torch.cat([k, v], -1),
        "queries": lambda: torch.cat([q.to(lse.dtype), *context], -1),
    }
    answers = {
        "queries": lambda pair: torch.empty_like(dq[:, :, cut(pair, n)[0]]),
        "keys": lambda pair: torch.cat([dk, dv], -1)[:, :, cut(pair, n)[1]],
    }
    _play(schedule, lent, answers, differentiate, take, group)
    return [dq, dk, dv]


def _play(schedule, lent, answers, work, take, group) -> None:
    """Run the steps of the schedule on this rank.

    ``lent[kind]()`` is what others borrow of this rank, ``work(pair, packet)`` a step's answer;
    it goes back to the lender where ``answers`` has its kind and else stays. ``take(pair, answer)``
    merges an answer for this rank.
    """
    rank, _ = place_in(group)
    lent = {kind: make() for kind, make in lent.items()}

    def fetch(t: int) -> Callable[[], list[Tensor]] | None:
        if t == len(schedule):
            return None
        mine = borrowed_from(rank, schedule[t][rank])
        sends = [(lent[kind], w) for w, _, kind in _borrowers(schedule[t], rank)]
        like = [] if mine is None else [(lent[_kind(rank, schedule[t][rank])], mine)]
        return start_exchange(sends, like, group, tag=2 * t)

    coming, late = fetch(0), None
    for t, step in enumerate(schedule):
        packets, coming = coming(), fetch(t + 1)
        pair, back = step[rank], []
        if pair is not None:
            answer = work(pair, packets[0] if packets else None)
            lender = borrowed_from(rank, pair)
            if lender is not None and _kind(rank, pair) in answers:
                back = [(answer, lender)]
            else:
                take(pair, answer)
        due = [(w, p, kind) for w, p, kind in _borrowers(step, rank) if kind in answers]
        if late is not None:
            late()
        late = _answers(start_exchange(
            back, [(answers[kind](p), w) for w, p, kind in due], group, tag=2 * t + 1
        ), due, take)  # fmt: skip
    late()


def _answers(wait: Callable[[], list[Tensor]], due: list, take: Callable) -> Callable[[], None]:
    def finish() -> None:
        for (_, pair, _), answer in zip(due, wait(), strict=True):
            take(pair, answer)

    return finish


def _kind(worker: int, pair: Pair) -> str:
    """What the worker borrows for this pair."""
    return "keys" if pair.queries == worker else "queries"


def _borrowers(step: list, rank: int) -> list[tuple[int, Pair, str]]:
    """Who works with this rank's tensors in this step, on which pair, with what."""
    return [
        (worker, pair, _kind(worker, pair))
        for worker, pair in enumerate(step)
        if borrowed_from(worker, pair) == rank
    ]
