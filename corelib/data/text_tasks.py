"""Labels for raw bytes of the shipped texts: which work is this, are these two from one work?

They stand in for the byte-level sentiment and paper-matching tasks of Long Range Arena (Tay et al.,
arXiv 2011.04006, sections 2.2.2 and 2.2.3), whose data cannot ship. A work is a play, or all
modules of one Python package. Windows for training come from the first four fifths of each work,
those for testing from the last fifth, so that no line is in both.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Int
from torch import Tensor

from .labelled import LabelledBatch, balanced_labels
from .text import documents

#: Four works: two plays and two Python packages.
WORKS = ("hamlet", "twelfth_night", "jinja2", "traitlets")
TRAIN_SHARE = 0.8
BYTES = 256


@functools.cache
def _bytes_of(work: str) -> Int[Tensor, " N"]:
    plays, modules = documents("shakespeare", "train"), documents("python", "train")
    found = [plays[name] for name in (f"{work}.txt",) if name in plays]
    found += [text for name, text in modules.items() if name.split("/")[0] == work]
    if not found:
        known = sorted({name.partition(".")[0] for name in plays})
        known += sorted({name.split("/")[0] for name in modules})
        raise ValueError(f"works: expected some of {', '.join(known)}; got {work!r}")
    return torch.frombuffer(bytearray("\n".join(found).encode()), dtype=torch.uint8).long()


def _windows(works: list[str], length: int, split: str, generator: torch.Generator) -> Tensor:
    """A random window of each of ``works``: ``(len(works), length)``."""
    rows = []
    for work in works:
        text = _bytes_of(work)
        cut = round(TRAIN_SHARE * len(text))
        part = text[:cut] if split == "train" else text[cut:]
        if len(part) < length:
            raise ValueError(f"length: {work} has {len(part)} bytes for {split}, got {length}")
        first = int(torch.randint(len(part) - length + 1, (1,), generator=generator))
        rows.append(part[first : first + length])
    return torch.stack(rows)


def _check(works: tuple[str, ...], split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if len(works) < 2 or len(set(works)) < len(works):
        raise ValueError(f"works: expected two or more different ones, got {works}")


def byte_text(
    batch: int,
    length: int,
    *,
    split: str,
    generator: torch.Generator,
    works: tuple[str, ...] = WORKS,
) -> LabelledBatch:
    """Windows of ``length`` bytes; the label says which of ``works`` each was cut from."""
    _check(works, split)
    labels = balanced_labels(batch, len(works), generator)
    ids = _windows([works[i] for i in labels.tolist()], length, split, generator)
    return LabelledBatch(ids, torch.full((batch,), length), labels)


def byte_retrieval(
    batch: int,
    length: int,
    *,
    split: str,
    generator: torch.Generator,
    works: tuple[str, ...] = WORKS,
) -> LabelledBatch:
    """Pairs of windows ``(B, 2, length)``; label 1 when both are from one work, else 0."""
    _check(works, split)
    labels = balanced_labels(batch, 2, generator)
    first = torch.randint(len(works), (batch,), generator=generator)
    other = torch.randint(1, len(works), (batch,), generator=generator)
    second = torch.where(labels == 1, first, (first + other) % len(works))
    pairs = [
        _windows([works[i] for i in s.tolist()], length, split, generator) for s in (first, second)
    ]
    return LabelledBatch(torch.stack(pairs, 1), torch.full((batch, 2), length), labels)
