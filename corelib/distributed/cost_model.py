"""What communication costs: latency and bandwidth, collectives, and a schedule as a Gantt chart.

A message of ``n`` bytes takes ``latency + n / bandwidth`` (Hockney, 1994), and a collective as many
messages as its algorithm needs one after the other (Thakur, Rabenseifner and Gropp, 2005). With
local tensors of ``n`` bytes on ``P`` ranks:

==================  ==========================================================================
collective          seconds
==================  ==========================================================================
ring_shift          latency + n / bandwidth
all_gather          (P - 1) (latency + n / bandwidth)
reduce_scatter      (P - 1) (latency + n / P / bandwidth)
all_to_all          (P - 1) (latency + n / P / bandwidth)
all_reduce          2 (P - 1) (latency + n / P / bandwidth)        a ring, least bytes
all_reduce, tree    2 ceil(log2 P) (latency + n / bandwidth)       a tree, least messages
broadcast           ceil(log2 P) (latency + n / bandwidth)         a tree
==================  ==========================================================================

`simulate` plays a schedule of attention blocks on ranks with one processor each. All times are
modelled: nothing here was measured, links do not compete, and every step starts once its data is
there.
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import NamedTuple

from .shared import Schedule, borrowed_from, check_ranks


@dataclasses.dataclass(frozen=True)
class Link:
    """``latency`` in seconds for each message, ``bandwidth`` in bytes per second, one way."""

    latency: Real
    bandwidth: Real

    def __post_init__(self):
        if self.latency < 0 or self.bandwidth <= 0:
            raise ValueError(
                "latency and bandwidth: expected at least 0 and above 0, "
                f"got {self.latency} and {self.bandwidth}"
            )

    def seconds(self, size: Real) -> float:
        """For one message of ``size`` bytes."""
        return self.latency + size / self.bandwidth

    @property
    def half_size(self) -> float:
        """Bytes of a message that takes as long to start as to send: half of the bandwidth."""
        return self.latency * self.bandwidth


def messages(collective: str, size: Real, ranks: int) -> tuple[int, float]:
    """How many messages follow each other, and the bytes of each; ``size``: of the local tensor."""
    check_ranks(ranks)
    depth = math.ceil(math.log2(ranks))
    plans = {
        "ring_shift": (min(1, ranks - 1), size),
        "all_gather": (ranks - 1, size),
        "reduce_scatter": (ranks - 1, size / ranks),
        "all_to_all": (ranks - 1, size / ranks),
        "all_reduce": (2 * (ranks - 1), size / ranks),
        "all_reduce, tree": (2 * depth, size),
        "broadcast": (depth, size),
    }
    if collective not in plans:
        raise ValueError(f"collective: expected one of {', '.join(plans)}, got {collective!r}")
    return plans[collective]


def collective_seconds(collective: str, size: Real, ranks: int, link: Link) -> float:
    """Modelled seconds of a collective on local tensors of ``size`` bytes."""
    count, each = messages(collective, size, ranks)
    return count * link.seconds(each)


# --- schedules ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """``rank`` works on a pair, or waits for its data, from ``start`` to ``stop``.

    ``kind``: ``"own"``, ``"fetched keys"``, ``"helping"``, ``"waiting"``; ``text`` names the pair.
    """

    rank: int
    start: float
    stop: float
    kind: str
    text: str


def simulate(
    schedule: Schedule,
    *,
    block: Real = 1.0,
    transfer: Real = 0.0,
    prefetch: bool = True,
    causal: bool = True,
) -> list[Task]:
    """When every rank does what, modelled.

    Args:
        block: time of a whole block of scores; a rank's own, under a causal mask, takes half.
        transfer: time that a fetch takes.
        prefetch: fetch for the next step while computing; else after it.

    A fetch starts when borrower and lender start the step before (with prefetch) or end it.
    Sending results back is not timed: it has the whole next step to hide in.
    """
    ranks = len(schedule[0])
    starts, stops = [0.0] * ranks, [0.0] * ranks
    tasks = []
    for step in schedule:
        posted = list(starts if prefetch else stops)
        begun, ended = list(stops), list(stops)
        for rank, pair in enumerate(step):
            if pair is None:
                continue
            lender = borrowed_from(rank, pair)
            start = stops[rank]
            if lender is not None:
                start = max(start, max(posted[rank], posted[lender]) + transfer)
            if start > stops[rank]:
                tasks.append(Task(rank, stops[rank], start, "waiting", ""))
            length = block / 2 if lender is None and causal else block
            begun[rank], ended[rank] = start, start + length
            kind = "own" if lender is None else _kind(rank, pair)
            tasks.append(Task(rank, start, start + length, kind, f"{pair.queries}×{pair.keys}"))
        starts, stops = begun, ended
    return tasks


def _kind(rank: int, pair) -> str:
    return "fetched keys" if pair.queries == rank else "helping"


def makespan(tasks: list[Task]) -> float:
    """When the last rank is done."""
    return max(task.stop for task in tasks)


def busy_share(tasks: list[Task]) -> float:
    """Share of all ranks' time, up to the end, that goes into work."""
    ranks = 1 + max(task.rank for task in tasks)
    work = sum(task.stop - task.start for task in tasks if task.kind != "waiting")
    return work / (ranks * makespan(tasks))
