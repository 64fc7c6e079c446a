"""Ranks on `torch.distributed`: start them, exchange tensors, count the bytes.

>>> from corelib.runtime import run_ranks, all_reduce
>>> run_ranks(lambda rank: all_reduce(torch.tensor([float(rank)])).item(), 3)
[3.0, 3.0, 3.0]
"""

from .collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    reduce_scatter,
    ring_shift,
)
from .ranks import RankError, Ranks, run_ranks
from .traffic import Traffic, count_traffic

__all__ = [
    "RankError",
    "Ranks",
    "Traffic",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "count_traffic",
    "reduce_scatter",
    "ring_shift",
    "run_ranks",
]
