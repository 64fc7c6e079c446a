"""Attention over a sequence cut among processes: wall-clock on this CPU, and bytes sent.

All contestants are exact and are held to one process's output and gradients before the clock
starts. They run on the same ranks in turns; a round's time is the slowest rank's, from a barrier
on. With more ranks than cores a rank that has nothing to do lends its core to the others, so times
show the work and the handling of messages, not who waits: bytes and schedules (`cost_model`) are
what carries over to separate devices.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...distributed import block_attention as blocks
from ...distributed.lightseq import dist_flash_attention
from ...distributed.ring_self_attention import ring_self_attention
from ...distributed.shared import zigzag_order
from ...distributed.ulysses import ulysses_attention
from ...primitives import attention
from ...runtime import Ranks, count_traffic
from ..agreement import agreement
from ..gradients import forward_backward
from ..machine import machine
from ..race import Race
from . import Row, register, rows

#: By name: what attends on a rank; each takes ``(q, k, v, *, causal)`` of the rank's stretch.
CORES: dict[str, Callable] = {
    "Ulysses": ulysses_attention,
    "LightSeq": dist_flash_attention,
    "ring, zigzag order": blocks.zigzag_ring_attention,
    "ring, online softmax": blocks.ring_attention,
    "ring, complete rows": ring_self_attention,
    "gather all keys": blocks.gathered_attention,
}
IN_ZIGZAG = ("ring, zigzag order",)


def inputs(L: int, H: int, G: int, D: int) -> list[Tensor]:
    """``q, k, v``, one sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, L, D, generator=generator) for heads in (H, G, G)]


def run_on_ranks(
    ranks: Ranks, tensors: list[Tensor], names: list[str] | None = None, repeats: int = 5
) -> tuple[Race, dict[str, int]]:
    """The causal cores in turns, forward and backward: their race, and bytes of the busiest rank.

    Raises:
        ValueError: a core whose output or gradients are not those of one process.
    """
    names, L = list(names or CORES), tensors[0].shape[2]
    order = {
        name: torch.tensor(zigzag_order(L, ranks.size) if name in IN_ZIGZAG else range(L))
        for name in names
    }
    pieces = {
        name: list(zip(*(x[:, :, order[name]].chunk(ranks.size, 2) for x in tensors)))
        for name in names
    }
    answers = ranks.run(_rounds, pieces, _seed(tensors), order, repeats)
    wanted = _one_process(tensors)
    worst = 0.0
    for name in names:
        parts = zip(*(answer[name][0] for answer in answers))
        got = [torch.cat(part, 2)[:, :, order[name].argsort()] for part in parts]
        worst = max(worst, agreement(got, wanted, None, name))
    times = {name: [max(t) for t in zip(*(a[name][1] for a in answers))] for name in names}
    sent = {name: max(answer[name][2] for answer in answers) for name in names}
    where = f"{ranks.size} processes on {os.cpu_count()} cores, {machine()}"
    return Race(times, names[0], where, worst), sent


def _seed(tensors: list[Tensor]) -> Tensor:
    """The gradient of the output."""
    return torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))


def _one_process(tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attention(*leaves, causal=True)
    out.backward(_seed(tensors))
    return [out.detach(), *[x.grad for x in leaves]]


def _rounds(rank: int, pieces: dict, seed: Tensor, order: dict, repeats: int) -> dict:
    """On a rank, by name: ``(output and gradients, seconds of every round, bytes sent)``."""
    results, seconds, sent = {}, {name: [] for name in pieces}, {}
    for number in range(repeats + 1):  # the first round warms up, is checked and counted
        for name, stretches in pieces.items():
            leaves = [x.clone().requires_grad_() for x in stretches[rank]]
            d_out = seed[:, :, order[name]].chunk(len(stretches), 2)[rank]
            torch.distributed.barrier()
            start = time.perf_counter()
            with count_traffic() as traffic:
                out = CORES[name](*leaves, causal=True)
                out.backward(d_out)
            if number:
                seconds[name].append(time.perf_counter() - start)
            else:
                results[name] = [out.detach(), *[x.grad for x in leaves]]
                sent[name] = traffic.total
    return {name: (results[name], seconds[name], sent[name]) for name in pieces}


@register("sequence-parallel", "causal attention cut among ranks: Ulysses, LightSeq and rings")
def sequence_parallel(quick: bool) -> Iterator[Row]:
    H, D = (4, 16) if quick else (8, 64)
    for P in (2,) if quick else (2, 4):
        with Ranks(P, timeout=600) as ranks:
            for G in (H,) if quick else (H, 2):
                yield from _table(ranks, 64 if quick else 2048, H, G, D)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _table(ranks: Ranks, L: int, H: int, G: int, D: int) -> Iterator[Row]:
    tensors = inputs(L, H, G, D)
    result, sent = run_on_ranks(ranks, tensors)
    alone = forward_backward(lambda *x: attention(*x, causal=True), *tensors)
    alone()
    result.times[f"one process, threads: {torch.get_num_threads()}"] = [
        _seconds(alone) for _ in range(5)
    ]
    shape = f"P{ranks.size} B1 H{H} G{G} D{D} L{L} float32"
    for row in rows(result, what="forward + backward", shape=shape, corelib="Ulysses"):
        mega = sent.get(row.contestant, 0) / 1e6
        yield dataclasses.replace(row, shape=f"{shape}, sends {mega:.2f} MB")
