"""The six tasks of the arena at two sizes; what each stands for is told in `lra`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from ..data import (
    LabelledBatch,
    byte_retrieval,
    byte_text,
    digits,
    listops,
    pathfinder,
    upsample,
)
from ..data.listops import TOKENS

Draw = Callable[[int, str, torch.Generator], LabelledBatch]
SEEDS = {"train": 0, "test": 1}


@dataclasses.dataclass(frozen=True)
class Task:
    """``draw(n, split, generator)`` gives ``n`` examples; ids lie below ``vocab``.

    ``length`` is that of one sequence; a task on ``pairs`` reads two of them.
    """

    name: str
    classes: int
    vocab: int
    length: int
    draw: Draw
    pairs: bool = False

    def examples(self, n: int, split: str, seed: int = 0) -> LabelledBatch:
        """``n`` examples of a split (of the digits at most all), the same for the same seed."""
        if split not in SEEDS:
            raise ValueError(f"split: expected one of {tuple(SEEDS)}, got {split!r}")
        return LabelledBatch(*(part.clone() for part in _drawn(self, n, split, seed)))


@lru_cache(maxsize=8)  # every contestant of a race asks for the same examples
def _drawn(task: Task, n: int, split: str, seed: int) -> LabelledBatch:
    return task.draw(n, split, torch.Generator().manual_seed(2 * seed + SEEDS[split]))


def _listops(n, split, generator, low, high):
    return listops(n, min_length=low, max_length=high, generator=generator)


def _pathfinder(n, split, generator, side):
    return pathfinder(n, side, generator=generator)


def _text(n, split, generator, length, make):
    return make(n, length, split=split, generator=generator)


def pixel_digits(
    n: int, split: str, generator: torch.Generator, side: int = 8, levels: int = 4
) -> LabelledBatch:
    """Digits as sequences of ``side * side`` grey levels; at most as many as there are."""
    images, labels = digits(split)
    rows = torch.randperm(len(labels), generator=generator)[:n]
    images = images if side == 8 else upsample(images, side)
    ids = (images[rows].flatten(1) * (levels - 1)).round().long()
    return LabelledBatch(ids, torch.full((len(rows),), side * side), labels[rows])


def _arena(low: int, high: int, length: int, image: tuple[int, int], sides: tuple[int, int]):
    side, levels = image
    draws = {
        "listops": (10, len(TOKENS), high, partial(_listops, low=low, high=high)),
        "text": (4, 256, length, partial(_text, length=length, make=byte_text)),
        "retrieval": (2, 256, length, partial(_text, length=length, make=byte_retrieval)),
        "image": (10, levels, side * side, partial(pixel_digits, side=side, levels=levels)),
        "pathfinder": (2, 3, sides[0] ** 2, partial(_pathfinder, side=sides[0])),
        "pathx": (2, 3, sides[1] ** 2, partial(_pathfinder, side=sides[1])),
    }
    return {n: Task(n, *sizes, pairs=n == "retrieval") for n, sizes in draws.items()}


def lab_arena() -> dict[str, Task]:
    """The six tasks at sizes for one core: sequences of 64 to 1,024."""
    return _arena(8, 64, 128, image=(8, 4), sides=(16, 32))


def full_arena() -> dict[str, Task]:
    """The six tasks at the paper's lengths: 1,024 to 16,384."""
    return _arena(500, 2000, 4096, image=(32, 256), sides=(32, 128))
