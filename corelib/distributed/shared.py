"""What methods that cut the sequence among ranks share: rings, schedules, an exchange, a layer.

A *schedule* says which (stretch of queries, stretch of keys) each rank works on, step by step. It
is data, so that it can be counted, drawn, timed (`cost_model`) and played by one process or by
real ranks (`block_attention`). A rank that works on its own queries fetches keys and values; one
that works on its own keys is a *helper*: it fetches queries and sends a partial result back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives import attention
from corelib.runtime import all_reduce, ring_shift
from corelib.runtime.traffic import record


class Pair(NamedTuple):
    """Queries of one rank with keys of one rank; who works on it says the place in the schedule."""

    queries: int
    keys: int


#: ``schedule[step][rank]``: what the rank works on in that step; None: nothing.
Schedule = list[list[Pair | None]]


def ring_schedule(ranks: int, *, causal: bool) -> Schedule:
    """Ring attention's: in step ``t`` rank ``r`` meets the keys of rank ``r - t``.

    Under a causal mask a rank idles while keys of later ranks go by.
    """
    check_ranks(ranks)
    return [
        [Pair(r, (r - t) % ranks) if r >= t or not causal else None for r in range(ranks)]
        for t in range(ranks)
    ]


def borrowed_from(worker: int, pair: Pair | None) -> int | None:
    """Whose tensors the worker needs for this pair; None: nobody's."""
    if pair is None or pair.queries == pair.keys:
        return None
    return pair.keys if pair.queries == worker else pair.queries


def check_ranks(ranks: int) -> None:
    if isinstance(ranks, bool) or not isinstance(ranks, int):
        raise TypeError(f"ranks: expected an int, got {type(ranks).__name__}")
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}")


def stretches(x: Tensor, ranks: int, dim: int = 2) -> tuple[Tensor, ...]:
    """``x`` in as many equal stretches along ``dim`` as there are ranks."""
    check_ranks(ranks)
    if x.shape[dim] % ranks:
        raise ValueError(f"ranks: expected a divisor of the length {x.shape[dim]}, got {ranks}")
    return x.chunk(ranks, dim) if ranks > 1 else (x,)


# --- zigzag ---------------------------------------------------------------------------------------


def zigzag_order(length: int, ranks: int) -> list[int]:
    """Positions in zigzag order: of ``2 ranks`` pieces, rank ``r`` gets ``r`` and ``-1 - r``.

    ``x[zigzag_order(L, P)]``, cut into equal stretches, gives every rank an early and a late
    piece, and so every rank the same share of the causal triangle.
    """
    check_ranks(ranks)
    if length % (2 * ranks):
        raise ValueError(f"length: expected a multiple of {2 * ranks}, got {length}")
    n = length // (2 * ranks)
    pieces = [p for r in range(ranks) for p in (r, 2 * ranks - 1 - r)]
    return [p * n + i for p in pieces for i in range(n)]


# --- on ranks -------------------------------------------------------------------------------------


def place_in(group: Any = None) -> tuple[int, int]:
    """This rank's number in the group and the group's size."""
    if not dist.is_initialized():
        raise RuntimeError("this runs inside a rank: call it from a function given to run_ranks")
    return dist.get_rank(group), dist.get_world_size(group)


def ring_pass(x: Tensor, group: Any = None) -> Iterator[tuple[int, Tensor]]:
    """Every rank's ``x`` in turn as it comes round the ring: ``(its owner, it)``, own first.

    ``P - 1`` hops; each sends one ``x``, of the same shape on all ranks.
    """
    rank, ranks = place_in(group)
    for hop in range(ranks):
        yield (rank - hop) % ranks, x
        if hop < ranks - 1:
            x = ring_shift(x, 1, group)


def ring_sum(share: Callable[[int], Tensor], group: Any = None) -> Tensor:
    """The sum over ranks of their ``share(this rank)``, collected on the way round the ring.

    The sum for owner ``s`` starts at rank ``s + 1``, gains every rank's share and gets home after
    ``P - 1`` hops; no rank ever holds more than one of them.
    """
    rank, ranks = place_in(group)
    total = share((rank - 1) % ranks)
    for hop in range(2, ranks + 1):
        total = ring_shift(total, 1, group) + share((rank - hop) % ranks)
    return total


def start_exchange(
    sends: Sequence[tuple[Tensor, int]],
    receives: Sequence[tuple[Tensor, int]],
    group: Any = None,
    tag: int = 0,
) -> Callable[[], list[Tensor]]:
    """Start sending ``(tensor, to)`` and receiving ``(like, from)``; call the result to wait.

    It gives the tensors that came, in the order of ``receives``. Between start and wait the rank
    computes: that is how communication hides. Bytes count as ``"exchange"``.
    """

    def global_rank(r: int) -> int:
        return r if group is None else dist.get_global_rank(group, r)

    sends = [(x.contiguous(), r) for x, r in sends]
    came = [torch.empty_like(x, memory_format=torch.contiguous_format) for x, _ in receives]
    for x, _ in sends:
        record("exchange", x.numel() * x.element_size())
    operations = [dist.P2POp(dist.isend, x, global_rank(r), group, tag) for x, r in sends]
    operations += [
        dist.P2POp(dist.irecv, x, global_rank(r), group, tag)
        for x, (_, r) in zip(came, receives, strict=True)
    ]
    works = dist.batch_isend_irecv(operations) if operations else []

    def wait(_alive=sends) -> list[Tensor]:
        for work in works:
            work.wait()
        return came

    return wait


class SequenceParallelAttention(nn.Module):
    """Multi-head self-attention whose sequence is cut among ranks; weights are on every rank.

    After the backward pass of `forward`, `sum_gradients` makes the weights' gradients those of the
    whole sequence.

    Args:
        core: ``f(q, k, v, *, causal, group)`` on this rank's stretch, such as
            `ring_self_attention`, `dist_flash_attention` or `ulysses_attention`.
        C: model width. heads: query heads; they divide ``C``. groups: key/value heads.
    """

    def __init__(
        self,
        core: Callable[..., Tensor],
        C: int,
        heads: int,
        groups: int | None = None,
        *,
        causal: bool,
        **options: Any,
    ):
        super().__init__()
        groups = heads if groups is None else groups
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        if groups < 1 or heads % groups:
            raise ValueError(f"groups: expected a divisor of heads = {heads}, got {groups}")
        self.core, self.causal, self.counts = core, causal, [heads, groups, groups]
        self.into = nn.Linear(C, sum(self.counts) * (C // heads), bias=False, **options)
        self.out = nn.Linear(C, C, bias=False, **options)

    def forward(self, x: Float[Tensor, "B n C"], *, group: Any = None) -> Float[Tensor, "B n C"]:
        """This rank's stretch of the sequence; call it on every rank of the group."""
        out = self.core(*self._heads(x), causal=self.causal, group=group)
        return self.out(out.transpose(1, 2).flatten(2))

    def whole(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """The whole sequence, in this process."""
        out = attention(*self._heads(x), causal=self.causal)
        return self.out(out.transpose(1, 2).flatten(2))

    def sum_gradients(self, group: Any = None) -> None:
        """Add up every parameter's gradient over the ranks."""
        for parameter in self.parameters():
            parameter.grad = all_reduce(parameter.grad, group=group)

    def _heads(self, x: Tensor) -> list[Tensor]:
        heads = self.into(x).unflatten(-1, (sum(self.counts), -1)).transpose(1, 2)
        return list(heads.split(self.counts, 1))
