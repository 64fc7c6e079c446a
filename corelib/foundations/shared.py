"""Decode schedules: which program takes which tiles of whose keys, and how long that takes.

When a single query attends, the work of one output - one (request, key/value head) pair - is to
read its keys. Cut into tiles of equally many keys it can be spread over programs in several ways.
A schedule is data: for every program, in launch order, the `Piece`s that it works on. Here are the
two that came before LeanAttention (`lean_attention.stream_k_schedule`), and what a schedule costs
on a machine with a given number of processors, in units of the time that one tile takes:
`timeline`, `makespan`, `occupancy`; `modelled_decode_time` turns it into seconds of a given GPU.

These are models: each processor works on one tile at a time, all tiles take equally long, and
starting a program costs nothing. Nothing here was measured.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor


class Piece(NamedTuple):
    """Tiles ``first .. stop`` of one output, taken by one program in one go: one partial."""

    request: int
    head: int
    first: int
    stop: int


#: The pieces of every program, in the order it works on them.
Schedule = list[list[Piece]]


def fixed_split_schedule(lengths: Sequence[int], heads: int, tile: int, splits: int) -> Schedule:
    """FlashDecoding's: ``splits`` programs for every output; idle where it has fewer tiles."""
    check_counts(heads=heads, tile=tile, splits=splits)
    schedule: Schedule = []
    for request, tiles in enumerate(tiles_of(lengths, tile)):
        share = min(splits, tiles)
        cuts = [s * tiles // share for s in range(share + 1)] if share else [0]
        for head in range(heads):
            schedule += [[Piece(request, head, *cut)] for cut in zip(cuts, cuts[1:], strict=False)]
            schedule += [[] for _ in range(splits - share)]
    return schedule


def fa2_schedule(lengths: Sequence[int], heads: int, tile: int) -> Schedule:
    """FlashAttention-2's in the decode phase: one program for every output."""
    return fixed_split_schedule(lengths, heads, tile, splits=1)


class Slot(NamedTuple):
    """What a processor does from ``start`` to ``stop``, in units of one tile's time."""

    processor: int
    start: float
    stop: float
    piece: Piece


def timeline(schedule: Schedule, processors: int) -> list[Slot]:
    """The schedule as a Gantt chart: each program goes to the processor that is free first."""
    check_counts(processors=processors)
    free = [(0, processor) for processor in range(processors)]
    slots = []
    for pieces in schedule:
        now, processor = heapq.heappop(free)
        for piece in pieces:
            end = now + piece.stop - piece.first
            slots.append(Slot(processor, now, end, piece))
            now = end
        heapq.heappush(free, (now, processor))
    return slots


def makespan(schedule: Schedule, processors: int, merge_cost: Real = 0.0) -> float:
    """When the last output is done, in units of one tile's time (a model, not a measurement).

    ``merge_cost`` is what merging one partial costs. Outputs with a single partial need no merge;
    the others are merged after all tiles, each by one of the processors.
    """
    tiles = max((slot.stop for slot in timeline(schedule, processors)), default=0)
    partials = Counter(piece[:2] for pieces in schedule for piece in pieces)
    free = [0.0] * processors
    for count in partials.values():
        if count > 1:
            heapq.heapreplace(free, free[0] + count * merge_cost)
    return tiles + max(free)


def occupancy(schedule: Schedule, processors: int, merge_cost: Real = 0.0) -> float:
    """The share of the processors' time, until all is done, that is spent on tiles."""
    work = sum(piece.stop - piece.first for pieces in schedule for piece in pieces)
    return work / (processors * makespan(schedule, processors, merge_cost)) if work else 1.0


@runtime_checkable
class Device(Protocol):
    """What `modelled_decode_time` asks of a device, such as `corelib.measure.H100`."""

    bandwidth: float  # bytes a second
    sms: int


def modelled_decode_time(
    schedule: Schedule,
    device: Device,
    *,
    tile: int,
    rows: int,
    D: int,
    V: int | None = None,
    itemsize: int = 2,
    resident: int = 2,
) -> float:
    """*Modelled* seconds of a decode step: its bytes at the device's bandwidth, tile by tile.

    ``resident`` programs run on each multiprocessor at a time, and each of them gets an equal
    share of ``device.bandwidth``: a schedule that keeps half of them busy reads half as fast.
    ``rows`` is ``H / G * L``; partials are float32, written once and read once. Launches,
    latencies and arithmetic (a few FLOP per byte) count nothing.
    """
    check_counts(tile=tile, rows=rows, D=D, itemsize=itemsize, resident=resident)
    V = D if V is None else V
    processors = device.sms * resident
    tile_bytes = tile * (D + V) * itemsize
    partial_bytes = 2 * 4 * rows * (V + 2)
    steps = makespan(schedule, processors, merge_cost=partial_bytes / tile_bytes)
    return steps * tile_bytes * processors / device.bandwidth


def tiles_of(lengths: Sequence[int], tile: int) -> list[int]:
    """How many tiles each request's keys fill; the last one may be part full."""
    for n in lengths:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"lengths: expected whole numbers of keys, got {n!r}")
    return [-(-n // tile) for n in lengths]


def keys_held(lengths: Int[Tensor, B] | None, B: int, S: int) -> list[int]:
    """How many of its cache's ``S`` keys each of ``B`` requests holds: all, without ``lengths``."""
    if lengths is None:
        return [S] * B
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected a tensor of int32 or int64, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected shape ({B},), got {tuple(lengths.shape)}")
    held = lengths.tolist()
    if not all(0 <= n <= S for n in held):
        raise ValueError(f"lengths: expected 0 to {S} keys, got {held}")
    return held


def check_counts(**counts: int) -> None:
    """Raise TypeError or ValueError, naming the first argument that is no whole number from 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_positive(**numbers: Real) -> None:
    """Raise TypeError or ValueError, naming the first argument that is no positive number."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
