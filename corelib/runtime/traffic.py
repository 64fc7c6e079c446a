"""Bytes that a rank sends, counted at every collective.

What is counted is what this rank has to send to other ranks under the bandwidth-optimal algorithm
(Thakur, Rabenseifner and Gropp, 2005), in bytes, for ``P`` ranks and a local tensor of ``n`` bytes:

===============  ==============================  ==========================================
collective       sends                           why
===============  ==============================  ==========================================
ring_shift       n                               the whole tensor to one neighbour
all_gather       (P - 1) n                       each rank's shard passes every other rank
reduce_scatter   (P - 1) n / P                   all but the own share, once
all_reduce       2 (P - 1) n / P                 a reduce_scatter and an all_gather of n / P
all_to_all       (P - 1) n / P                   all but the own share
broadcast        (P - 1) n / P on average        a scatter and an all_gather, in total (P - 1) n
===============  ==============================  ==========================================
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass
class Traffic:
    """Bytes sent and calls made by this rank, by collective."""

    sent: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def total(self) -> int:
        """Bytes sent in all collectives together."""
        return sum(self.sent.values())


_OPEN: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside the block, the backward pass included.

    >>> with count_traffic() as traffic:
    ...     all_reduce(torch.zeros(10))
    >>> traffic.sent["all_reduce"]
    """
    traffic = Traffic()
    _OPEN.append(traffic)
    try:
        yield traffic
    finally:
        # by identity: two counters that hold the same numbers are equal
        _OPEN[:] = [other for other in _OPEN if other is not traffic]


def record(collective: str, sent: int) -> None:
    for traffic in _OPEN:
        traffic.sent[collective] += sent
        traffic.calls[collective] += 1
