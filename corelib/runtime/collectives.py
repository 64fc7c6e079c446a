"""Differentiable collectives on `torch.distributed` that count the bytes they send.

Each is a function of the local tensor that returns a new one, on gloo and on NCCL, and each one's
backward pass is again a collective:

==============  ============================  ==============================
forward         backward                      because
==============  ============================  ==============================
all_reduce      all_reduce                    every output holds every input
all_gather      reduce_scatter                the adjoint of copying is adding
reduce_scatter  all_gather                    and the other way round
all_to_all      all_to_all with axes swapped  a permutation's adjoint is its inverse
ring_shift      ring_shift the other way      likewise
broadcast       sum to the source             likewise; other ranks get zeros
==============  ============================  ==============================

Here the loss is the *sum over ranks* of what each computes: gradients are those of that sum.
``group=None`` means all ranks. With one rank every collective is the identity and sends nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from .traffic import record

AnyTensor = Shaped[Tensor, "..."]


def all_reduce(x: AnyTensor, group: dist.ProcessGroup | None = None) -> AnyTensor:
    """The sum of every rank's ``x``."""
    return _AllReduce.apply(_checked("all_reduce", x), group)


def all_gather(x: AnyTensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> AnyTensor:
    """Every rank's ``x``, joined along ``dim`` in rank order."""
    x = _checked("all_gather", x)
    return _AllGather.apply(x, _axis(x, dim), group)


def reduce_scatter(x: AnyTensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> AnyTensor:
    """This rank's piece along ``dim`` of the sum of every rank's ``x``."""
    x = _checked("reduce_scatter", x)
    return _ReduceScatter.apply(x, _split_axis("reduce_scatter", x, dim, group), group)


def all_to_all(
    x: AnyTensor, split: int, join: int, group: dist.ProcessGroup | None = None
) -> AnyTensor:
    """Cut ``x`` along ``split``, send piece ``r`` to rank ``r``, join what comes along ``join``."""
    x = _checked("all_to_all", x)
    return _AllToAll.apply(x, _split_axis("all_to_all", x, split, group), _axis(x, join), group)


def ring_shift(x: AnyTensor, step: int = 1, group: dist.ProcessGroup | None = None) -> AnyTensor:
    """Send ``x`` to rank ``r + step`` and return what comes from rank ``r - step``, on a ring."""
    return _RingShift.apply(_checked("ring_shift", x), step, group)


def broadcast(x: AnyTensor, source: int = 0, group: dist.ProcessGroup | None = None) -> AnyTensor:
    """The ``x`` of rank ``source`` (its number in the group); the others give shape and dtype."""
    x = _checked("broadcast", x)
    if not 0 <= source < dist.get_world_size(group):
        raise ValueError(f"source: expected 0 to {dist.get_world_size(group) - 1}, got {source}")
    return _Broadcast.apply(x, source, group)


def _checked(name: str, x: Tensor) -> Tensor:
    if not dist.is_initialized():
        raise RuntimeError(f"{name} runs inside a rank: call it from a function given to run_ranks")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    return x


def _axis(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected an axis of a tensor with {x.dim()} axes, got {dim}")
    return dim % x.dim()


def _split_axis(name: str, x: Tensor, dim: int, group) -> int:
    dim, ranks = _axis(x, dim), dist.get_world_size(group)
    if x.shape[dim] % ranks:
        raise ValueError(
            f"{name}: axis {dim} of {tuple(x.shape)} does not divide among {ranks} ranks"
        )
    return dim


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _sum(x: Tensor, group) -> Tensor:
    ranks = dist.get_world_size(group)
    record("all_reduce", 2 * (ranks - 1) * _bytes(x) // ranks)
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out


def _gather(x: Tensor, dim: int, group) -> Tensor:
    ranks = dist.get_world_size(group)
    record("all_gather", (ranks - 1) * _bytes(x))
    x = x.contiguous()
    pieces = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(pieces, x, group=group)
    return torch.cat(pieces, dim)


def _exchange(pieces: list[Tensor], group) -> list[Tensor]:
    """Piece ``r`` goes to rank ``r``. Point to point: gloo has no all_to_all."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    pieces = [piece.contiguous() for piece in pieces]
    came = [piece if r == rank else torch.empty_like(piece) for r, piece in enumerate(pieces)]
    _send_receive(
        [(pieces[r], r) for r in range(ranks) if r != rank],
        [(came[r], r) for r in range(ranks) if r != rank],
        group,
    )
    return came


def _send_receive(sends: list, receives: list, group) -> None:
    def global_rank(r: int) -> int:
        return r if group is None else dist.get_global_rank(group, r)

    operations = [dist.P2POp(dist.isend, x, global_rank(r), group) for x, r in sends]
    operations += [dist.P2POp(dist.irecv, x, global_rank(r), group) for x, r in receives]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()


def _sum_and_scatter(x: Tensor, dim: int, group) -> Tensor:
    ranks = dist.get_world_size(group)
    record("reduce_scatter", (ranks - 1) * _bytes(x) // ranks)
    # In rank order on every rank, so that results do not depend on who arrives first.
    return torch.stack(_exchange(list(x.chunk(ranks, dim)), group)).sum(0)


def _permute(x: Tensor, split: int, join: int, group) -> Tensor:
    ranks = dist.get_world_size(group)
    record("all_to_all", (ranks - 1) * _bytes(x) // ranks)
    return torch.cat(_exchange(list(x.chunk(ranks, split)), group), join)


def _shift(x: Tensor, step: int, group) -> Tensor:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if step % ranks == 0:
        return x.clone()
    record("ring_shift", _bytes(x))
    x = x.contiguous()
    came = torch.empty_like(x)
    _send_receive([(x, (rank + step) % ranks)], [(came, (rank - step) % ranks)], group)
    return came


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _sum(grad, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _sum_and_scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _sum_and_scatter(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gather(grad, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, split, join, group):
        ctx.axes, ctx.group = (split, join), group
        return _permute(x, split, join, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        split, join = ctx.axes
        return _permute(grad, join, split, ctx.group), None, None, None


class _RingShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, group):
        ctx.step, ctx.group = step, group
        return _shift(x, step, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _shift(grad, -ctx.step, ctx.group), None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, group):
        ctx.source, ctx.group = source, group
        ranks = dist.get_world_size(group)
        record("broadcast", (ranks - 1) * _bytes(x) // ranks)
        out = x.contiguous().clone()
        dist.broadcast(out, group=group, group_src=source)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = _sum(grad, ctx.group)
        mine = dist.get_rank(ctx.group) == ctx.source
        return total if mine else torch.zeros_like(total), None, None
