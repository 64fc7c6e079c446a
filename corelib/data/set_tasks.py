"""Two sets that share one element: which? The hardest question for a one-way reader, per token.

Whoever reads set A and then set B with too small a memory to hold A cannot tell what they share:
set disjointness is the standard hard problem of communication complexity. Arora et al. (Just Read
Twice, arXiv 2407.05483, section 3) use it to measure what the order of the data costs.
"""

from __future__ import annotations

import torch

from .synthetic import IGNORE, TaskBatch

START, BETWEEN, ASK = 1, 2, 3
SPECIAL = 4  # ids 0 to 3 are not elements; 0 is for padding or masking


def set_disjointness(
    batch: int, *, first: int, second: int, vocab: int, generator: torch.Generator
) -> TaskBatch:
    """Rows ``[1] + A + [2] + B + [3]`` with exactly one id in both sets, the target at the end.

    Args:
        first, second: sizes of A and B, in the order in which they are read. The two orders of a
            short and a long set are ``first < second`` and ``first > second``.
        vocab: ids are drawn from ``4 … vocab - 1``, each row its own; apart from the shared one
            no id comes twice, and none tells by itself which set it is in.

    Returns:
        ids and targets of length ``first + second + 3``; only the last position is scored.
    """
    for name, size in (("first", first), ("second", second)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if vocab < SPECIAL + first + second - 1:
        least = SPECIAL + first + second - 1
        raise ValueError(f"vocab: expected at least {least} for these sets, got {vocab}")
    keys = torch.rand(batch, vocab - SPECIAL, generator=generator)
    drawn = SPECIAL + keys.argsort(1)[:, : first + second - 1]
    a, rest = drawn[:, :first], drawn[:, first:]
    shared = a.gather(1, torch.randint(first, (batch, 1), generator=generator))
    b = torch.cat([rest, shared], 1)
    b = b.gather(1, torch.rand(b.shape, generator=generator).argsort(1))
    marks = {mark: torch.full((batch, 1), mark) for mark in (START, BETWEEN, ASK)}
    ids = torch.cat([marks[START], a, marks[BETWEEN], b, marks[ASK]], 1)
    targets = torch.full_like(ids, IGNORE)
    targets[:, -1:] = shared
    return TaskBatch(ids, targets)
