"""Whole sequences with one label each, and what their generators share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

PAD = 0


class LabelledBatch(NamedTuple):
    """``ids (B, L)`` and one label per row; a task on pairs has ``ids (B, 2, L)``.

    ``lengths`` has the shape of ``ids`` without its last axis: positions from ``lengths[b]`` on
    are filling (`PAD`) and mean nothing.
    """

    ids: Int[Tensor, "*B L"]
    lengths: Int[Tensor, "*B"]
    labels: Int[Tensor, " B"]


def balanced_labels(batch: int, classes: int, generator: torch.Generator) -> Int[Tensor, " B"]:
    """Labels ``0 … classes - 1`` in random order, each equally often (give or take one)."""
    return torch.randperm(batch, generator=generator) % classes


def python_random(generator: torch.Generator) -> random.Random:
    """A fast scalar generator that follows from ``generator``."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Ragged rows as ``ids (B, length)``, filled with `PAD`, and their lengths ``(B,)``."""
    ids = torch.full((len(rows), length), PAD)
    for filled, row in zip(ids, rows, strict=True):
        filled[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, torch.tensor([len(row) for row in rows], dtype=torch.int64)
